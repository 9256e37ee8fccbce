"""Line-by-line output of a local launch wherever it goes."""

import contextlib
import os
import pty
import re
import sys
import threading
import tty

_COLOUR = re.compile(rb'\x1b\[[0-9;]*m')


@contextlib.contextmanager
def line_by_line():
  """Inside, the output of child processes arrives line by line, and without colours where it does not go to a terminal.

  Launchpad pipes its nodes' output through sed, which holds it back by the block unless it writes to a terminal: so it gets one.
  """
  if sys.stdout.isatty():
    yield
    return
  sys.stdout.flush()
  master, slave = pty.openpty()
  tty.setraw(slave)
  real = os.dup(1)
  os.dup2(slave, 1)
  os.close(slave)

  def copy():
    held = b''
    while True:
      try:
        data = os.read(master, 2 ** 16)
      except OSError:  # what a terminal's master reads once its last writer is gone
        data = b''
      lines, newline, held = (held + data).rpartition(b'\n') if data else (held, b'', b'')
      text = _COLOUR.sub(b'', lines + newline)
      while text:
        text = text[os.write(real, text):]
      if not data:
        return

  copier = threading.Thread(target=copy, daemon=True)
  copier.start()
  try:
    yield
  finally:
    sys.stdout.flush()
    os.dup2(real, 1)
    copier.join(5)  # a child that was left behind may hold the terminal open
    os.close(real)
    os.close(master)
