"""Optimisers and learning-rate schedules of a run, by optax's names and arguments."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  import optax  # below, where it is used: with JAX it takes more than a second to import

# Functions of optax whose result needs nothing but gradients and parameters.
OPTIMIZERS = (
  *('adabelief', 'adadelta', 'adafactor', 'adagrad', 'adam', 'adamax', 'adamaxw', 'adamw', 'adan'),
  *('amsgrad', 'fromage', 'lamb', 'lars', 'lion', 'nadam', 'nadamw', 'novograd'),
  *('optimistic_adam', 'optimistic_adam_v2', 'optimistic_gradient_descent', 'radam', 'rmsprop'),
  *('rprop', 'sgd', 'sign_sgd', 'signum', 'sm3', 'yogi'),
)
SCHEDULES = (
  *('constant_schedule', 'cosine_decay_schedule', 'cosine_onecycle_schedule', 'exponential_decay'),
  *('linear_onecycle_schedule', 'linear_schedule', 'piecewise_constant_schedule'),
  *('piecewise_interpolate_schedule', 'polynomial_schedule', 'sgdr_schedule'),
  *('warmup_constant_schedule', 'warmup_cosine_decay_schedule'),
  'warmup_exponential_decay_schedule',
)
_BY_STEP = 'boundaries_and_scales'  # an argument of the piecewise schedules: {step: factor}


def check(optimizer: object, learning_rate: object) -> None:
  """Raises what `make` raises; does without optax where a name and a number suffice."""
  if isinstance(learning_rate, Mapping) or optimizer not in OPTIMIZERS:
    make(optimizer, learning_rate)


def make(optimizer: object, learning_rate: object) -> 'optax.GradientTransformation':
  """Makes the optimiser, and tries it out.

  Args:
    optimizer: one of OPTIMIZERS, or {'name': 'sgd', 'momentum': 0.9} with any of its arguments but
      the learning rate.
    learning_rate: a number, or one of SCHEDULES over the steps, {'name': 'cosine_decay_schedule',
      'init_value': 0.04, 'decay_steps': 1000}.

  Raises:
    ValueError: unknown names or arguments, or arguments that do not work; one line that says which.
  """
  rate: Any = learning_rate
  if isinstance(learning_rate, Mapping):
    rate = _call('learning_rate', learning_rate, SCHEDULES)
    _check('learning_rate', lambda: np.asarray(rate(0)))
  made = _call('optimizer', optimizer, OPTIMIZERS, learning_rate=rate)
  parameters = {'images': np.ones((2, 1, 1, 1)), 'labels': np.ones((2, 2))}
  _check('optimizer', lambda: made.update(parameters, made.init(parameters), parameters))
  return made


def _call(field: str, spec: object, known: Sequence[str], **fixed: Any) -> Any:
  """Calls the function of optax that `spec` names, with its arguments and the `fixed` ones."""
  import optax

  import kernels.precision  # noqa: F401

  if not isinstance(spec, (str, Mapping)):
    raise ValueError(f'{field}: expected a name or a dict with a name and arguments, got {spec!r}.')
  arguments: dict[str, Any] = {'name': spec} if isinstance(spec, str) else dict(spec)
  name = arguments.pop('name', None)
  if name is None or name not in known:
    raise ValueError(f'{field}: unknown name {name!r}; known: {", ".join(known)}.')
  function = getattr(optax, name)
  signature = inspect.signature(function)
  try:
    if isinstance(scales := arguments.get(_BY_STEP), Mapping):  # a run's JSON makes the steps text
      arguments[_BY_STEP] = {
        int(step) if isinstance(step, str) else step: scale for step, scale in scales.items()
      }
    signature.bind(**fixed, **arguments)
    return function(**fixed, **arguments)
  except (TypeError, ValueError) as error:
    others = [parameter for parameter in signature.parameters if parameter not in fixed]
    raise ValueError(
      f'{field}: {name}: {_line(error)}; its arguments: {", ".join(others)}.'
    ) from error


def _check(field: str, use: Callable[[], Any]) -> None:
  """Raises ValueError where `use()` fails or is not finite: optax checks few arguments earlier."""
  import jax

  try:
    leaves = jax.tree.leaves(jax.device_get(use()))
    bad = [leaf for leaf in leaves if not np.isfinite(leaf).all()]
  except (TypeError, ValueError, AttributeError, KeyError) as error:
    raise ValueError(f'{field}: cannot be used for this: {_line(error)}.') from error
  if bad:
    raise ValueError(f'{field}: gives {_line(bad[0])} at step 0.')


def _line(value: Any) -> str:
  text = ' '.join(str(value).split()).rstrip('.')
  return text[:200] + '…' if len(text) > 200 else text
