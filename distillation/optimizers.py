"""The optimiser of a run, by optax's own names and arguments."""

import functools
import inspect
import types
from typing import Any, Callable, Mapping

import jax
import numpy as np
import optax

import kernels.precision  # noqa: F401

Spec = str | Mapping[str, Any]


def make(optimizer: Spec, learning_rate: float | Mapping[str, Any]) -> optax.GradientTransformation:
  """An optax optimiser that needs nothing but gradients and parameters.

  Args:
    optimizer: a name such as 'adam', or {'name': 'sgd', 'momentum': 0.9} with any of its arguments
      but the learning rate.
    learning_rate: a number, or an optax schedule {'name': 'cosine_decay_schedule', 'init_value':
      0.04, 'decay_steps': 1000} over the steps.

  Raises:
    ValueError: unknown names or arguments, or arguments that do not work; one line that says which.
  """
  rate = learning_rate
  if isinstance(learning_rate, Mapping):
    rate = _call('learning_rate', learning_rate, _schedules())
    _check('learning_rate', lambda: np.asarray(rate(0)))
  made = _call('optimizer', optimizer, _optimizers(), learning_rate=rate)
  parameters = {'images': np.ones((2, 1, 1, 1)), 'labels': np.ones((2, 2))}
  _check('optimizer', lambda: made.update(parameters, made.init(parameters), parameters))
  return made


def _call(field: str, spec: Spec, known: Mapping[str, Callable], **fixed: Any) -> Any:
  if not isinstance(spec, (str, Mapping)):
    raise ValueError(f'{field}: expected a name or a dict with a name and arguments, got {spec!r}.')
  arguments = {'name': spec} if isinstance(spec, str) else dict(spec)
  name = arguments.pop('name', None)
  if name not in known:
    raise ValueError(f'{field}: no {name!r} in optax; known: {", ".join(known)}.')
  # JSON knows neither tuples nor whole numbers as keys: {100: 0.5} comes back from a run directory
  # as {'100': 0.5}.
  arguments = {
    key: {int(k): v for k, v in value.items()}
    if isinstance(value, Mapping) and all(str(k).isdigit() for k in value)
    else value
    for key, value in arguments.items()
  }
  signature = inspect.signature(known[name])
  try:
    signature.bind(**fixed, **arguments)
    return known[name](**fixed, **arguments)
  except (TypeError, ValueError) as error:
    others = [parameter for parameter in signature.parameters if parameter not in fixed]
    raise ValueError(
      f'{field}: {name}: {_line(error)}; its arguments: {", ".join(others)}.'
    ) from error


def _check(field: str, use: Callable[[], Any]) -> None:
  """Tries it out, because optax looks at few arguments before they are used."""
  try:
    leaves = jax.tree.leaves(jax.device_get(use()))
    bad = [leaf for leaf in leaves if not np.isfinite(leaf).all()]
  except (TypeError, ValueError, AttributeError, KeyError) as error:
    raise ValueError(f'{field}: cannot be used for this: {_line(error)}.') from error
  if bad:
    raise ValueError(f'{field}: gives {_line(bad[0])} at step 0.')


def _optimizers() -> dict[str, Callable]:
  functions = {
    name: value
    for name, value in vars(optax).items()
    if isinstance(value, (types.FunctionType, functools.partial))
    and not name.startswith(('_', 'scale_by'))
  }
  return {
    name: value
    for name, value in functions.items()
    if next(iter(inspect.signature(value).parameters), '') == 'learning_rate'
  }


def _schedules() -> dict[str, Callable]:
  names = [
    name
    for name in dir(optax.schedules)
    if name.endswith('_schedule') and not name.startswith(('_', 'join'))
  ]
  return {name: getattr(optax, name) for name in (*names, 'exponential_decay')}


def _line(value: Any) -> str:
  text = ' '.join(str(value).split()).rstrip('.')
  return text[:200] + '…' if len(text) > 200 else text
