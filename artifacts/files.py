"""Writing files so that readers see the old content or the new, and waiting out a full disk."""

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

from absl import logging

from artifacts import RunDirectoryError, waiting

_SCRATCH = '.writing-'  # begins the names of files that are being written


class Patience(NamedTuple):
  """How long `persist` tries to write: `seconds` in all, with a `pause` (seconds) between tries."""

  seconds: float = 60.0
  pause: float = 5.0


PATIENCE = Patience()


def write_atomically(path: str, content: 'str | bytes | Callable[[BinaryIO], Any]') -> None:
  """Replaces a file by `content`: text, bytes, or a function that writes to a binary file.

  Raises OSError, and what the function raises; the old file stays then.
  """
  # tempfile's own files are for nobody but the owner to read.
  scratch = os.path.join(os.path.dirname(path), f'{_SCRATCH}{uuid.uuid4().hex}')
  with open(scratch, 'xb') as file, contextlib.ExitStack() as unless_replaced:
    unless_replaced.callback(os.unlink, scratch)
    if callable(content):
      content(file)
    else:
      file.write(content.encode() if isinstance(content, str) else content)
    file.flush()
    os.fsync(file.fileno())
    os.replace(scratch, path)
    unless_replaced.pop_all()


def sweep(folder: str) -> None:
  """Removes what killed calls of `write_atomically` left in a folder, which need not exist."""
  for name in os.listdir(folder) if os.path.isdir(folder) else ():
    if name.startswith(_SCRATCH):
      os.unlink(os.path.join(folder, name))


def persist(
  what: str, write: Callable[[], Any], stop: threading.Event, patience: Patience = PATIENCE
) -> None:
  """Calls `write`, and again while it raises OSError: somebody may make room on a full disk.

  Args:
    what: the file's name, for messages.
    write: may be called several times.
    stop: once it is set, the next failure is the last.
    patience: how long to try.

  Raises:
    RunDirectoryError: all tries failed; with the reason of the last one.
  """
  end = time.monotonic() + patience.seconds
  while True:
    try:
      write()
      return
    except OSError as error:
      reason, left = error.strerror or error, end - time.monotonic()
      if left <= 0 or stop.is_set():
        raise RunDirectoryError(f'{what} cannot be written ({reason}).') from error
      logging.warning('%s cannot be written (%s); trying again for %.0f s.', what, reason, left)
    waiting.pause(patience.pause, stop)


def json_line(value: Any, indent: int | None = None) -> str:
  """JSON text that ends with a line break."""
  return json.dumps(value, indent=indent) + '\n'
