"""Data sets: sources, preprocessing, augmentation, sampling, and the cache all processes share."""

import struct
import tokenize
import zipfile
import zlib


class DataError(ValueError):
  """A data set or a file cannot be used; the message is one line for the user."""


# What numpy.load and the reading of its arrays raise on files that are damaged, or were never .npz.
NPZ_ERRORS = (
  *(OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, OverflowError, SyntaxError),
  *(tokenize.TokenError, struct.error, zlib.error, zipfile.BadZipFile),
)


def one_line(error: Exception) -> str:
  """An error's message, or else its type, as a sentence on one line of at most 200 characters."""
  text = ' '.join(str(error).split())
  return (text[:200] + '…' if len(text) > 200 else text or type(error).__name__).rstrip('.') + '.'
