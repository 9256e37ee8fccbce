"""Keeps a run on disk: checkpoints, Label Solve's rounds, snapshots, the distilled set."""

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from artifacts import RunDirectoryError, distilled_set, files, run_directory, snapshots
from artifacts.checkpoints import Checkpoints
from artifacts.words import count
from configs import schema
from data import DataError, store
from distillation import step
from distillation.state import LabelSolveState, SupportState
from nodes.admission import EVALUATOR, Admission
from nodes.errors import RunFailed
from nodes.progress import Progress


class Keeper:
  """Saves and restores a run in its directory; waits while the disk is full."""

  def __init__(
    self,
    directory: run_directory.RunDirectory,
    config: schema.Config,
    prepared: store.Prepared,
    progress: Progress,
    admission: Admission,
    stop: threading.Event,
    progressed: Callable[[bool], None],
    patience: files.Patience,
  ):
    """
    Args:
      directory: of the run.
      config: of the run.
      prepared: its data.
      progress: knows the time that the run has taken.
      admission: knows the workers' hardware, and is told when the last snapshot is damaged.
      stop: set when the process is to stop.
      progressed: called with True after each checkpoint.
      patience: with a disk that is full.
    """
    self._directory, self._prepared, self._progress = directory, prepared, progress
    self._admission, self._stop, self._progressed = admission, stop, progressed
    self._patience = patience
    self._config = config
    self._checkpoints = Checkpoints(directory.checkpoints)
    self._rounds: LabelSolveState | None = None
    self._damaged: set[int] = set()  # snapshots that cannot be read
    self._next_checkpoint = 0.0
    self.saved_step = -1  # of the newest checkpoint

  def restore(self, template: SupportState) -> SupportState:
    """Restores the newest checkpoint; returns `template`, the first state, where there is none."""
    restored, seen = self._checkpoints.restore(template), self._directory.read_status()
    came_to = seen['step'] if seen and seen['state'] == run_directory.RUNNING else 0
    if restored is None:
      self._progress.reach(0)
      self._progress.write_status(run_directory.RUNNING, 0)
      return template
    found, meta = restored
    self._admission.resume(meta['fingerprint'] or {})
    self.saved_step = found.step
    self._progress.resume(found.step, meta['wall_seconds'], meta['reached_seconds'])
    self._progress.write_status(run_directory.RUNNING, found.step)
    logging.info('Resuming at step %d.', found.step)
    if came_to > found.step:
      logging.warning(
        '%s that a killed coordinator had done are computed again; with a shorter '
        'system.checkpoint_seconds (now %g) fewer would be.',
        count(came_to - found.step, 'step'),
        self._config.system.checkpoint_seconds,
      )
    return found

  def is_checkpoint_due(self) -> bool:
    """Whether `system.checkpoint_seconds` have passed since the last one of this life.

    So the first step of a life is kept, however short the lives are.
    """
    return time.monotonic() >= self._next_checkpoint

  def save(self, current: SupportState) -> None:
    """Writes a checkpoint, unless the newest is of this step. Raises RunFailed."""
    if current.step != self.saved_step:
      meta = {
        'wall_seconds': self._progress.wall_seconds(),
        'reached_seconds': self._progress.reached_seconds,
        'fingerprint': self._admission.fingerprint,
      }
      self._persist(
        f'the checkpoint of step {current.step}', lambda: self._checkpoints.save(current, meta)
      )
      self.saved_step = current.step
      self._progressed(True)
      self._next_checkpoint = time.monotonic() + self._config.system.checkpoint_seconds

  def rounds(
    self, current: SupportState
  ) -> tuple[LabelSolveState, Callable[[LabelSolveState], None]]:
    """The rounds of a Label Solve that are done, and a function that saves a further one.

    Their checkpoints are in a folder named by a hash of the images; those of other images are
    removed.
    """
    name = hashlib.sha256(current.images.tobytes()).hexdigest()[:16]
    folder = os.path.join(self._directory.label_solve, name)
    os.makedirs(folder, exist_ok=True)
    for other in os.listdir(self._directory.label_solve):
      if other != name:
        shutil.rmtree(os.path.join(self._directory.label_solve, other), ignore_errors=True)
    checkpoints = Checkpoints(folder)

    if self._rounds is None:
      self._rounds = step.no_rounds(current)
      restored = checkpoints.restore(self._rounds)
      if restored:
        self._rounds, meta = restored
        self._progress.resume_rounds(meta['wall_seconds'])
    began = time.monotonic()

    def keep(rounds: LabelSolveState) -> None:
      nonlocal began
      self._rounds, size = rounds, self._config.run.targets_per_step
      first = (rounds.rounds - 1) * size
      last = min(first + size, len(self._prepared.train_images))
      meta = {'wall_seconds': self._progress.wall_seconds()}
      self._persist(
        f'the checkpoint of {last} training images', lambda: checkpoints.save(rounds, meta)
      )
      self._progressed(True)
      self._progress.log_round(last, (time.monotonic() - began) / (last - first))
      began = time.monotonic()

    return self._rounds, keep

  def write_snapshot(self, current: SupportState, row: dict[str, Any]) -> None:
    """Writes a state for the evaluator, and the last one as the distilled set. Raises RunFailed."""
    images, labels = current.images.astype(np.float32), current.labels.astype(np.float32)
    if current.step == self._config.run.num_steps:
      path, config = self._directory.distilled, self._config
      self._persist(
        path, lambda: distilled_set.save(path, images, labels, current.step, config, self._prepared)
      )
    self._persist(
      self._directory.snapshot(current.step),
      lambda: snapshots.write(self._directory, current.step, images, labels, row),
    )

  def snapshots_to_evaluate(self) -> list[int]:
    """Steps of the snapshots that are there and not known to be damaged."""
    return [
      number
      for number in snapshots.steps(self._directory)
      if number <= self._config.run.num_steps and number not in self._damaged
    ]

  def read_snapshot(self, number: int) -> dict[str, Any] | None:
    """The snapshot of step `number`; None, after a warning, where it is damaged."""
    final = number == self._config.run.num_steps
    try:
      snapshot = snapshots.read(self._directory, number)
    except DataError as error:
      message = f'{error}; it is not evaluated.'
      logging.warning(message)
      self._damaged.add(number)
      if final:
        self._admission.report_unusable(EVALUATOR, message)
      return None
    return {
      'step': number,
      'images': snapshot.images,
      'labels': snapshot.labels,
      'metrics': json.dumps(snapshot.metrics),
      'final': final,
    }

  def _persist(self, what: str, write: Callable[[], None]) -> None:
    """Writes, trying again for a while: somebody may make room on a full disk. Raises RunFailed."""
    try:
      files.persist(what, write, self._stop, self._patience)
    except RunDirectoryError as error:
      raise RunFailed(
        f'{error} Mend that, and the same command goes on from the last checkpoint, '
        f'of step {self.saved_step}.'
      ) from error
