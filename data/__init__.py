"""Data sets: loading, preprocessing, the shared cache, and sampling."""

import struct
import tokenize
import zipfile
import zlib


class DataError(ValueError):
  """Something is wrong with a data set or a file; the message is one line for the user."""


# What numpy.load and the reading of its arrays raise on files that are damaged, or were never .npz.
NPZ_ERRORS = (
  OSError,
  ValueError,
  KeyError,
  EOFError,
  RuntimeError,
  MemoryError,
  OverflowError,
  SyntaxError,
  tokenize.TokenError,
  struct.error,
  zlib.error,
  zipfile.BadZipFile,
)
