"""The method, KIP and Label Solve, as functions of arrays: it knows neither servers nor files."""
