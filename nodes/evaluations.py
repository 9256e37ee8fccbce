"""The coordinator's side of evaluation: which snapshot is next, and when to stop waiting."""

import json
import threading
import time
from collections.abc import Container
from typing import Any

from absl import logging

from artifacts import run_directory
from configs import schema
from nodes.admission import EVALUATOR, Admission
from nodes.errors import RunFailed, Stopped
from nodes.keeper import Keeper
from nodes.progress import Progress
from nodes.stall import Escalation

_MAX_ROW = 2**16  # characters


class Evaluations:
  """Hands snapshots out, takes note of rows, and waits for the last one."""

  def __init__(
    self,
    directory: run_directory.RunDirectory,
    config: schema.Config,
    keeper: Keeper,
    progress: Progress,
    admission: Admission,
    stop: threading.Event,
    poll: float,
    stall: float,
  ):
    """Waits for nothing before `wait` is called.

    Args:
      directory: of the run.
      config: of the run.
      keeper: reads snapshots.
      progress: records the last row.
      admission: knows whether the evaluator is alive.
      stop: set when the process is to stop.
      poll: seconds between two looks.
      stall: seconds of the evaluator's silence before a warning is logged.
    """
    self._directory, self._keeper, self._progress = directory, keeper, progress
    self._admission, self._stop, self._poll, self._stall = admission, stop, poll, stall
    self._num_steps, self._system = config.run.num_steps, config.system
    self._finished = threading.Event()

  def next(self, done: Container[int]) -> dict[str, Any] | None:
    """The first snapshot (`Keeper.read_snapshot`) whose step is not in `done`, if there is one."""
    for number in self._keeper.snapshots_to_evaluate():
      if number not in done and (snapshot := self._keeper.read_snapshot(number)) is not None:
        return snapshot
    if self._num_steps in done:
      self._finished.set()
    return None

  def record(self, content: str) -> None:
    """Records a row (JSON) that the evaluator has written. Raises ValueError where it is none."""
    row = json.loads(content) if len(content) <= _MAX_ROW else None
    if (
      not isinstance(row, dict)
      or not isinstance(row.get('step'), int)
      or not isinstance(row.get('krr_test_accuracy'), float)
    ):
      raise ValueError(f'{content[:80]!r} is no row of metrics')
    self._progress.last_row = row
    if row['step'] == self._num_steps:
      self._finished.set()

  def wait(self) -> None:
    """Waits for the last row as long as the evaluator is alive; the set is exported already.

    Raises Stopped, and RunFailed where the evaluation has failed.
    """
    began, timeout = time.monotonic(), self._system.final_evaluation_timeout
    warnings = Escalation(self._stall)
    while not self._finished.wait(self._poll):
      if self._progress.is_status_due():
        self._write_status()
      if self._stop.is_set():
        raise Stopped()
      error = self._admission.unusable(EVALUATOR)
      if error:
        raise RunFailed(
          f'the set is distilled ({self._directory.distilled}), but its evaluation failed: {error}'
        )
      silent = self._admission.silence(EVALUATOR)
      if warnings.is_due(silent):
        logging.warning(
          'Waiting for the last evaluation; the evaluator has not been heard of for %.0f s.', silent
        )
      if silent > self._system.worker_timeout:
        logging.warning(
          'The evaluator has not been heard of for %.0f s (system.worker_timeout): '
          'ending without %s.',
          silent,
          self._missing(),
        )
        return
      if time.monotonic() > began + timeout:
        logging.warning(
          'Ending without %s after %.0f s (system.final_evaluation_timeout).',
          self._missing(),
          timeout,
        )
        return

  def _write_status(self) -> None:
    due = self._keeper.snapshots_to_evaluate()
    self._progress.write_status(
      run_directory.EVALUATING,
      self._progress.reached,
      evaluated=len(self._steps().intersection(due)),
      to_evaluate=len(due),
    )

  def _missing(self) -> str:
    """Names what the evaluator has not finished: it writes the row first."""
    is_there = self._num_steps in self._steps()
    return 'the baselines or the report' if is_there else 'the last evaluation'

  def _steps(self) -> set[int]:
    """Steps that metrics.jsonl has rows of."""
    return {row['step'] for row in self._directory.read_metrics()}
