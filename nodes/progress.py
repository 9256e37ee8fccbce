"""How far a run has come: its log lines, status.json and the time it takes."""

import os
import time
from typing import Any

from absl import logging

from artifacts import run_directory
from artifacts.words import count, duration
from distillation import plan
from nodes.admission import Admission
from nodes.task_board import TaskBoard

STATUS_SECONDS = 5.0  # at most so long between two writings of status.json


class Progress:
  """What the coordinator tells of its run."""

  def __init__(
    self,
    directory: run_directory.RunDirectory,
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
      generation: counts the coordinator's lives.
      board: has counted what was computed.
      admission: knows the workers.
      num_support: `S`.
      num_training: training images.
      alive_seconds: a worker heard of within these counts as alive.
    """
    self._start = time.monotonic()
    self._directory, self._generation = directory, generation
    self._board, self._admission, self._alive_seconds = board, admission, alive_seconds
    config = directory.read_saved().config
    self._run, self._system = config.run, config.system
    self._num_support, self._num_training = num_support, num_training
    self._earlier_seconds = 0.0
    self._end: float | None = None
    self._next_log = self._next_status = 0.0
    self._reported: dict[str, Any] = {}  # by the last progress line
    self.reached = 0  # step that the run has come to
    self.reached_seconds = 0.0  # `wall_seconds` then
    self.last_row: dict[str, Any] | None = None  # of the evaluator

  def resume(self, step: int, wall_seconds: float, reached_seconds: float) -> None:
    """Goes on from a checkpoint: its step, and the seconds of earlier lives."""
    self._earlier_seconds, self.reached = wall_seconds, step
    self.reached_seconds = reached_seconds

  def resume_rounds(self, wall_seconds: float) -> None:
    """Goes on from a Label Solve's rounds, if they came after the checkpoint."""
    self._earlier_seconds = max(self._earlier_seconds, wall_seconds)

  def reach(self, step: int) -> None:
    """Records that the run has come to a step."""
    self.reached, self.reached_seconds = step, self.wall_seconds()

  def end(self) -> None:
    """Records that the last update is computed: the time that follows is none of the run's."""
    self._end, self._next_status = time.monotonic(), 0.0

  def wall_seconds(self) -> float:
    """Seconds of computing, over all lives; the wait for the last evaluation is none."""
    return self._earlier_seconds + (self._end or time.monotonic()) - self._start

  def log_joined(self, worker: str, pairs_per_second: float, implementation: str) -> None:
    """Logs a new worker, and an estimate of what is left of the run with such workers."""
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
    """Logs a Label Solve that has come to `done` training images, at `seconds` an image."""
    logging.info(
      'label solve: %d of %d training images, %.3g pairs/s, %s to go',
      done,
      self._num_training,
      self._num_support / seconds,
      duration(seconds * (self._num_training - done)),
    )

  def log_step(self, step: int, row: dict[str, Any]) -> None:
    """Logs the metrics of the state at `step` and writes status.json, every `log_seconds`."""
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
    # Label Solve's update needs no more than its metrics have taken already.
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
