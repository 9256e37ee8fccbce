"""What a run has come to: the support set and the optimiser's state, and how a gradient moves
them."""

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
  """The run has left the numbers; one line says what to change."""


class SupportState(NamedTuple):
  """All that a step changes.

  Attributes:
    step: updates made.
    images: [S, H, W, D], preprocessed space.
    labels: [S, C].
    optimizer: optax's state, NumPy arrays in its own structure.
  """

  step: int
  images: Float64[np.ndarray, 'S H W D']
  labels: Float64[np.ndarray, 'S C']
  optimizer: Any


class LabelSolveState(NamedTuple):
  """How far a Label Solve has come over the training set.

  Attributes:
    rounds: of `targets_per_step` training images each, done.
    factor: R of their rows of [K_ts, y_t], [S + C, S + C].
  """

  rounds: int
  factor: Float64[np.ndarray, 'SC SC']

  @property
  def step(self) -> int:
    """What checkpoints count."""
    return self.rounds


class Gradient(NamedTuple):
  """Gradient of the loss by the support set."""

  images: Float64[np.ndarray, 'S H W D']
  labels: Float64[np.ndarray, 'S C']


def initial(
  run: schema.Run,
  prepared: store.Prepared,
  optimizer: optax.GradientTransformation,
  cache: str = '',
) -> SupportState:
  """The state at step 0; `cache` is the folder that keeps released sets. Raises DataError."""
  images, labels = initial_support.make(run, prepared, cache)
  state = SupportState(0, images, labels, None)
  return state._replace(optimizer=jax.device_get(optimizer.init(_learned(run, state))))


class Update:
  """Moves a state against a gradient, by the run's optimiser."""

  def __init__(self, run: schema.Run, optimizer: optax.GradientTransformation):
    self._run = run
    self._optimizer: Any = optimizer
    self._compiled = jax.jit(self._traced)

  def __call__(self, state: SupportState, gradient: Gradient) -> SupportState:
    """The next state. Raises Diverged."""
    arguments = _learned(self._run, gradient), state.optimizer, _learned(self._run, state)
    # On the CPU also in a process whose kernels are on a GPU.
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
      moved, optimizer, is_finite = jax.device_get(self._compiled(*arguments))
    for name in moved:
      if not is_finite[name]:
        raise Diverged(_NAN.format(name))
    return state._replace(step=state.step + 1, optimizer=optimizer, **moved)

  def _traced(self, gradients: dict[str, Any], optimizer: Any, parameters: dict[str, Any]) -> Any:
    """Parameters and the optimiser's state after an update, and which parameters are finite.

    All in one function, because its compiled form goes over memory once.
    """
    factors = {'images': 1.0, 'labels': self._run.label_learning_rate_factor}
    updates, optimizer = self._optimizer.update(gradients, optimizer, parameters)
    moved = {name: value + factors[name] * updates[name] for name, value in parameters.items()}
    return moved, optimizer, {name: jnp.isfinite(value).all() for name, value in moved.items()}


def _learned(run: schema.Run, of: SupportState | Gradient) -> dict[str, np.ndarray]:
  """The parts that the optimiser moves."""
  return {'images': of.images, 'labels': of.labels} if run.learn_labels else {'images': of.images}
