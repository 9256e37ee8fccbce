"""Data sets: loading, preprocessing, the shared cache, and sampling."""


class DataError(ValueError):
  """Something is wrong with a data set or a file; the message is one line for the user."""
