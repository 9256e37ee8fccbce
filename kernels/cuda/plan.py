"""The CUDA source for one architecture, image shape and dtype.

It is one text: a plan of constants, then the files of `src`.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from kernels import architectures

_SOURCES = pathlib.Path(__file__).parent / 'src'
_COEFFICIENTS = _SOURCES.parents[1] / 'native' / 'src' / 'arc_cosine_coefficients.h'

THREADS = 512  # At most, in a block.
_WARP = 32
_RESERVED_BYTES = 1024  # Of a processor's shared memory, for each of its blocks.
# Threads that are to be resident on a processor (in float32), which bounds the registers of each.
# On an H100 more of them, 1024 and 768, take as long.
_RESIDENT = {'kForwardBlocks': 768, 'kBackwardBlocks': 512}


@dataclasses.dataclass(frozen=True)
class Level:
  """One resolution, as `Level` in the source, whose fields these are in this order.

  It holds all convolutions between two poolings, on the offsets |dy| <= radius_y, |dx| <= radius_x.

  Attributes:
    has_ntk: whether a convolution lies before this level: the NTK is zero until then.
    distances: whether a ReLU lies here or after: covariances are then half squared distances.
    deviations, halves: where the level's part of an image's table starts.
    sigma: where the level's part of a pair's derivatives starts.
    band: where the values entering the level start in a block's workspace. Each group of the level
      before has a part there, of which the first becomes their sum.
    rows: of the patch, 2 pixels wide, that a thread owns.
    stride: from the even columns of an exchanged row to the odd ones, and from those to the next
      row.
    groups: of threads, each at an offset of its own: more than one where a plane has too few
      patches for all threads.
    members: threads of a group.
  """

  height: int
  width: int
  convs: int
  radius_y: int
  radius_x: int
  has_ntk: bool
  distances: bool
  deviations: int
  halves: int
  sigma: int
  band: int
  rows: int
  stride: int
  groups: int
  members: int

  @property
  def plane(self) -> int:
    return plane_size(self.height, self.width)

  @property
  def offsets(self) -> int:
    return (2 * self.radius_y + 1) * (2 * self.radius_x + 1)

  @property
  def exchange(self) -> int:
    """Numbers in the planes through which threads see their neighbours' values."""
    rows = -(-self.height // self.rows) * self.rows + 2
    return self.groups * 6 * rows * 2 * self.stride


@dataclasses.dataclass(frozen=True)
class Plan:
  """A source, and the sizes that the host needs to launch its kernels.

  Attributes:
    source: CUDA C++.
    threads: of a block.
    table: numbers in an image's table.
    derivatives: numbers in a pair's derivatives.
    pixels: numbers in an image's planes of pixels.
    workspace, workspace_bytes: numbers, and bytes, of global memory for a block.
    shared_bytes: of a block's dynamic shared memory.
  """

  source: str
  threads: int
  table: int
  derivatives: int
  pixels: int
  workspace: int
  workspace_bytes: int
  shared_bytes: int


def plane_size(height: int, width: int) -> int:
  """Numbers in a plane, each of whose rows is its even columns, then its odd ones."""
  return 2 * height * ((width + 1) // 2)


@functools.cache
def make_plan(
  architecture: architectures.Architecture,
  shape: tuple[int, ...],
  dtype: str,
  kind: str,
  threads: int,
  shared_bytes: int,
) -> Plan:
  """Makes the plan for images of `shape` [H, W, D].

  Args:
    architecture: the network.
    shape: [H, W, D].
    dtype: 'float32' or 'float64'.
    kind: 'ntk' or 'nngp'.
    threads: of a block, at most; fewer where there is less to do.
    shared_bytes: shared memory that a block may have. What does not fit lies in global memory.
  """
  height, width, channels = shape
  real, itemsize = ('float', 4) if dtype == 'float32' else ('double', 8)
  constants = {
    'int': dict(kHeight=height, kWidth=width, kChannels=channels, kHidden=architecture.hidden),
    'double': dict(kWeight=architecture.w_std**2, kBias=architecture.b_std**2),
    'bool': dict(kNngp=kind == 'nngp'),
  }
  if not architecture.is_convolutional:
    constants['int'] |= dict(kThreads=threads, kPixels=height * width * channels, kReadoutCount=1)
    return Plan(_text(real, constants, 'dense.cu'), threads, 1, 1 + architecture.hidden, 0, 0, 0, 0)
  convs, hidden = architecture.convs_by_level, architecture.hidden
  sizes = [(height >> p, width >> p) for p in range(len(convs))]
  threads = min(threads, _enough_threads(height, width))
  everything = architecture.readout == 'global_average_pool'
  layout = _layout(convs, sizes, channels, hidden)
  last = len(convs) - 1
  pair = _levels(convs, sizes, layout, last, everything, threads)
  pair, pair_bands = _with_bands(_with_groups(pair, threads), has_ntk=True)
  if not hidden:  # Variances are needed up to the last ReLU, there at offset 0 only.
    last = max((p for p, count in enumerate(convs) if count), default=-1)
  own = _levels(convs, sizes, layout, last, everything and hidden > 0, threads)
  own, own_bands = _with_bands(own, has_ntk=False)
  diagonal = max((level.plane for level in own), default=0)
  bands = max(pair_bands, own_bands)
  exchange = max(level.exchange for level in pair + own)
  sums_bytes = 8 * (2 * threads + 2)
  exchange_shared = sums_bytes + exchange * itemsize <= shared_bytes
  workspace = bands + 2 * diagonal + exchange * (not exchange_shared)
  last_height, last_width = sizes[-1]
  table, derivatives = layout.table, layout.derivatives + hidden
  blocks = {
    name: min(16, max(1, resident * 4 // itemsize // threads))
    for name, resident in _RESIDENT.items()
  }
  constants['int'] |= dict(kThreads=threads, kPairCount=len(pair), kSelfCount=len(own)) | blocks
  # Around a table in shared memory: a thread may read, though not use, what lies there.
  margin = 2 * width + 16
  block_bytes = sums_bytes + itemsize * (exchange + table + 2 * margin)
  table_shared = (
    max(blocks.values()) * (block_bytes + _RESERVED_BYTES) <= shared_bytes + _RESERVED_BYTES
  )
  constants['long long'] = dict(
    kPixels=channels * plane_size(height, width),
    kTable=table,
    kDerivatives=derivatives,
    kDiagonal=diagonal,
    kDiagonals=bands,
    kWorkspace=workspace,
    kExchangeSize=exchange,
    kMargin=margin,
    kReadoutCount=(last_height * last_width) ** (2 if everything else 1),
    kReadoutPixels=last_height * last_width,
  )
  constants['bool'] |= dict(kExchangeShared=exchange_shared, kTableShared=table_shared)
  levels = ''.join(
    f'inline constexpr Level {name}[] = {{{", ".join(map(_literal, levels))}}};\n'
    for name, levels in (('kPairLevels', pair), ('kSelfLevels', own or pair[:1]))
  )
  source = _text(real, constants, 'sweep.h', 'pairs.cu', levels=levels)
  return Plan(
    source,
    threads,
    table,
    derivatives,
    channels * plane_size(height, width),
    workspace,
    workspace * itemsize,
    block_bytes if table_shared else sums_bytes + exchange * itemsize * exchange_shared,
  )


class _Layout(NamedTuple):
  """The parts that levels have in an image's table and in a pair's derivatives.

  Attributes:
    deviations, halves, sigma, distances: for each level, see `Level`.
    table, derivatives: numbers in all, without hidden layers.
  """

  deviations: list[int]
  halves: list[int]
  sigma: list[int]
  distances: list[bool]
  table: int
  derivatives: int


def _layout(
  convs: Sequence[int], sizes: list[tuple[int, int]], channels: int, hidden: int
) -> _Layout:
  table = derivatives = channels * plane_size(*sizes[0])
  layout = _Layout([], [], [], [], 0, 0)
  for p, (count, size) in enumerate(zip(convs, sizes)):
    has_relu, plane = hidden > 0 or any(convs[p:]), plane_size(*size)
    layout.deviations.append(table)
    layout.halves.append(table + count * plane)
    layout.sigma.append(derivatives)
    layout.distances.append(has_relu)
    table += (count + has_relu * (1 + (p > 0))) * plane
    derivatives += count * plane
  return layout._replace(table=table, derivatives=derivatives)


def _levels(
  convs: Sequence[int],
  sizes: list[tuple[int, int]],
  layout: _Layout,
  last: int,
  everything: bool,
  threads: int,
) -> list[Level]:
  """The levels up to `last`, input side first, without their bands.

  Args:
    everything: whether the readout is of all offsets.
  """
  levels: list[Level] = []
  for p in range(last, -1, -1):
    height, width = sizes[p]
    radii = (height - 1, width - 1) if everything and p == len(convs) - 1 else (0, 0)
    if levels:
      above = levels[0]
      radii = min(2 * above.radius_y + 1, height - 1), min(2 * above.radius_x + 1, width - 1)
    level = Level(
      height,
      width,
      convs[p],
      *radii,
      has_ntk=any(convs[:p]),
      distances=layout.distances[p],
      deviations=layout.deviations[p],
      halves=layout.halves[p],
      sigma=layout.sigma[p],
      band=0,
      rows=2,
      stride=exchange_stride(width, 2),
      groups=1,
      members=threads,
    )
    levels.insert(0, level)
  return levels


def _with_groups(levels: list[Level], threads: int) -> list[Level]:
  """The levels, with groups of threads where a plane leaves threads idle.

  For pairs alone: the offsets of an image with itself take turns, since offset 0 comes first.
  """

  def grouped(level: Level) -> Level:
    members = _enough_threads(level.height, level.width)
    groups = min(threads // members, level.offsets)
    return dataclasses.replace(level, groups=groups, members=members) if groups > 1 else level

  return list(map(grouped, levels))


def _with_bands(levels: list[Level], has_ntk: bool) -> tuple[list[Level], int]:
  """The levels with their bands laid out, and the numbers in all bands.

  Args:
    has_ntk: whether a band holds the NTK beside the NNGP, once there is one.
  """
  placed, bands = levels[:1], 0
  for below, level in itertools.pairwise(levels):
    # A thread may read, though not use, a row of offsets before a band or behind.
    margin = (2 * level.radius_x + 3) * level.plane
    placed.append(dataclasses.replace(level, band=bands + margin))
    values = below.groups * level.offsets * level.plane * (1 + (has_ntk and level.has_ntk))
    bands += values + 2 * margin
  return placed, bands


def _enough_threads(height: int, width: int) -> int:
  """Whole warps in which each patch of a plane has a thread of its own."""
  return -(-(-(-height // 2) * -(-width // 2)) // _WARP) * _WARP


def exchange_stride(width: int, rows: int) -> int:
  """`Level.stride`: the least at which a warp's threads meet in the fewest banks.

  Each thread is at its patch; shared memory has 32 banks.
  """
  columns = (width + 1) // 2

  def conflicts(stride):
    banks = [
      (lane // columns * rows * 2 * stride + lane % columns) % _WARP for lane in range(_WARP)
    ]
    return max(map(banks.count, banks))

  return min(
    range(columns + 1, columns + 1 + _WARP), key=lambda stride: (conflicts(stride), stride)
  )


def _literal(level: Level) -> str:
  return '{' + ', '.join(str(value).lower() for value in dataclasses.astuple(level)) + '}'


def _text(real: str, constants: dict[str, dict[str, Any]], *names: str, levels: str = '') -> str:
  """The source: the constants, by C++ type, and the levels, then the files called `names`."""
  fields = ''
  for field in dataclasses.fields(Level):
    kind = 'bool' if field.type is bool else 'long long' if field.name == 'band' else 'int'
    fields += f'{kind} {field.name}; '
  plan = f'namespace kip {{\nusing Real = {real};\nstruct Level {{ {fields}}};\n{levels}'
  for kind, values in constants.items():
    for name, value in values.items():
      plan += f'inline constexpr {kind} {name} = {str(value).lower()};\n'
  coefficients = _COEFFICIENTS.read_text(encoding='utf-8').replace('#pragma once\n', '')
  files = [(_SOURCES / name).read_text(encoding='utf-8') for name in ('arithmetic.h', *names)]
  return plan + '}\n' + coefficients + ''.join(files)
