"""Runs a step without workers: computes its pieces in this process."""

from collections.abc import Sequence

import numpy as np

from configs import schema
from data import store
from distillation import inputs, pieces, plan
from distillation.step import Piece
from kernels.contract import Kernel


class InProcess:
  """A `step.Exchange` that computes a piece when it is taken."""

  def __init__(self, run: schema.Run, prepared: store.Prepared, kernel: Kernel):
    """Takes the data, with raw images where targets are augmented."""
    self._run, self._kernel = run, kernel
    self._num_support = run.images_per_class * prepared.num_classes
    self._training = inputs.Training(run, prepared, kernel)
    self._linearised = pieces.Linearisations(kernel.kept_bytes)
    self._published: dict[str, np.ndarray] = {}
    self._of_step: inputs.StepInputs | None = None

  def publish(self, name: str, value: np.ndarray) -> None:
    """Keeps an array; 'images' begins a step."""
    self._published[name] = value
    if name == 'images':  # a step begins
      self._of_step = inputs.StepInputs(self._run, self._num_support, self._kernel, self._fetch)
      self._linearised.begin(self._of_step)

  def post(self, tasks: Sequence[plan.Task]) -> None:
    """Does nothing: `take` computes."""

  def take(self, task: plan.Task) -> Piece:
    """Computes the piece of a task."""
    assert self._of_step is not None, "publish 'images' first"
    found = inputs.TaskInputs(task, self._of_step, self._training, {})
    return pieces.compute(task, self._run, self._num_support, self._kernel, found, self._linearised)

  def _fetch(self, name: str, where: tuple[slice, ...]) -> np.ndarray:
    return self._published[name][where]
