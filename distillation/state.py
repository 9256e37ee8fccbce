"""The state of a run: support set and optimiser, and the update that a gradient makes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float64

import kernels.precision  # noqa: F401
from configs import schema
from data import store
from distillation import initial_support

_NAN = 'the update makes the {} NaN or infinite; lower run.learning_rate.'


class Diverged(ArithmeticError):
  """The run diverges; the message is one line that says what to change."""


class SupportState(NamedTuple):
  """The state of KIP between two steps.

  Attributes:
    step: updates made.
    images: of the support set, in preprocessed space.
    labels: of the support set.
    optimizer: optax's state, NumPy arrays in its own structure.
  """

  step: int
  images: Float64[np.ndarray, 'S H W D']
  labels: Float64[np.ndarray, 'S C']
  optimizer: Any


class LabelSolveState(NamedTuple):
  """The state of a Label Solve between two rounds over the training set.

  Attributes:
    rounds: done, of `targets_per_step` training images each.
    factor: R of their rows of [K_ts, y_t], [S + C, S + C].
  """

  rounds: int
  factor: Float64[np.ndarray, 'S+C S+C']

  @property
  def step(self) -> int:
    """The number by which checkpoints are named."""
    return self.rounds


class Gradient(NamedTuple):
  """The gradient of the loss with respect to the support set."""

  images: Float64[np.ndarray, 'S H W D']
  labels: Float64[np.ndarray, 'S C']


def initial(
  run: schema.Run,
  prepared: store.Prepared,
  optimizer: optax.GradientTransformation,
  cache: str = '',
) -> SupportState:
  """Makes the state at step 0; `cache` is the folder of released sets. Raises DataError."""
  images, labels = initial_support.make(run, prepared, cache)
  state = SupportState(0, images, labels, None)
  return state._replace(optimizer=jax.device_get(optimizer.init(_learned(run, state))))


class Update:
  """The update of a state by the run's optimiser."""

  def __init__(self, run: schema.Run, optimizer: optax.GradientTransformation):
    self._run = run
    self._optimizer: Any = optimizer
    self._compiled = jax.jit(self._traced)

  def __call__(self, state: SupportState, gradient: Gradient) -> SupportState:
    """Returns the next state. Raises Diverged where it is not finite."""
    arguments = _learned(self._run, gradient), state.optimizer, _learned(self._run, state)
    # On the CPU, also in a process whose kernels are on a GPU.
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
      moved, optimizer, is_finite = jax.device_get(self._compiled(*arguments))
    for name in moved:
      if not is_finite[name]:
        raise Diverged(_NAN.format(name))
    return state._replace(step=state.step + 1, optimizer=optimizer, **moved)

  def _traced(self, gradients: dict[str, Any], optimizer: Any, parameters: dict[str, Any]) -> Any:
    """Returns the next parameters and optimiser's state, and which of the parameters are finite.

    All of it is compiled together, so that memory is read once.
    """
    factors = {'images': 1.0, 'labels': self._run.label_learning_rate_factor}
    updates, optimizer = self._optimizer.update(gradients, optimizer, parameters)
    moved = {name: value + factors[name] * updates[name] for name, value in parameters.items()}
    return moved, optimizer, {name: jnp.isfinite(value).all() for name, value in moved.items()}


def _learned(run: schema.Run, value: SupportState | Gradient) -> dict[str, np.ndarray]:
  """The arrays that the optimiser moves, or their gradients, by name."""
  return {'images': value.images, **({'labels': value.labels} if run.learn_labels else {})}
