"""Checks of configurations, which make a `schema.Config` of a ConfigDict."""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import ml_collections
import numpy as np

from configs import schema
from distillation import optimizers
from kernels import architectures, registry

_TARGETS = 5000  # of a step, where the set has so many: as in the papers
_ARCHITECTURES = ('run.architecture', 'system.evaluation.nn_architecture')
_SPECS = tuple(path for path, field in schema.leaves().items() if field.metadata.get('spec'))
_KINDS: dict[type, str] = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'text',
  tuple: 'a tuple of numbers',
}


class ConfigError(ValueError):
  """A configuration that cannot run; one line names the field, the value and what is allowed."""


def validate(config: Mapping[str, Any]) -> schema.Config:
  """Makes a configuration of nested dicts, after all checks that need no data.

  Raises:
    ConfigError: the first field that is wrong.
  """
  values, known = flatten(config), schema.leaves()
  for path in values:
    check_path(path)
  for path, field in known.items():
    if path not in values:
      raise ConfigError(f'{path} is missing; configs start from configs.base.get_config().')
    if path in _ARCHITECTURES:
      _check_architecture(path, values[path])
    elif not (path in _SPECS and isinstance(values[path], Mapping)) and path != 'run.optimizer':
      _check_value(path, values[path], field)
  for path, field in known.items():
    choices = field.metadata.get('choices')
    if choices and values[path] not in choices:
      raise ConfigError(f'{path} must be one of {", ".join(choices)}; got {values[path]!r}.')
  run = schema.from_dict(schema.Run, config['run'])
  if run.method == 'label_solve' and run.num_steps != 1:
    raise ConfigError(
      f'run.num_steps must be 1 where run.method is label_solve; got {run.num_steps}.'
    )
  _check_augmentation(run.augmentation)
  try:
    registry.check_variant(run.implementation, run.kernel, run.parameterization)
    optimizers.check(run.optimizer, run.learning_rate)
  except ValueError as error:
    raise ConfigError(f'run.{error}') from error
  return schema.Config(run, schema.from_dict(schema.System, config['system']))


def resolve_targets(run: schema.Run, labels: np.ndarray, num_classes: int) -> int:
  """`run.targets_per_step`, or, where that is 0, as many as the training set suggests.

  Args:
    run: validated.
    labels: of the training images, int64 [N], every class present.
    num_classes: C.
  """
  per_class = min(_TARGETS // num_classes, np.bincount(labels, minlength=num_classes).min())
  return run.targets_per_step or num_classes * max(1, int(per_class))


def validate_with_data(
  config: schema.Config, labels: np.ndarray, num_classes: int, image_shape: Sequence[int]
) -> None:
  """Checks what depends on the training set.

  Args:
    config: validated, its targets resolved.
    labels: of the training images, int64 [N].
    num_classes: C.
    image_shape: (H, W, D).

  Raises:
    ConfigError: as `validate`.
  """
  smallest = int(np.bincount(labels, minlength=num_classes).min())
  if config.run.images_per_class > smallest:
    raise ConfigError(
      f'run.images_per_class must be at most {smallest}, the images of the smallest class; '
      f'got {config.run.images_per_class}.'
    )
  targets, most = config.run.targets_per_step, smallest * num_classes
  if targets != len(labels) and (targets % num_classes or targets > most):
    raise ConfigError(
      f'run.targets_per_step must be a multiple of {num_classes} (the classes) and at most {most} '
      f'(the smallest class has {smallest} images), or {len(labels)} '
      f'(the whole training set); got {targets} (0 takes as many as suit).'
    )
  validate_image_size(config, image_shape)


def validate_image_size(config: schema.Config, image_shape: Sequence[int]) -> None:
  """Checks that images of shape (H, W, D) survive all poolings. Raises ConfigError."""
  for path in _ARCHITECTURES:
    _check_architecture(path, flatten(config.to_dict())[path], image_shape)


def check_path(path: str) -> None:
  """Raises ConfigError where `path`, such as 'run.seed', is unknown; it lists similar fields."""
  known = schema.leaves()
  is_group = any(field.startswith(f'{path}.') for field in known)
  if path in known or path.startswith(tuple(f'{spec}.' for spec in _SPECS)) or is_group:
    return
  prefix = path.rpartition('.')[0] + '.'
  siblings = [field for field in known if field.startswith(prefix)]
  near = difflib.get_close_matches(path, known, n=3) or siblings or list(known)
  raise ConfigError(f'unknown field {" ".join(path.split())}; did you mean {", ".join(near)}?')


def differences(saved: schema.Run, wanted: schema.Run) -> list[str]:
  """Differences that keep a saved run from resuming, such as ['run.seed (0 there, 1 here)'].

  `data.dir` does not matter, since the data's content is compared elsewhere; nor does `num_steps`,
  unless the last update differs from those before it.
  """
  there, here = (
    flatten({'run': json.loads(json.dumps(dataclasses.asdict(run)))}) for run in (saved, wanted)
  )
  irrelevant = {'run.data.dir'}
  if saved.method != 'kip+label_solve':
    irrelevant.add('run.num_steps')
  return [
    f'{path} ({there[path]} there, {here[path]} here)'
    for path in sorted(there)
    if there[path] != here[path] and path not in irrelevant
  ]


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """Makes {'run.seed': 0} of {'run': {'seed': 0}}.

  The dict of an architecture, an optimiser or a schedule stays whole.
  """
  flat = {}
  for key, value in config.items():
    path = prefix + key
    if isinstance(value, ml_collections.ConfigDict):
      value = value.to_dict()
    if isinstance(value, Mapping) and path not in _SPECS:
      flat.update(flatten(value, path + '.'))
    else:
      flat[path] = value
  return flat


def _check_value(path: str, value: Any, field: 'dataclasses.Field[Any]') -> None:
  """Checks a value's type, and its range."""
  kind = type(field.default)
  fits = type(value) is kind or (kind is float and _is_number(value))
  if not fits and not (kind is tuple and isinstance(value, list)):
    raise ConfigError(f'{path} must be {_KINDS[kind]}, got {value!r}.')
  if kind is tuple:
    _check_sequence(path, value, field)
  elif _is_number(value) and not _is_within(value, field):
    raise ConfigError(f'{path} must {_range_in_words(field)}, got {value}.')


def _check_sequence(path: str, values: Any, field: 'dataclasses.Field[Any]') -> None:
  """Checks a sequence: of numbers where the field has limits, else of steps."""
  if not field.metadata.keys() & {'above', 'at_least'}:
    if not all(type(value) is int and value >= 0 for value in values):
      raise ConfigError(
        f'{path} must be steps, whole numbers from 0, such as (0, 20, 100); got {tuple(values)}.'
      )
  elif not values or not all(_is_number(value) and _is_within(value, field) for value in values):
    least = 'above' if 'above' in field.metadata else 'at least'
    raise ConfigError(
      f'{path} must be one or more numbers, each {least} 0, such as (0.1, 1.0); '
      f'got {tuple(values)}.'
    )


def _is_number(value: Any) -> TypeGuard[float]:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_within(value: float, field: 'dataclasses.Field[Any]') -> bool:
  limits = field.metadata
  return (
    value > limits.get('above', -math.inf)
    and value >= limits.get('at_least', -math.inf)
    and value < limits.get('below', math.inf)
    and value <= limits.get('at_most', schema.LIMIT)
  )


def _range_in_words(field: 'dataclasses.Field[Any]') -> str:
  limits = field.metadata
  most = limits.get('at_most', schema.LIMIT)
  if 'above' in limits:
    return f'be above {limits["above"]} and at most {most}'
  if 'below' in limits:
    return f'be a part of the side, from {limits["at_least"]} to below {limits["below"]}'
  if limits['at_least'] == 1:
    return f'be a whole number from 1 to {most}'
  return f'lie between {limits["at_least"]} and {most}'


def _check_augmentation(augmentation: schema.Augmentation) -> None:
  kinds = dataclasses.asdict(augmentation)
  fraction = kinds.pop('fraction')
  if bool(fraction) != any(kinds.values()):
    names = ', '.join(f'run.augmentation.{name}' for name in kinds)
    raise ConfigError(
      f'run.augmentation.fraction={fraction} and {names} go together: '
      'set the fraction and at least one of the others, or leave all off.'
    )


def _check_architecture(path: str, value: Any, image_shape: Sequence[int] | None = None) -> None:
  if value == '' and path != 'run.architecture':
    return
  try:
    architecture = architectures.get(value)
    if image_shape:
      architecture.check_image_size(image_shape[0], image_shape[1])
  except ValueError as error:
    raise ConfigError(f'{path}: {str(error).removeprefix("architecture: ")}') from error
