"""Kernels of infinitely wide networks. Imports nothing else of this project."""
