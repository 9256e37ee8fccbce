"""Every field of a run's configuration: meaning, unit, default; and its validation.

`run` is all that defines the trajectory: a run directory only resumes under the same `run`;
`num_steps` may change, down to the step that is reached. `system` says how it is computed and
watched, and may change freely between lives of a run.
"""

import difflib
import json
from typing import Any, Mapping

import ml_collections

from kernels import architectures, contract, registry

# Fields that take a name or number, or a dict which stays whole.
_SPECS = (
  'run.architecture',
  'run.optimizer',
  'run.learning_rate',
  'system.evaluation.nn_architecture',
)

# Snapshots at these steps, then every 500 (K2's checkpoints).
PAPER_SNAPSHOTS = (0, 1, 2, 4, 6, 8, 12, 18, 26, 37, 54, 78, 112, 162, 233, 335, 483, 695, 1000)
_EVERY_AFTER = 500

METHODS = ('kip', 'label_solve', 'label_solve+kip', 'kip+label_solve')


class ConfigError(ValueError):
  """A configuration that cannot run; the message is one line that names the field, the value and
  what is allowed."""


def get_config() -> ml_collections.ConfigDict:
  """The defaults: KIP as published in K2, on scikit-learn's digits."""
  config = ml_collections.ConfigDict()

  run = config.run = ml_collections.ConfigDict()
  run.seed = 0  # of every random choice
  # Or 'label_solve', 'label_solve+kip', 'kip+label_solve': labels solved for by the first or the
  # last update.
  run.method = 'kip'
  run.num_steps = 1000  # updates; the one that solves for the labels counts as one
  run.images_per_class = 1  # support images of each class
  run.architecture = 'convnet'  # name (kernels/architectures.py) or dict of stages
  run.implementation = 'auto'  # of the kernel: see kernels/registry.py
  run.kernel_dtype = 'float32'  # of kernel blocks; everything else is float64
  run.kernel = 'ntk'  # or 'nngp'
  run.parameterization = 'ntk'  # of the network: or 'standard'
  # Of every hidden layer; matters to the NTK in standard parameterisation alone.
  run.standard_width = 1024
  run.ridge = 1e-6  # relative to the mean of K_ss's diagonal
  # Any of optax's, or a dict with its arguments: {'name': 'sgd', 'momentum': 0.9}.
  run.optimizer = 'adam'
  # Or an optax schedule: {'name': 'cosine_decay_schedule', 'init_value': 0.04, 'decay_steps':
  # 1000}; see kip_convnet.py.
  run.learning_rate = 0.04
  run.learn_labels = True  # move the labels with the images
  # Of the labels' learning rate to the images'; 0.1: better for finite networks (digits,
  # RESULTS.md).
  run.label_learning_rate_factor = 1.0
  # Or 'noise', a file such as distilled.npz (images, labels), or a released set's name
  # (data/released.py).
  run.initial_images = 'real'
  # Class-balanced, drawn anew each step: a multiple of the number of classes; the whole training
  # set; or 0: 5000, or as many as the set allows.
  run.targets_per_step = 0

  run.data = ml_collections.ConfigDict()
  # Digits, mnist, fashion_mnist, cifar10, cifar100, svhn_cropped, or the path of an .npz file.
  run.data.name = 'digits'
  # Folder with {train,test}.parquet or {train,test}/CLASS/IMAGE; empty: the named set itself.
  run.data.dir = ''
  # Pixels a side: the shorter side is resized (by area where it shrinks) and the middle cut out;
  # 0: images as they are.
  run.data.size = 0
  run.data.zca = False  # whiten the standardised images (the papers: for colour images)
  run.data.zca_regularisation = 0.1  # added to the covariance's diagonal, relative to its mean

  # Of target images, image by image, anew each step, before they are preprocessed; never of digits
  # flipped. The papers say which kinds they use, but no values: all are off here.
  run.augmentation = ml_collections.ConfigDict()
  run.augmentation.fraction = 0.0  # of a step's targets that are augmented; 0: none. Not published
  run.augmentation.rotation = 0.0  # at most so many degrees either way. Not published
  run.augmentation.width_shift = 0.0  # at most this part of the width either way. Not published
  run.augmentation.height_shift = 0.0  # at most this part of the height either way. Not published
  run.augmentation.horizontal_flip = False  # half of the augmented images; not for digits (K2)
  # At most this many units of the raw pixels either way. Not published.
  run.augmentation.channel_shift = 0.0

  # How a step is cut into tasks. It fixes the order of sums, so it belongs to the trajectory.
  run.plan = ml_collections.ConfigDict()
  # Support images a side of a K_ss task; with support_per_task, its rows.
  run.plan.support_tile = 50
  run.plan.target_tile = 250  # target images a kernel block
  run.plan.target_tiles_per_task = 1  # blocks summed by the worker before it answers
  # Support images of a target task; 0: all, in one pass. BUILD.md, 'How many workers'.
  run.plan.support_per_task = 0

  system = config.system = ml_collections.ConfigDict()
  system.num_workers = 0  # kernel-worker processes; 0: one a GPU, or 2 where there is none
  system.worker_threads = 0  # CPU threads of each; 0: an equal share of the machine
  system.port = 0  # of the coordinator; 0: any free one
  # No warning where the port cannot be hidden from other hosts (BUILD.md tells the risk).
  system.accept_open_port = False
  # For preprocessed data. Empty: kip in the user's cache folder, or, if that cannot be written, in
  # a temporary one.
  system.cache_dir = ''
  # Accept workers that differ in implementation, hardware or versions: other bits.
  system.allow_mixed = False
  # Steps to evaluate besides the first and the last; empty: the papers' schedule.
  system.snapshot_steps = ()
  system.checkpoint_seconds = 60.0  # at most so long between checkpoints
  system.log_seconds = 2.0  # at most so often a progress line
  # A task is given to another worker after this, or 5 times the usual time if that is longer.
  system.lease_seconds = 300.0
  # Seconds without any worker after which the run stops with a checkpoint.
  system.worker_timeout = 600.0
  # Seconds to reach the coordinator; half of it where it was there before: then start afresh.
  system.coordinator_timeout = 120.0
  system.final_evaluation_timeout = 3600.0  # seconds the finished run waits for its last evaluation

  system.evaluation = ml_collections.ConfigDict()
  system.evaluation.krr_tile = 250  # images a kernel block, of the test set and of the support
  # At the end, evaluate as many random real images beside the distilled ones.
  system.evaluation.baselines = False
  # Finite networks (K2). The papers' protocol: width 1024, 5000 updates, batches of 100,
  # learning-rate factor and L2 by a grid.
  system.evaluation.nn_steps = 1000  # updates of a finite network; 0: train none
  # Steps at which they are trained besides the first and the last.
  system.evaluation.nn_snapshots = ()
  system.evaluation.nn_architecture = ''  # as run.architecture; empty: the kernel's
  system.evaluation.nn_width = 128  # channels
  system.evaluation.nn_batch = 100  # images an update, at most the support
  system.evaluation.nn_loss = 'mse'  # or cross_entropy, with the arg-max of the labels as classes
  # Networks: their mean accuracy is reported, and the deviation of several.
  system.evaluation.nn_seeds = 1
  # Of several values the pair is taken that is best on the last 5000 training images (a tenth, if
  # that is less; one at least), never on test images.
  # Relative to 2 C n / lambda_max of the empirical NTK.
  system.evaluation.nn_learning_rate_factors = (0.1,)
  system.evaluation.nn_l2s = (1e-3,)  # weight decay: 1/2 l2 |theta|^2 in the loss
  return config


def is_snapshot(step: int, num_steps: int, chosen: tuple[int, ...]) -> bool:
  """Whether the state after `step` updates is evaluated."""
  scheduled = (
    step in chosen
    if chosen
    else step in PAPER_SNAPSHOTS or (step > PAPER_SNAPSHOTS[-1] and step % _EVERY_AFTER == 0)
  )
  return scheduled or step in (0, num_steps)


def label_solve_step(run: Mapping[str, Any]) -> int:
  """The update that is Label Solve, counted from 0; -1 where none is."""
  return {'kip': -1, 'kip+label_solve': run['num_steps'] - 1}.get(run['method'], 0)


_LIMIT = 10**9
_POSITIVE_INTS = (
  'run.num_steps',
  'run.images_per_class',
  'run.plan.support_tile',
  'run.plan.target_tile',
  'run.plan.target_tiles_per_task',
  'run.standard_width',
  'system.evaluation.krr_tile',
  'system.evaluation.nn_width',
  'system.evaluation.nn_batch',
  'system.evaluation.nn_seeds',
)
_POSITIVE_FLOATS = (
  'run.learning_rate',
  'run.label_learning_rate_factor',
  'run.ridge',
  'run.data.zca_regularisation',
  'system.checkpoint_seconds',
  'system.log_seconds',
  'system.lease_seconds',
  'system.worker_timeout',
  'system.coordinator_timeout',
  'system.final_evaluation_timeout',
)
_RANGES = {
  'run.seed': (0, 2**63 - 1),
  'run.augmentation.fraction': (0, 1),
  'run.augmentation.rotation': (0, 180),
  'run.augmentation.channel_shift': (0, _LIMIT),
  'system.num_workers': (0, _LIMIT),
  'system.worker_threads': (0, 4096),
  'system.port': (0, 65535),
  'system.evaluation.nn_steps': (0, 10**7),
  'run.plan.support_per_task': (0, _LIMIT),
  'run.targets_per_step': (0, _LIMIT),
  'run.data.size': (0, 4096),
}
_TARGETS = 5000  # a step, where the set has so many (the papers)
_ARCHITECTURES = ('run.architecture', 'system.evaluation.nn_architecture')
_GRIDS = ('system.evaluation.nn_learning_rate_factors', 'system.evaluation.nn_l2s')
_NN_LOSSES = ('mse', 'cross_entropy')


def validate(config: Mapping[str, Any]) -> None:
  """Checks all that can be checked without the data.

  Raises:
    ConfigError: for the first field that is wrong.
  """
  fields, known = flatten(config), flatten(get_config())
  for path in fields:
    check_path(path)
  for path, default in known.items():
    if path not in fields:
      raise ConfigError(f'{path} is missing; configs start from configs.base.get_config().')
    value = fields[path]
    if path in _ARCHITECTURES:
      _check_architecture(path, value)
    if (
      path in _ARCHITECTURES
      or path == 'run.optimizer'
      or path in _SPECS
      and isinstance(value, Mapping)
    ):
      continue
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if type(value) is not type(default) and not (
      isinstance(default, tuple) and isinstance(value, list)
    ):
      raise ConfigError(f'{path} must be {_kind(default)}, got {value!r}.')
    if path in _POSITIVE_INTS and not 1 <= value <= _LIMIT:
      raise ConfigError(f'{path} must be a whole number from 1 to {_LIMIT}, got {value}.')
    if path in _POSITIVE_FLOATS and not 0 < value <= _LIMIT:
      raise ConfigError(f'{path} must be above 0 and at most {_LIMIT}, got {value}.')
    if path in _RANGES and not _RANGES[path][0] <= value <= _RANGES[path][1]:
      raise ConfigError(
        f'{path} must lie between {_RANGES[path][0]} and {_RANGES[path][1]}, got {value}.'
      )
    if path in _GRIDS:
      _check_grid(path, value)
    elif isinstance(default, tuple) and not all(
      isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value
    ):
      raise ConfigError(
        f'{path} must be steps, whole numbers from 0, such as (0, 20, 100); got {tuple(value)}.'
      )
  _among('run.method', fields, METHODS)
  if fields['run.method'] == 'label_solve' and fields['run.num_steps'] != 1:
    raise ConfigError(
      f'run.num_steps must be 1 where run.method is label_solve; got {fields["run.num_steps"]}.'
    )
  _check_augmentation(fields)
  _among('run.implementation', fields, contract.IMPLEMENTATIONS)
  _among('run.kernel_dtype', fields, contract.DTYPES)
  _among('run.kernel', fields, contract.KINDS)
  _among('run.parameterization', fields, contract.PARAMETERIZATIONS)
  _among('system.evaluation.nn_loss', fields, _NN_LOSSES)
  # Here: optax takes a second to import, and every node imports this module.
  from distillation import optimizers

  try:
    registry.check_variant(
      fields['run.implementation'], fields['run.kernel'], fields['run.parameterization']
    )
    optimizers.make(fields['run.optimizer'], fields['run.learning_rate'])
  except ValueError as error:
    raise ConfigError(f'run.{error}') from error


def resolve_targets(run: Mapping[str, Any], labels, num_classes: int) -> int:
  """`run.targets_per_step`, or, where that is 0, as many as suit these data.

  Args:
    run: already validated.
    labels: int64 [N], of the training images, every class present.
    num_classes: `C`.
  """
  import numpy as np

  per_class = min(_TARGETS // num_classes, np.bincount(labels, minlength=num_classes).min())
  return run['targets_per_step'] or num_classes * max(1, int(per_class))


def validate_with_data(
  config: Mapping[str, Any], labels, num_classes: int, image_shape: tuple[int, int, int]
) -> None:
  """Checks what depends on the training set.

  Args:
    config: already validated, its targets resolved.
    labels: int64 [N], of the training images.
    num_classes: `C`.
    image_shape: `(H, W, D)`.

  Raises:
    ConfigError: as `validate`.
  """
  import numpy as np

  run = config['run']
  smallest = int(np.bincount(labels, minlength=num_classes).min())
  if run['images_per_class'] > smallest:
    raise ConfigError(
      f'run.images_per_class must be at most {smallest}, the images of the smallest class; got {run["images_per_class"]}.'
    )
  targets = run['targets_per_step']
  if targets != len(labels) and (targets % num_classes or targets > smallest * num_classes):
    raise ConfigError(
      f'run.targets_per_step must be a multiple of {num_classes} (the classes) and at most {smallest * num_classes} '
      f'(the smallest class has {smallest} images), or {len(labels)} '
      f'(the whole training set); got {targets} (0 takes as many as suit).'
    )
  validate_image_size(config, image_shape)


def validate_image_size(config: Mapping[str, Any], image_shape: tuple[int, int, int]) -> None:
  """Checks that the architectures leave something of images `(H, W, D)`. Raises ConfigError."""
  for path in _ARCHITECTURES:
    _check_architecture(path, flatten(config)[path], image_shape)


def check_path(path: str) -> None:
  """Raises ConfigError where `path`, such as 'run.seed', is no field; the message lists what it may
  have meant."""
  known = flatten(get_config())
  if (
    path in known
    or path.startswith(tuple(f'{spec}.' for spec in _SPECS))
    or any(field.startswith(path + '.') for field in known)
  ):
    return
  prefix = path.rpartition('.')[0] + '.'
  near = (
    difflib.get_close_matches(path, known, n=3)
    or [field for field in known if field.startswith(prefix)]
    or list(known)
  )
  raise ConfigError(
    f'{" ".join(path.split())} is no field of the configuration; did you mean {", ".join(near)}?'
  )


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
  """What keeps a saved run from going on: ['run.seed (0 there, 1 here)'].

  `data.dir` is only a place; `num_steps` says where to stop, and nothing of the way there, unless
  the last update is of its own kind.
  """
  saved, wanted = (
    flatten({'run': json.loads(json.dumps(config['run']))}) for config in (saved, wanted)
  )
  saved.setdefault('run.plan.support_per_task', 0)  # of runs from before it was a field
  found = []
  for path in sorted(set(saved) | set(wanted)):
    there, here = saved.get(path), wanted.get(path)
    only_where_to_stop = path == 'run.num_steps' and saved.get('run.method') != 'kip+label_solve'
    if there != here and path != 'run.data.dir' and not only_where_to_stop:
      found.append(f'{path} ({there} there, {here} here)')
  return found


def flatten(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'run': {'seed': 0}} -> {'run.seed': 0}; the dict of an architecture, an optimiser or a
  schedule stays whole."""
  flat = {}
  for key, value in config.items():
    path = prefix + key
    if isinstance(value, (Mapping, ml_collections.ConfigDict)) and path not in _SPECS:
      flat.update(flatten(value, path + '.'))
    else:
      flat[path] = value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
  return flat


def _check_augmentation(fields: Mapping[str, Any]) -> None:
  for path in ('run.augmentation.width_shift', 'run.augmentation.height_shift'):
    if not 0 <= fields[path] < 1:
      raise ConfigError(
        f'{path} must be a part of the side, from 0 to below 1, got {fields[path]}.'
      )
  kinds = [
    path
    for path in fields
    if path.startswith('run.augmentation.') and path != 'run.augmentation.fraction'
  ]
  if bool(fields['run.augmentation.fraction']) != any(fields[path] for path in kinds):
    raise ConfigError(
      f'run.augmentation.fraction={fields["run.augmentation.fraction"]} and {", ".join(kinds)} go together: '
      'set the fraction and at least one of the others, or leave all off.'
    )


def _kind(default: Any) -> str:
  return {
    bool: 'true or false',
    int: 'a whole number',
    float: 'a number',
    str: 'text',
    tuple: 'a tuple of numbers',
  }[type(default)]


def _check_architecture(
  path: str, value: Any, image_shape: tuple[int, int, int] | None = None
) -> None:
  if value == '' and path != 'run.architecture':
    return
  try:
    architecture = architectures.get(value)
    if image_shape:
      architecture.check_image_size(*image_shape[:2])
  except ValueError as error:
    raise ConfigError(f'{path}: {str(error).removeprefix("architecture: ")}') from error


def _check_grid(path: str, values: Any) -> None:
  zero = path.endswith('l2s')  # no weight decay is allowed
  numbers = [
    value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)
  ]
  if (
    not values
    or len(numbers) < len(values)
    or not all((0 < value or zero and value == 0) and value <= _LIMIT for value in numbers)
  ):
    raise ConfigError(
      f'{path} must be one or more numbers, each {"at least" if zero else "above"} 0, such as (0.1, 1.0); '
      f'got {tuple(values)}.'
    )


def _among(path: str, fields: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
  if fields[path] not in allowed:
    raise ConfigError(f'{path} must be one of {", ".join(allowed)}; got {fields[path]!r}.')
