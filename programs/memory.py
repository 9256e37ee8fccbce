"""The memory that the processes of a run need, and what there is for them."""

import enum
import os
from collections.abc import Iterator
from typing import NamedTuple

import psutil

from configs import schema
from data import store
from distillation.plan import ranges
from kernels import architectures, contract
from kernels.native import build
from programs import command_line

# Bytes.
_PROCESS = 2**27  # interpreter and libraries
_NETWORK = 2**28  # what XLA makes of a finite network
_DERIVATIVES = 2**28  # of a tile, at most: the native kernel keeps them
_TILES = 3 * 2**28  # what the other kernels form beside results

_LANES = 16  # images of a vector
_TEST_BATCH = 500  # images that go through a finite network at once

# Of a control group, by version: its limit, what it uses, and the prefix of those lines of
# memory.stat that count its descendants in.
_FILES = {
  1: ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_'),
  2: ('memory.max', 'memory.current', ''),
}


class Here(enum.Enum):
  """Which processes of a run share this host."""

  ALL, COORDINATOR, NOTHING = range(3)


class Needs(NamedTuple):
  """Bytes that each process needs at its peak, an estimate.

  Data on disk that are memory-mapped are not counted: the system may drop them.
  """

  coordinator: int
  worker: int
  evaluator: int

  def in_words(self) -> str:
    return (
      f'about {in_gib(self.coordinator)} GiB for the coordinator, '
      f'{in_gib(self.worker)} GiB for each worker, '
      f'{in_gib(self.evaluator)} GiB for the evaluator'
    )


def in_gib(number: int) -> str:
  return f'{number / 2**30:.1f}'


def check(
  config: schema.Config, prepared: store.Prepared, here: Here, room: int | None = None
) -> str:
  """Estimates the memory of a run, in words.

  Args:
    config: validated.
    prepared: the run's data.
    here: the processes for which this host needs memory.
    room: bytes that they may take; None: as `available` finds.

  Raises:
    BadInput: they need more.
  """
  each, workers = needs(config, prepared), config.system.num_workers
  needed = {
    Here.ALL: each.coordinator + workers * each.worker + each.evaluator,
    Here.COORDINATOR: each.coordinator,
    Here.NOTHING: 0,
  }[here]
  room = available() if room is None else room
  if needed > room:
    raise command_line.BadInput(
      f'this run needs about {in_gib(needed)} GiB of memory here ({each.in_words()}), '
      f'{in_gib(room)} GiB are available: lower run.images_per_class, run.plan.target_tile or '
      'system.num_workers, or raise run.plan.target_tiles_per_task.'
    )
  if here is not Here.ALL:
    return f'Memory: {each.in_words()}.'
  return f'Memory: about {in_gib(needed)} GiB of {in_gib(room)} GiB available.'


def needs(config: schema.Config, prepared: store.Prepared) -> Needs:
  """Estimates what the processes of a validated configuration need."""
  run, plan, settings = config.run, config.run.plan, config.system.evaluation
  height, width, channels = prepared.train_images.shape[1:]
  size = 8 if run.kernel_dtype == 'float64' else 4
  image = size * height * width * channels
  table = table_bytes(architectures.get(run.architecture), height, width, size)
  support, targets = run.images_per_class * prepared.num_classes, run.targets_per_step
  gradient, tile = 8 * support * height * width * channels, min(plan.target_tile, targets)
  is_native = run.implementation in ('native', 'auto') and build.is_built()
  derivatives = min(_DERIVATIVES, support * (tile + _LANES) * (image + table))
  tasks_a_step = len(ranges(targets, run.plan.targets_per_task))

  # The state, its optimiser's moments and the gradient; a step's pieces; K_ss and its solve.
  coordinator = _PROCESS + 10 * gradient + tasks_a_step * gradient // 2 + 6 * 8 * support**2
  # Support and gradients; blocks; tiles of targets, in work and ahead.
  worker = _PROCESS + (derivatives if is_native else _TILES) + 4 * gradient
  worker += 4 * 8 * support * tile + 3 * tile * (image + table)
  if run.method != 'label_solve' and not run.augmentation.fraction:
    worker += len(prepared.train_images) * table  # in the end, of all of them
  if run.plan.split_support(support):
    coordinator += 2 * 8 * support * targets
    worker += contract.KEPT_BYTES
  if run.method != 'kip':
    columns = support + prepared.num_classes
    rows = min(targets, run.plan.targets_per_task)
    coordinator += 8 * columns * (3 * tasks_a_step * min(rows, columns) + 6 * columns)
    worker += 3 * 8 * rows * columns

  evaluator = _PROCESS + (0 if is_native else _TILES) + 2 * gradient
  evaluator += len(prepared.test_images) * table
  evaluator += 8 * support * (3 * support + 2 * settings.krr_tile)
  if settings.nn_steps:
    network = architectures.get(settings.nn_architecture or run.architecture)
    values = settings.nn_width * (height * width if network.stages else 1)  # of a layer
    evaluator += _NETWORK + 2 * 4 * _TEST_BATCH * values
  return Needs(coordinator, worker, evaluator)


def table_bytes(
  architecture: architectures.Architecture, height: int, width: int, size: int
) -> int:
  """Bytes that a kernel keeps of an image on its own (`contract.Kernel.prepare`), at most.

  The native kernel keeps most: the variance of every convolution's ReLU input and two numbers for
  every pooled pixel, `size` bytes each, and two of the readout in float64.
  """
  values, convs = 0, sum(stage.convs for stage in architecture.stages)
  for stage in architecture.stages:
    values += stage.convs * height * width
    convs -= stage.convs
    if stage.pool:
      height, width = height // 2, width // 2
      values += 2 * height * width if convs or architecture.hidden else 0
  return size * values + 2 * 8


def available(root: str = '/') -> int:
  """Finds how many bytes this process and its children may still take: of the machine's memory, and
  of every control group they are in (`docker -m`, Slurm's `--mem`)."""
  return min([psutil.virtual_memory().available, *left_by_control_groups(root)])


def left_by_control_groups(root: str = '/') -> list[int]:
  """Finds the bytes left in each of this process's control groups that has a limit.

  Page cache counts as free. `root` is the folder that has `proc` and `sys`.
  """
  left = []
  for folder, version in _control_groups(root):
    limit, used, prefix = _FILES[version]
    try:
      room = int(_read(folder, limit)) - int(_read(folder, used))
      statistics = dict(line.split() for line in _read(folder, 'memory.stat').splitlines())
    except (OSError, ValueError):  # 'max', or no such files, as in version 2's root
      continue
    cached = [int(statistics.get(f'{prefix}{kind}_file', 0)) for kind in ('inactive', 'active')]
    left.append(max(0, room + sum(cached)))
  return left


def _control_groups(root: str) -> Iterator[tuple[str, int]]:
  """Yields (folder, version) of this process's groups that may limit memory, and of those above."""
  try:
    lines = _read(root, 'proc/self/cgroup').splitlines()
    mounts = _read(root, 'proc/self/mountinfo').splitlines()
  except OSError:
    return
  paths = {}
  for line in lines:
    _, controllers, path = line.split(':', 2)
    if not controllers:
      paths[2] = path
    elif 'memory' in controllers.split(','):
      paths[1] = path
  for line in mounts:
    mount, _, system = line.partition(' - ')
    (_, _, _, top, point), (kind, _, options) = mount.split()[:5], system.split()[:3]
    version = {'cgroup': 1, 'cgroup2': 2}.get(kind, 0)
    if version not in paths or (version == 1 and 'memory' not in options.split(',')):
      continue
    path = os.path.relpath(paths[version], top)  # a container may see its own group as the top
    folder = top = os.path.join(root, point.lstrip('/'))
    if not path.startswith('..'):
      folder = os.path.normpath(os.path.join(top, path))
    while len(folder) >= len(top):
      yield folder, version
      folder = os.path.dirname(folder)


def _read(folder: str, name: str) -> str:
  with open(os.path.join(folder, name), encoding='utf-8') as file:
    return file.read()
