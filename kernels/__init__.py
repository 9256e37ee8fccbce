"""NTK blocks, kernel ridge-regression and Label Solve. Imports neither Launchpad nor `data`."""
