"""Every field of a run's configuration: default, unit, allowed values, meaning.

`Run` defines the trajectory: a run directory resumes under the same `run` only, except that
`num_steps` may change, down to the step that is reached. `System` says how the run is computed and
watched, and may change whenever the run is started again.

Configuration files hold the same fields in a ConfigDict (configs/base.py), of which
`validation.validate` makes a `Config`; docs/configuration.md lists them (configs/reference.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from kernels import contract

METHODS = ('kip', 'label_solve', 'label_solve+kip', 'kip+label_solve')
NN_LOSSES = ('mse', 'cross_entropy')

# Snapshots at these steps, then every 500: the checkpoints of Nguyen et al. 2021b (NeurIPS,
# https://arxiv.org/abs/2107.13034).
PAPER_SNAPSHOTS = (0, 1, 2, 4, 6, 8, 12, 18, 26, 37, 54, 78, 112, 162, 233, 335, 483, 695, 1000)
_EVERY_AFTER = 500

LIMIT = 10**9

# A name, or a dict that stays whole.
Spec = str | Mapping[str, Any]


def _field(default: Any, doc: str, **limits: Any) -> Any:
  """A field with its documentation and what `validation` checks.

  Args:
    default: its type is that of all values.
    doc: meaning and unit.
    **limits: `above`, `at_least`, `at_most`, `below` for a number, or for each of several;
      `choices`; `spec=True` where a dict may stand in place of a name or number.
  """
  return dataclasses.field(default=default, metadata={'doc': doc, **limits})


def _count(default: int, doc: str) -> Any:
  return _field(default, doc, at_least=1)


def _seconds(default: float, doc: str) -> Any:
  return _field(default, doc, above=0)


@dataclasses.dataclass(frozen=True)
class Data:
  """The data set and its preprocessing."""

  name: str = _field(
    'digits',
    'digits, mnist, fashion_mnist, cifar10, cifar100, svhn_cropped, or the path of an .npz file.',
  )
  dir: str = _field(
    '', 'Folder with {train,test}.parquet or {train,test}/CLASS/IMAGE; empty: the set by its name.'
  )
  size: int = _field(
    0,
    'Pixels a side: the shorter side is resized to it (by area where it shrinks), the middle cut '
    'out; 0: images as they are.',
    at_least=0,
    at_most=4096,
  )
  zca: bool = _field(False, 'Whiten the standardised images, as the papers do for colour images.')
  zca_regularisation: float = _field(
    0.1, "Added to the covariance's diagonal, relative to its mean.", above=0
  )


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Random changes of target images, drawn anew for each image and step, before preprocessing.

  The papers say which kinds they use, but publish no values: all are off by default.
  """

  fraction: float = _field(
    0.0, "Part of a step's targets to augment; 0: none.", at_least=0, at_most=1
  )
  rotation: float = _field(0.0, 'Greatest rotation either way, degrees.', at_least=0, at_most=180)
  width_shift: float = _field(
    0.0, 'Greatest shift either way, as a part of the width.', at_least=0, below=1
  )
  height_shift: float = _field(
    0.0, 'Greatest shift either way, as a part of the height.', at_least=0, below=1
  )
  horizontal_flip: bool = _field(False, 'Flip half of the augmented images; not for digits.')
  channel_shift: float = _field(
    0.0, 'Greatest shift of a channel either way, in units of raw pixels.', at_least=0
  )

  @property
  def is_on(self) -> bool:
    """Whether any target is augmented."""
    return self.fraction > 0


@dataclasses.dataclass(frozen=True)
class Plan:
  """Division of a step into tasks. It fixes the order of sums, so it belongs to the trajectory."""

  support_tile: int = _count(
    50, 'Support images on each side of a K_ss task; with support_per_task, its rows.'
  )
  target_tile: int = _count(250, 'Target images in a kernel block.')
  target_tiles_per_task: int = _count(1, 'Blocks that a worker sums for one answer.')
  support_per_task: int = _field(
    0, 'Support images in a target task; 0: all, in one pass. See docs/sizing.md.', at_least=0
  )

  @property
  def targets_per_task(self) -> int:
    """Target images in a task; the last one may have fewer."""
    return self.target_tile * self.target_tiles_per_task

  def split_support(self, num_support: int) -> int:
    """Support images in a target task where a step has two halves; 0 where it has one pass."""
    return self.support_per_task if self.support_per_task < num_support else 0


@dataclasses.dataclass(frozen=True)
class Run:
  """Settings that define the trajectory of a run."""

  seed: int = _field(0, 'Seed of every random choice.', at_least=0, at_most=2**63 - 1)
  method: str = _field(
    'kip',
    'KIP; Label Solve, in one update; or both, the labels being solved for by the first or by the '
    'last update.',
    choices=METHODS,
  )
  num_steps: int = _count(1000, 'Updates, that of Label Solve included.')
  images_per_class: int = _count(1, 'Support images of each class.')
  architecture: Spec = _field(
    'convnet', 'Name or dict of stages, as in kernels/architectures.py.', spec=True
  )
  implementation: str = _field(
    'auto',
    'Implementation of the kernel: see kernels/registry.py.',
    choices=contract.IMPLEMENTATIONS,
  )
  kernel_dtype: str = _field(
    'float32', 'Precision of kernel blocks; everything else is float64.', choices=contract.DTYPES
  )
  kernel: str = _field('ntk', 'Neural tangent kernel, or NNGP.', choices=contract.KINDS)
  parameterization: str = _field(
    'ntk', 'Parameterisation of the network.', choices=contract.PARAMETERIZATIONS
  )
  standard_width: int = _count(
    1024, 'Width of all hidden layers; matters to the NTK in standard parameterisation alone.'
  )
  ridge: float = _field(1e-6, "Added to K_ss's diagonal, relative to its mean.", above=0)
  optimizer: Spec = _field(
    'adam',
    'Name of an optax optimiser (distillation/optimizers.py), or a dict with its arguments: '
    "{'name': 'sgd', 'momentum': 0.9}.",
    spec=True,
  )
  learning_rate: float | Mapping[str, Any] = _field(
    0.04,
    "Number, or an optax schedule: {'name': 'cosine_decay_schedule', 'init_value': 0.04, "
    "'decay_steps': 1000}; see configs/kip_convnet.py.",
    above=0,
    spec=True,
  )
  learn_labels: bool = _field(True, 'Move the labels with the images.')
  label_learning_rate_factor: float = _field(
    1.0,
    "Ratio of the labels' learning rate to the images'; 0.1 is better for finite networks (digits, "
    'RESULTS.md).',
    above=0,
  )
  initial_images: str = _field(
    'real',
    "real, noise, a file such as distilled.npz (images, labels), or a released set's name "
    '(data/released.py).',
  )
  targets_per_step: int = _field(
    0,
    'Target images, class-balanced and drawn anew each step: a multiple of the number of classes; '
    'the whole training set; or 0: 5000, or as many as the set allows.',
    at_least=0,
  )
  data: Data = Data()
  augmentation: Augmentation = Augmentation()
  plan: Plan = Plan()

  @property
  def label_solve_step(self) -> int:
    """The update that is Label Solve, counted from 0; -1 where none is."""
    return {'kip': -1, 'kip+label_solve': self.num_steps - 1}.get(self.method, 0)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Evaluation of snapshots.

  Finite networks follow Nguyen et al. 2021b (https://arxiv.org/abs/2107.13034), whose protocol is:
  width 1024, 5000 updates, batches of 100, learning-rate factor and L2 by a grid.
  """

  krr_tile: int = _count(250, 'Images in a kernel block, of the test set and of the support.')
  baselines: bool = _field(False, 'At the end, evaluate as many random real images too.')
  nn_steps: int = _field(
    1000, 'Updates of a finite network; 0: train none.', at_least=0, at_most=10**7
  )
  nn_snapshots: tuple[int, ...] = _field(
    (), 'Steps at which networks are trained, besides the first and the last.'
  )
  nn_architecture: Spec = _field(
    '', "Finite network, as run.architecture; empty: the kernel's.", spec=True
  )
  nn_width: int = _count(128, 'Channels of every layer.')
  nn_batch: int = _count(100, 'Images in an update; at most the support.')
  nn_loss: str = _field(
    'mse', 'Loss; cross_entropy takes the arg-max of the labels as classes.', choices=NN_LOSSES
  )
  nn_seeds: int = _count(
    1, 'Networks to train; mean and standard deviation of their accuracies are reported.'
  )
  nn_learning_rate_factors: tuple[float, ...] = _field(
    (0.1,),
    'Learning rates relative to 2 C n / lambda_max of the empirical NTK. Of several values here '
    'and in nn_l2s, the pair is taken that is best on the last 5000 training images (or a tenth, '
    'if that is less; at least one), never on test images.',
    above=0,
  )
  nn_l2s: tuple[float, ...] = _field(
    (1e-3,), 'Weight decay: 1/2 l2 |theta|^2 in the loss.', at_least=0
  )


@dataclasses.dataclass(frozen=True)
class System:
  """Settings of how a run is computed and watched."""

  num_workers: int = _field(
    0, 'Kernel-worker processes; 0: one for each GPU, or 2 without a GPU.', at_least=0
  )
  worker_threads: int = _field(
    0, 'CPU threads of each worker; 0: an equal share of the machine.', at_least=0, at_most=4096
  )
  port: int = _field(
    0,
    'Port of the coordinator where a run is on several hosts; 0: any free one. On one host it has '
    'none.',
    at_least=0,
    at_most=65535,
  )
  cache_dir: str = _field(
    '',
    "Folder for preprocessed data; empty: kip in the user's cache folder or, if that cannot be "
    'written, in a temporary one.',
  )
  allow_mixed: bool = _field(
    False,
    'Accept workers that differ in implementation, hardware or versions; results are then not '
    'reproducible to the bit.',
  )
  snapshot_steps: tuple[int, ...] = _field(
    (), "Steps to evaluate besides the first and the last; empty: the papers' schedule."
  )
  checkpoint_seconds: float = _seconds(60.0, 'Longest time between checkpoints, seconds.')
  log_seconds: float = _seconds(2.0, 'Shortest time between progress lines, seconds.')
  lease_seconds: float = _seconds(
    300.0,
    'Time after which a task is given to another worker, seconds; or 5 times the usual time of a '
    'task, if that is longer.',
  )
  worker_timeout: float = _seconds(
    600.0,
    'Time without any worker after which the run stops with a checkpoint, and without the '
    'coordinator after which a worker or the evaluator gives up, seconds.',
  )
  final_evaluation_timeout: float = _seconds(
    3600.0, 'Time that a finished run waits for its last evaluation, seconds.'
  )
  evaluation: Evaluation = Evaluation()

  def is_snapshot(self, step: int, num_steps: int) -> bool:
    """Whether the state after `step` of `num_steps` updates is evaluated."""
    if self.snapshot_steps:
      scheduled = step in self.snapshot_steps
    else:
      last = PAPER_SNAPSHOTS[-1]
      scheduled = step in PAPER_SNAPSHOTS or (step > last and step % _EVERY_AFTER == 0)
    return scheduled or step in (0, num_steps)


@dataclasses.dataclass(frozen=True)
class Config:
  """Configuration of a run."""

  run: Run = Run()
  system: System = System()

  def to_dict(self) -> dict[str, Any]:
    """Nested dicts of plain values, as in config.json."""
    return dataclasses.asdict(self)


_T = TypeVar('_T')


def from_dict(kind: type[_T], values: Mapping[str, Any]) -> _T:
  """An instance of a class of this module from nested dicts, such as `Config.to_dict` gives.

  Lists become tuples; a field that is missing has its default; unknown ones raise TypeError.
  """
  known = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
  fields = dict(values)
  for name, value in fields.items():
    default = known[name].default if name in known else None
    if dataclasses.is_dataclass(default):
      fields[name] = from_dict(type(default), value)
    elif isinstance(default, tuple):
      fields[name] = tuple(value)
  return kind(**fields)


def leaves(group: Any = Config(), prefix: str = '') -> dict[str, 'dataclasses.Field[Any]']:
  """Every field by its path, such as 'run.plan.target_tile', in order."""
  found = {}
  for field in dataclasses.fields(group):
    path = prefix + field.name
    if dataclasses.is_dataclass(field.default):
      found.update(leaves(field.default, f'{path}.'))
    else:
      found[path] = field
  return found
