"""Warns when a run makes no progress, and ends it when waiting cannot help."""

from absl import logging

from configs import schema
from nodes.admission import Admission
from nodes.errors import RunFailed, Stopped
from nodes.task_board import TaskBoard


class Escalation:
  """Decides when to warn of a silence: after some seconds, then each time it has doubled."""

  def __init__(self, seconds: float):
    """Takes the `seconds` of silence before the first warning."""
    self._seconds = self._next = seconds

  def is_due(self, silent: float) -> bool:
    """Whether a silence of so many seconds asks for a warning now; a short one starts anew."""
    if silent < self._seconds:
      self._next = self._seconds
    if silent < self._next:
      return False
    self._next = 2 * silent
    return True


class StallWatch:
  """Warns of a step without progress, at ever longer intervals, and finally ends it."""

  def __init__(self, board: TaskBoard, admission: Admission, system: schema.System, seconds: float):
    """Takes the `seconds` without a piece before the first warning."""
    self._board, self._admission, self._system = board, admission, system
    self._seconds, self._warnings = seconds, Escalation(seconds)

  def check(self, step: int) -> None:
    """Warns if the step in work has made no progress for long.

    Raises:
      RunFailed: every worker failed to start.
      Stopped: no worker has been heard of for `system.worker_timeout`.
    """
    error = self._admission.every_worker_failed()
    if error:
      raise RunFailed(f'every worker failed to start; last error: {error}')
    silent, timeout = self._board.silence(), self._system.worker_timeout
    if silent > timeout:
      raise Stopped(f'no worker has been heard of for {silent:.0f} s (system.worker_timeout)')
    stalled, missing = self._board.stall()
    if self._warnings.is_due(stalled):
      remedy = ''
      if silent > self._seconds / 2:
        remedy = (
          f'; no worker has been heard of for {silent:.0f} s: see their output, or start some; '
          f'after {timeout:.0f} s the run stops with a checkpoint'
        )
      logging.warning('step %d: no progress for %.0f s: %s%s.', step, stalled, missing, remedy)
