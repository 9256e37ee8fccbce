"""Keeps a node alive: a light parent runs this very command again as its child, and again whenever
the child is killed.

The parent imports neither JAX nor a node, and knows nothing of Launchpad: whoever starts a node's
process (the local launcher, a scheduler) calls `is_child()`, then does the node's work or
`supervise()`s.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import psutil
from absl import logging

from programs import signals

LAUNCHER = 'KIP_LAUNCHER'  # environment: process id; a node ends when that process is gone
PARENT = 'KIP_SUPERVISOR'  # environment of a child: its parent's process id
_PIPE = 'KIP_PROGRESS'  # environment of a child: descriptor to which it reports progress
# Seconds that Launchpad gives a process to stop: a busy machine may take long to write a
# checkpoint.
LAUNCHER_NOTICE = 30
NOTICE = LAUNCHER_NOTICE - 2.0  # a child has less than its parent
_POLL = 0.05  # seconds; Event.wait can deadlock with a signal handler that sets the event
_ASK_AGAIN = 0.5  # seconds
_NOTABLE = 3  # lives in vain before each further one is remarked on
_PR_SET_PDEATHSIG = 1
_BRIEF, _LASTING = b'.', b'!'  # marks of progress
_reported: set[bytes] = set()


class Policy(NamedTuple):
  """How long a supervisor goes on starting its child.

  A life with any progress is a useful one. But what it did may be lost with it, again and again,
  where it is killed in the middle of the same step each time: hence `max_in_vain`.

  Attributes:
    max_useless: lives in a row without any progress.
    max_in_vain: lives in a row without lasting progress.
    first_pause: seconds before the child is started again; doubled after each useless life.
    longest_pause: seconds.
    notice: seconds that the child has to stop.
  """

  max_useless: int = 10
  max_in_vain: int = 100
  first_pause: float = 0.5
  longest_pause: float = 30.0
  notice: float = NOTICE


DEFAULT_POLICY = Policy()


def is_child() -> bool:
  """Tells whether this process has the node's work to do. If so, it dies with its parent from now
  on."""
  parent = os.environ.get(PARENT)
  if parent is None:
    return False
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  else:
    threading.Thread(target=_die_with, args=(int(parent),), daemon=True).start()
  if os.getppid() != int(parent):  # it died before the call
    sys.exit(1)
  return True


def _die_with(parent: int) -> None:
  """Ends this process when its parent has ended."""
  while os.getppid() == parent:
    time.sleep(_ASK_AGAIN)
  os._exit(1)


def progressed(lasting: bool = True) -> None:
  """Resets the restart backoff. `lasting`: what was done outlives this process."""
  mark = _LASTING if lasting else _BRIEF
  if _PIPE in os.environ and mark not in _reported:
    _reported.add(mark)  # once each: the pipe is read when this process has ended
    os.write(int(os.environ[_PIPE]), mark)


def supervise(name: str, stop: threading.Event, policy: Policy = DEFAULT_POLICY) -> int:
  """Runs the child until it ends by itself, or until this process is to stop.

  A child that is killed, by whatever signal, is started again, with growing pauses while it makes
  no progress. One that ends by itself, well or not, has said why.

  Args:
    name: the node's, for messages.
    stop: set when this process is to stop.
    policy: when to give up.

  Returns:
    The child's exit status; 1 if it is given up.
  """
  launcher = _launcher()
  useless = in_vain = 0

  def is_over() -> bool:
    return stop.is_set() or (LAUNCHER in os.environ and not _is_alive(launcher))

  while True:
    child, reader = _start()
    with child:
      while child.poll() is None and not is_over():
        time.sleep(_POLL)
      if is_over():
        return _end(child, policy.notice)
    marks = os.read(reader, 16)
    os.close(reader)
    useless, in_vain = 0 if marks else useless + 1, 0 if _LASTING in marks else in_vain + 1
    if child.returncode >= 0:
      return child.returncode
    cause = f'was killed by {_signal_name(-child.returncode)}'
    if useless >= policy.max_useless:
      logging.error(
        '%s %s: exited %d times without making progress; giving up.', name, cause, useless
      )
      return 1
    if in_vain >= policy.max_in_vain:
      logging.error('%s %s: exited %d times without a checkpoint; giving up.', name, cause, in_vain)
      return 1
    if in_vain >= _NOTABLE and not useless:
      logging.warning(
        'What %s did is lost: it has ended %d times in a row without a checkpoint, which it writes '
        'after the first step of a life. After %d times it is given up.',
        name,
        in_vain,
        policy.max_in_vain,
      )
    pause = min(policy.first_pause * 2 ** max(useless - 1, 0), policy.longest_pause)
    logging.warning('%s %s; it is started again in %.1f s.', name, cause, pause)
    end = time.monotonic() + pause
    while time.monotonic() < end:
      if is_over():
        return 0
      time.sleep(_POLL)


def _start() -> tuple[subprocess.Popen, int]:
  """Starts the child; returns it and the reading end of the pipe for its progress."""
  reader, writer = os.pipe()
  with signals.terminal_signals_blocked():
    child = subprocess.Popen(
      [sys.executable, *sys.orig_argv[1:]],
      pass_fds=[writer],
      env={**os.environ, PARENT: str(os.getpid()), _PIPE: str(writer)},
    )
  os.close(writer)
  return child, reader


def _end(child: subprocess.Popen, notice: float) -> int:
  """Asks the child to stop, kills it after `notice` seconds; returns its exit status, 0 if it was
  killed."""
  end = time.monotonic() + notice
  while child.poll() is None and time.monotonic() < end:
    child.terminate()  # again and again: a child that is still starting may ignore it
    time.sleep(_ASK_AGAIN)
  child.kill()
  return max(child.wait(), 0)


def _launcher() -> psutil.Process | None:
  try:
    return psutil.Process(int(os.environ[LAUNCHER])) if LAUNCHER in os.environ else None
  except psutil.NoSuchProcess:
    return None


def _is_alive(process: psutil.Process | None) -> bool:
  try:
    return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
  except psutil.NoSuchProcess:
    return False


def _signal_name(number: int) -> str:
  return signal.Signals(number).name if number in set(signal.Signals) else f'signal {number}'
