"""The output of a local launch: its nodes' lines, and on a terminal a progress bar below them."""

import contextlib
import functools
import io
import os
import pty
import re
import sys
import threading
import tty
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from artifacts import run_directory, words

_COLOUR = re.compile(rb'\x1b\[[0-9;]*m')
# The coordinator's lines that the bar replaces.
_PROGRESS = re.compile(rb'\d\d:\d\d:\d\d step \d+/\d+: loss ')
# Launchpad's line, repeated every second.
_COUNTDOWN = re.compile(
  rb'(\x1b\[[0-9;]*m)*Waiting for workers to stop for \d+s\.(\x1b\[[0-9;]*m)*\r?'
)
_NAME_AT_MOST = re.compile(rb'(\x1b\[[0-9;]*m|\[[\w/]+\]|\s)*')  # of a node
_REDRAWS = 2  # a second


@contextlib.contextmanager
def show_output(directory: run_directory.RunDirectory) -> Iterator[None]:
  """Passes on what this process and its children write inside, line by line: on a terminal above a
  progress bar, elsewhere without colours.

  Launchpad pipes its nodes' output through sed, which buffers it in blocks unless it writes to a
  terminal: so it gets one.
  """
  on_terminal = sys.stdout.isatty()
  streams = [1, 2] if on_terminal and sys.stderr.isatty() else [1]
  for stream in (sys.stdout, sys.stderr):
    stream.flush()
  real = [os.dup(number) for number in streams]
  master, slave = pty.openpty()
  tty.setraw(slave)
  for number in streams:
    os.dup2(slave, number)
  os.close(slave)
  with contextlib.ExitStack() as stack:
    for descriptor in (*real, master):
      stack.callback(os.close, descriptor)
    if on_terminal:
      console = Console(file=_Screen(real[0]))
      stack.enter_context(_live_bar(console, directory))
      console.show_cursor(True)  # a process that is killed leaves it as it is
      write = functools.partial(_print_above, console)
    else:
      write = functools.partial(_write_plainly, real[0])
    copier = threading.Thread(target=_copy, args=(master, write), daemon=True)
    copier.start()
    try:
      yield
    finally:
      for stream in (sys.stdout, sys.stderr):
        stream.flush()
      if on_terminal and not os.isatty(real[0]):  # it was closed meanwhile
        for saved in real:
          _redirect_to_nothing(saved)
      for number, saved in zip(streams, real):
        os.dup2(saved, number)
      copier.join(5)  # seconds; a child that was left behind may hold the terminal open


def _live_bar(console: Console, directory: run_directory.RunDirectory) -> Live:
  return Live(
    console=console,
    get_renderable=lambda: _bar(directory),
    refresh_per_second=_REDRAWS,
    transient=True,
    redirect_stdout=False,
    redirect_stderr=False,
  )


class _Screen(io.StringIO):
  """A terminal that may be closed at any time: what is written to it then is lost.

  It is a StringIO by type only.
  """

  encoding = 'utf-8'

  def __init__(self, descriptor: int):
    super().__init__()
    self._descriptor = descriptor

  def write(self, text: str) -> int:
    with contextlib.suppress(OSError):
      _write_all(self._descriptor, text.encode(errors='replace'))
    return len(text)

  def isatty(self) -> bool:
    return True

  def fileno(self) -> int:
    return self._descriptor


def _redirect_to_nothing(descriptor: int) -> None:
  nothing = os.open(os.devnull, os.O_RDWR)
  os.dup2(nothing, descriptor)
  os.close(nothing)


def _copy(master: int, write: Callable[[bytes], None]) -> None:
  """Passes whole lines on to `write` until the last writer is gone."""
  held, is_read = b'', True
  while True:
    try:
      data = os.read(master, 2**16)
    except OSError:  # what a terminal's master reads then
      data = b''
    *lines, held = (held + data).split(b'\n') if data else [*filter(None, [held]), b'']
    if is_read:
      try:
        write(b''.join(map(_without_countdown, lines)))
      except OSError:  # the reader is gone (`| head`): go on, or those who write would block
        is_read = False
    if not data:
      return


def _without_countdown(line: bytes) -> bytes:
  """Ends a line; of one that held nothing but Launchpad's countdown nothing is left."""
  rest = _COUNTDOWN.sub(b'', line)
  return b'' if rest != line and _NAME_AT_MOST.fullmatch(rest) else rest + b'\n'


def _write_plainly(real: int, lines: bytes) -> None:
  _write_all(real, _COLOUR.sub(b'', lines))


def _write_all(descriptor: int, content: bytes) -> None:
  while content:
    content = content[os.write(descriptor, content) :]


def _print_above(console: Console, lines: bytes) -> None:
  for line in lines.split(b'\n')[:-1]:
    if not _PROGRESS.search(line):
      console.print(Text.from_ansi(line.decode(errors='replace')), soft_wrap=True)


def _bar(directory: run_directory.RunDirectory) -> Group:
  """Draws the progress of a run, from what it has recorded, in one or two lines."""
  status, rows = directory.read_status() or {}, directory.read_metrics()
  line = Table.grid(expand=True, padding=(0, 1))
  at_work = status.get('state') in (run_directory.RUNNING, run_directory.EVALUATING)
  if not at_work or 'train_loss' not in status:
    line.add_row(status.get('state', run_directory.STARTING))
    return Group(line)
  step, num_steps = status['step'], status['num_steps']
  if step < num_steps:
    to_go = f'{words.duration(status["seconds_to_go"])} to go'
  elif 'evaluated' in status:
    to_go = f'evaluated {status["evaluated"]} of {status["to_evaluate"]}'
  else:
    to_go = 'last step'
  tested = ''
  if rows:
    tested = f'test {100 * rows[-1]["krr_test_accuracy"]:.2f} % at step {rows[-1]["step"]}  '
  alive = sum(worker['alive'] for worker in status['workers'].values())
  line.add_column(no_wrap=True)
  line.add_column(ratio=1)
  line.add_column(no_wrap=True)
  line.add_row(f'step {step}/{num_steps}', ProgressBar(num_steps, step), to_go)
  rate = f'{status["kernel_pairs_per_second"]:.3g} pairs/s'
  text = f'loss {status["train_loss"]:.5f}  {tested}{rate}  workers: {alive}'
  return Group(line, Text(text, no_wrap=True))
