"""Reports a run's progress: log lines, status.json, and the time it takes."""

import os
import time
from typing import Any

from absl import logging

from artifacts import run_directory
from artifacts.words import count, duration
from configs import schema
from distillation import plan
from nodes.admission import Admission
from nodes.task_board import TaskBoard

STATUS_SECONDS = 5.0  # between two writings of status.json, at most


class Progress:
  """Keeps a run's time and writes its log lines and status.json.

  Attributes:
    reached: step that the run has come to.
    reached_seconds: `wall_seconds` when it did.
    last_row: the evaluator's last row.
  """

  def __init__(
    self,
    directory: run_directory.RunDirectory,
    config: schema.Config,
    generation: int,
    board: TaskBoard,
    admission: Admission,
    num_support: int,
    num_training: int,
    alive_seconds: float,
  ):
    """
    Args:
      directory: of the run.
      config: of the run.
      generation: counts the coordinator's lives.
      board: counts what is computed.
      admission: knows the workers.
      num_support: `S`.
      num_training: training images.
      alive_seconds: a worker counts as alive for so long after it was last heard of.
    """
    self._start = time.monotonic()
    self._directory, self._generation = directory, generation
    self._board, self._admission, self._alive_seconds = board, admission, alive_seconds
    self._run, self._system = config.run, config.system
    self._num_support, self._num_training = num_support, num_training
    self._earlier_seconds = 0.0
    self._end: float | None = None
    self._next_log = self._next_status = 0.0
    self._reported: dict[str, Any] = {}  # in the last progress line
    self.reached, self.reached_seconds = 0, 0.0
    self.last_row: dict[str, Any] | None = None

  def resume(self, step: int, wall_seconds: float, reached_seconds: float) -> None:
    """Goes on from a checkpoint's step and its `wall_seconds` and `reached_seconds`."""
    self._earlier_seconds, self.reached = wall_seconds, step
    self.reached_seconds = reached_seconds

  def resume_rounds(self, wall_seconds: float) -> None:
    """Goes on from the `wall_seconds` of a Label Solve's rounds, if later than the checkpoint's."""
    self._earlier_seconds = max(self._earlier_seconds, wall_seconds)

  def reach(self, step: int) -> None:
    """Records that the run has come to a step."""
    self.reached, self.reached_seconds = step, self.wall_seconds()

  def end(self) -> None:
    """Stops the run's time, and makes status.json due: the last update is computed."""
    self._end, self._next_status = time.monotonic(), 0.0

  def wall_seconds(self) -> float:
    """Seconds of computing, over all lives, without the wait for the last evaluation."""
    return self._earlier_seconds + (self._end or time.monotonic()) - self._start

  def log_joined(self, worker: str, pairs_per_second: float, implementation: str) -> None:
    """Logs a new worker's speed, and an estimate of the run's remaining time at that speed."""
    rate, steps = pairs_per_second * self._system.num_workers, self._run.num_steps - self.reached
    estimate = 'all steps are done'
    if steps:
      pairs = self._pairs_to_go(self.reached)
      estimate = (
        f'{pairs / steps:.3g} pairs a step, about {pairs / steps / rate:.2g} s a step, '
        f'{duration(pairs / rate)} for {count(steps, "step")}'
      )
    logging.info(
      '%s joined: %.4g kernel pairs/s (%s). With %s: %s.',
      worker,
      pairs_per_second,
      implementation,
      count(self._system.num_workers, 'such worker'),
      estimate,
    )

  def log_round(self, done: int, seconds: float) -> None:
    """Logs that a Label Solve has done `done` training images, the last ones at `seconds` each."""
    logging.info(
      'label solve: %d of %d training images, %.3g pairs/s, %s to go',
      done,
      self._num_training,
      self._num_support / seconds,
      duration(seconds * (self._num_training - done)),
    )

  def log_step(self, step: int, row: dict[str, Any]) -> None:
    """Logs the metrics of a step and writes status.json, if `log_seconds` have passed."""
    num_steps = self._run.num_steps
    if time.monotonic() < self._next_log and step < num_steps:
      return
    self._next_log = time.monotonic() + self._system.log_seconds
    rate, accuracy, tested = row['kernel_pairs_per_second'], '', ''
    if 'train_accuracy' in row:
      accuracy = f', train {100 * row["train_accuracy"]:.2f} %'
    if self.last_row:
      tested = f', test {100 * self.last_row["krr_test_accuracy"]:.2f} %'
      tested += f' at step {self.last_row["step"]}'
    # A Label Solve's update has been computed along with its metrics.
    is_solved = step == self._run.label_solve_step
    seconds = self._pairs_to_go(step + is_solved) / rate
    logging.info(
      'step %d/%d: loss %.5f%s%s, %.3g pairs/s by %s, %s to go',
      step,
      num_steps,
      row['train_loss'],
      accuracy,
      tested,
      rate,
      count(len(self._admission.workers(self._alive_seconds)), 'worker'),
      duration(seconds),
    )
    self._reported = {
      'train_loss': row['train_loss'],
      'kernel_pairs_per_second': rate,
      'seconds_to_go': seconds,
    }
    self.write_status(run_directory.RUNNING, step)

  def is_status_due(self) -> bool:
    """Whether STATUS_SECONDS have passed since status.json was written."""
    return time.monotonic() >= self._next_status

  def write_status(self, state: str, step: int, **fields: Any) -> None:
    """Writes status.json: see `programs.status.read`."""
    self._next_status = time.monotonic() + STATUS_SECONDS
    is_live = state in run_directory.LIVE
    alive = self._admission.workers(self._alive_seconds) if is_live else set()
    counters = self._board.counters()
    workers = {
      name: {**counts, 'alive': name in alive} for name, counts in counters.pop('workers').items()
    }
    self._directory.write_status(
      state,
      step=step,
      num_steps=self._run.num_steps,
      generation=self._generation,
      wall_seconds=self.wall_seconds(),
      pid=os.getpid(),
      workers=workers,
      **counters,
      **self._reported,
      last_row=self.last_row,
      **fields,
    )

  def _pairs_to_go(self, step: int) -> int:
    return plan.pairs_to_go(self._run, self._num_support, self._num_training, step)
