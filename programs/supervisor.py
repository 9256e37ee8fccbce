"""Keeps a node alive: a light parent runs this very command again as its child, and again whenever
the child is killed.

The parent imports neither JAX nor a node. It knows nothing of Launchpad either: whoever starts a
node's process (the local launcher, a scheduler) calls `is_child()`, then does the node's work or
`supervise()`s.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
from absl import logging

RESTART_STATUS = 76  # a node's wish to be started afresh
LAUNCHER = 'KIP_LAUNCHER'  # environment: process id; when that process is gone, so are its nodes
_PARENT, _SIGN = 'KIP_SUPERVISOR', 'KIP_SIGN_OF_USE'
_MAX_USELESS = 10  # lives in a row without progress
_MAX_IN_VAIN = 100  # lives in a row whose progress, if any, was lost with them
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
# Seconds that Launchpad gives a process to stop: a busy machine may take long to write a
# checkpoint.
LAUNCHER_NOTICE = 30
NOTICE = LAUNCHER_NOTICE - 2.0  # a child has less than its parent
_PR_SET_PDEATHSIG = 1
_LASTING = b'!'
_told: set[bytes] = set()


def is_child() -> bool:
  """Whether this process has the node's work to do. If so, it dies with its parent from here on."""
  parent = os.environ.get(_PARENT)
  if parent is None:
    return False
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != int(parent):  # it was gone before
    sys.exit(1)
  return True


def progressed(lasting: bool = True) -> None:
  """Resets the restart backoff. `lasting`: what was done outlives this process."""
  mark = _LASTING if lasting else b'.'
  if _SIGN in os.environ and mark not in _told:
    _told.add(mark)  # once each: nobody reads the pipe before this process has ended
    os.write(int(os.environ[_SIGN]), mark)


@contextlib.contextmanager
def terminal_signals_blocked():
  """Inside, started processes are kept from Ctrl-C and the end of the terminal, for good.

  Who started them is told too, and asks them to stop by SIGTERM.
  """
  before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def supervise(name: str, stop: threading.Event) -> int:
  """Runs the child until it ends by itself, or until this process is to stop; gives its exit
  status.

  A child that is killed (by whatever signal) or asks for it is started again, with growing pauses
  while it makes no progress, and no more after _MAX_USELESS such lives, nor after _MAX_IN_VAIN
  without lasting progress. One that ends by itself, well or not, has said why.
  """
  launcher = _process(int(os.environ[LAUNCHER])) if LAUNCHER in os.environ else None
  gone = lambda: stop.is_set() or (LAUNCHER in os.environ and not _is_alive(launcher))
  useless = in_vain = 0
  while True:
    reader, writer = os.pipe()
    with terminal_signals_blocked():
      child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        pass_fds=[writer],
        env={**os.environ, _PARENT: str(os.getpid()), _SIGN: str(writer)},
      )
    with child:
      os.close(writer)
      while child.poll() is None and not gone():
        # Event.wait can deadlock with a signal handler that sets the event.
        time.sleep(0.05)
      if gone():
        return _end(child)
    marks = os.read(reader, 16)
    os.close(reader)
    useless, in_vain = 0 if marks else useless + 1, 0 if _LASTING in marks else in_vain + 1
    if child.returncode >= 0 and child.returncode != RESTART_STATUS:
      return child.returncode
    cause = (
      'asked to be started afresh'
      if child.returncode >= 0
      else f'was killed by {_signal_name(-child.returncode)}'
    )
    if useless >= _MAX_USELESS or in_vain >= _MAX_IN_VAIN:
      logging.error(
        '%s %s: exited %d times without making progress; giving up.',
        name,
        cause,
        useless if useless >= _MAX_USELESS else in_vain,
      )
      return 1
    pause = min(_FIRST_PAUSE * 2 ** max(useless - 1, 0), _LONGEST_PAUSE)
    logging.warning('%s %s; it is started again in %.1f s.', name, cause, pause)
    end = time.monotonic() + pause
    while time.monotonic() < end:
      if gone():
        return 0
      time.sleep(0.05)


def _end(child: subprocess.Popen) -> int:
  """Asks the child to stop, then makes it."""
  end = time.monotonic() + NOTICE
  while child.poll() is None and time.monotonic() < end:
    child.terminate()  # again and again: while it still starts, it ignores it
    time.sleep(0.5)
  child.kill()
  return max(child.wait(), 0)


def _process(pid: int) -> psutil.Process | None:
  try:
    return psutil.Process(pid)
  except psutil.NoSuchProcess:
    return None


def _is_alive(process: psutil.Process | None) -> bool:
  try:
    return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
  except psutil.NoSuchProcess:
    return False


def _signal_name(number: int) -> str:
  return signal.Signals(number).name if number in set(signal.Signals) else f'signal {number}'
