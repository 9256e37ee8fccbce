"""Requests to stop: SIGTERM, Ctrl-C, the end of the terminal."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator


def on_stop_signals(
  stop: Callable[[], None],
  kill: Callable[[], None] = lambda: None,
  message: str = 'Stopping with a checkpoint',
) -> None:
  """Calls `stop` when this process is asked to stop: by SIGTERM, Ctrl-C, or its terminal's end.

  The second time it calls `kill` and ends at once: what is on disk is whole at any moment. A
  process that ignores the end of its terminal (nohup) goes on doing so.

  Args:
    stop: called once.
    kill: ends the processes that this one has started.
    message: answers Ctrl-C.
  """
  asked = False

  def handle(number, _):
    nonlocal asked
    if asked:
      kill()
      os._exit(128 + number)
    asked = True
    if number == signal.SIGINT:
      with contextlib.suppress(OSError):  # the reader of standard output may be gone
        os.write(1, f'{message}; Ctrl-C again ends at once.\n'.encode())
    stop()

  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, handle)


def stop_event(message: str = 'Stopping with a checkpoint') -> threading.Event:
  """Makes an event that is set when this process is asked to stop; see `on_stop_signals`."""
  stop = threading.Event()
  on_stop_signals(stop.set, message=message)
  return stop


def supervised_stop_event() -> threading.Event:
  """Makes an event that the first SIGTERM sets; those with which a supervisor insists are
  ignored."""
  stop = threading.Event()

  def handle(number, _):
    signal.signal(number, signal.SIG_IGN)
    stop.set()

  signal.signal(signal.SIGTERM, handle)
  return stop


@contextlib.contextmanager
def terminal_signals_blocked() -> Iterator[None]:
  """Keeps processes that are started inside from Ctrl-C and the end of the terminal, for good.

  The process that starts them receives both, and asks them to stop by SIGTERM.
  """
  before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
