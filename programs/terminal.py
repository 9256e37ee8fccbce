"""What a local launch shows: its nodes' output, and on a terminal a bar below it that tells how the
run is doing."""

import contextlib
import datetime
import io
import os
import pty
import re
import sys
import threading
import tty

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from artifacts import run_directory

_COLOUR = re.compile(rb'\x1b\[[0-9;]*m')
# The coordinator's lines, of which the bar tells.
_PROGRESS = re.compile(rb'\d\d:\d\d:\d\d step \d+/\d+: loss ')
# Launchpad's, over and over.
_COUNTDOWN = re.compile(
  rb'(\x1b\[[0-9;]*m)*Waiting for workers to stop for \d+s\.(\x1b\[[0-9;]*m)*\r?'
)
_NOTHING = re.compile(rb'(\x1b\[[0-9;]*m|\[[\w/]+\]|\s)*')  # but a node's name
_REDRAWS = 2  # a second


@contextlib.contextmanager
def shown(directory: run_directory.RunDirectory):
  """Inside, what this process and its children write arrives line by line: on a terminal above the
  bar, elsewhere without colours.

  Launchpad pipes its nodes' output through sed, which holds it back by the block unless it writes
  to a terminal: so it gets one.
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
  if on_terminal:
    console = Console(file=_Screen(real[0]))
    bar = Live(
      console=console,
      get_renderable=lambda: _bar(directory),
      refresh_per_second=_REDRAWS,
      transient=True,
      redirect_stdout=False,
      redirect_stderr=False,
    )
    write = lambda lines: _print_above(console, lines)
  else:
    bar, write = contextlib.nullcontext(), lambda lines: _write_plainly(real[0], lines)
  copier = threading.Thread(target=_copy, args=(master, write), daemon=True)
  try:
    with bar:
      if on_terminal:
        console.show_cursor(True)  # whoever ends this process by force finds it there
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
        copier.join(5)  # a child that was left behind may hold the terminal open
  finally:
    for descriptor in (*real, master):
      os.close(descriptor)


class _Screen(io.TextIOBase):
  """A terminal that may be closed at any time: what is written to it then is lost."""

  encoding = 'utf-8'

  def __init__(self, descriptor: int):
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


def _copy(master: int, write) -> None:
  """Hands whole lines on until the last writer is gone."""
  held = b''
  while True:
    try:
      data = os.read(master, 2**16)
    except OSError:  # what a terminal's master reads then
      data = b''
    *lines, held = (held + data).split(b'\n') if data else [*filter(None, [held]), b'']
    told = [(line, _COUNTDOWN.sub(b'', line)) for line in lines]
    try:
      write(
        b''.join(
          rest + b'\n' for line, rest in told if rest == line or not _NOTHING.fullmatch(rest)
        )
      )
    except OSError:  # nobody reads any more: `| head`
      write = lambda lines: None  # whoever writes must not wait for it
    if not data:
      return


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
  """Two lines, of what the run has recorded."""
  status, rows = directory.read_status() or {}, directory.read_metrics()
  line = Table.grid(expand=True, padding=(0, 1))
  at_work = status.get('state') in (run_directory.RUNNING, run_directory.EVALUATING)
  if not at_work or 'train_loss' not in status:
    line.add_row(status.get('state', run_directory.STARTING))
    return Group(line)
  step, num_steps = status['step'], status['num_steps']
  if step < num_steps:
    to_go = f'{datetime.timedelta(seconds=round(status["seconds_to_go"]))} to go'
  elif 'evaluated' in status:
    to_go = f'evaluated {status["evaluated"]} of {status["to_evaluate"]}'
  else:
    to_go = 'last step'
  tested = (
    f'test {100 * rows[-1]["krr_test_accuracy"]:.2f} % at step {rows[-1]["step"]}  ' if rows else ''
  )
  alive = sum(worker['alive'] for worker in status['workers'].values())
  line.add_column(no_wrap=True)
  line.add_column(ratio=1)
  line.add_column(no_wrap=True)
  line.add_row(f'step {step}/{num_steps}', ProgressBar(num_steps, step), to_go)
  return Group(
    line,
    Text(
      f'loss {status["train_loss"]:.5f}  {tested}{status["kernel_pairs_per_second"]:.3g} pairs/s  '
      f'workers: {alive}',
      no_wrap=True,
    ),
  )
