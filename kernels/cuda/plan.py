"""The CUDA source for one architecture, image shape and dtype: a plan of constants, and the files
of `src`, as one text."""

import dataclasses
import functools
import pathlib

from kernels import architectures

_SOURCES = pathlib.Path(__file__).parent / 'src'
_COEFFICIENTS = (
  pathlib.Path(__file__).parent.parent / 'native' / 'src' / 'arc_cosine_coefficients.h'
)

THREADS = 512  # a block, at most
_WARP = 32
_RESERVED_BYTES = 1024  # of a processor's shared memory, for each of its blocks
# Threads of a processor (in float32) that registers must be found for. On an H100 more of them,
# 1024 and 768, take as long.
_RESIDENT = {'kForwardBlocks': 768, 'kBackwardBlocks': 512}


@dataclasses.dataclass(frozen=True)
class Level:
  """One resolution, as `Level` in the source: all convolutions between two poolings, on the offsets
  |dy| <= radius_y, |dx| <= radius_x.

  Attributes:
    has_ntk: whether a convolution lies before this level: the NTK is zero until then.
    distances: whether a ReLU lies here or after: covariances are then half squared distances.
    deviations, halves: where an image's table has what belongs to the level.
    sigma: where a pair's derivatives have it.
    band: where a block's workspace has what enters the level: for each group of the level before a
      part of its own, of which the first becomes their sum.
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
    return self.groups * 6 * (-(-self.height // self.rows) * self.rows + 2) * 2 * self.stride


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the host needs to know of a source.

  Attributes:
    threads: of a block.
    table, derivatives, pixels: numbers for an image, for a pair, and in an image's planes of
      pixels.
    workspace, workspace_bytes: numbers, and bytes, for a block.
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
  """Numbers in a plane: each row is its even columns, then its odd ones."""
  return 2 * height * ((width + 1) // 2)


@functools.cache
def make_plan(
  architecture: architectures.Architecture,
  shape: tuple[int, int, int],
  dtype: str,
  kind: str,
  threads: int,
  shared_bytes: int,
) -> Plan:
  """The plan for images of `shape` [H, W, D].

  Args:
    threads: of a block, at most; fewer where there is less to do.
    shared_bytes: of shared memory that a block may have. What does not fit there lies in global
      memory.
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
  convs, sizes = [0], [(height, width)]
  for stage in architecture.stages:
    convs[-1] += stage.convs
    if stage.pool:
      convs.append(0)
      sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
  threads = min(threads, _enough_threads(height, width))
  everything = architecture.readout == 'global_average_pool'
  hidden = architecture.hidden
  pair, table, derivatives, pair_bands = _levels(
    convs, sizes, channels, everything, len(convs) - 1, threads, hidden, ntk=True
  )
  last = len(convs) - 1
  if not hidden:  # variances are wanted up to the last ReLU, there at offset 0 only
    last = max((p for p, count in enumerate(convs) if count), default=-1)
  own, _, _, own_bands = _levels(
    convs, sizes, channels, everything and hidden > 0, last, threads, hidden, ntk=False
  )
  diagonal = max((level.plane for level in own), default=0)
  bands = max(pair_bands, own_bands)
  exchange = max(level.exchange for level in pair + own)
  sums_bytes = 8 * (2 * threads + 2)
  exchange_shared = sums_bytes + exchange * itemsize <= shared_bytes
  workspace = bands + 2 * diagonal + exchange * (not exchange_shared)
  last_height, last_width = sizes[-1]
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
    kDerivatives=derivatives + hidden,
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
    derivatives + hidden,
    channels * plane_size(height, width),
    workspace,
    workspace * itemsize,
    block_bytes if table_shared else sums_bytes + exchange * itemsize * exchange_shared,
  )


def _levels(convs, sizes, channels, everything, last, threads, hidden, ntk):
  """The levels up to `last`; and the sizes of a table, of derivatives (but for hidden layers), and
  of all bands.

  Args:
    ntk: whether these are a pair's levels, not an image's with itself, whose offsets take turns
      (offset 0 is a special one).
  """
  table = derivatives = channels * plane_size(*sizes[0])
  starts = []
  for p, (count, size) in enumerate(zip(convs, sizes)):
    distances, plane = hidden > 0 or any(convs[p:]), plane_size(*size)
    starts.append((table, table + count * plane, derivatives, distances))
    table += (count + distances * (1 + (p > 0))) * plane
    derivatives += count * plane
  levels, above = [], None
  for p in range(last, -1, -1):
    height, width = sizes[p]
    radii = (height - 1, width - 1) if everything and p == len(convs) - 1 else (0, 0)
    if above:
      radii = min(2 * above.radius_y + 1, height - 1), min(2 * above.radius_x + 1, width - 1)
    deviations, halves, sigma, distances = starts[p]
    above = Level(
      height,
      width,
      convs[p],
      *radii,
      has_ntk=any(convs[:p]),
      distances=distances,
      deviations=deviations,
      halves=halves,
      sigma=sigma,
      band=0,
      rows=2,
      stride=_stride(width, 2),
      groups=1,
      members=threads,
    )
    groups = min(threads // _enough_threads(height, width), above.offsets)
    if ntk and groups > 1:
      above = dataclasses.replace(above, groups=groups, members=_enough_threads(height, width))
    levels.append(above)
  levels, bands = levels[::-1], 0
  for p, level in enumerate(levels[1:], 1):
    # A thread may read, though not use, a row of offsets before a band or behind.
    margin = (2 * level.radius_x + 3) * level.plane
    levels[p] = dataclasses.replace(level, band=bands + margin)
    bands += (
      levels[p - 1].groups * level.offsets * level.plane * (1 + (ntk and level.has_ntk))
      + 2 * margin
    )
  return levels, table, derivatives, bands


def _enough_threads(height: int, width: int) -> int:
  """Whole warps in which each patch of a plane has a thread of its own."""
  return -(-(-(-height // 2) * -(-width // 2)) // _WARP) * _WARP


def _stride(width: int, rows: int) -> int:
  """The least one at which a warp's threads, each at its patch, meet in the fewest of shared
  memory's 32 banks."""
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


def _text(real, constants, *names, levels='') -> str:
  fields = ' '.join(
    f'{"bool" if field.type is bool else "long long" if field.name == "band" else "int"} {field.name};'
    for field in dataclasses.fields(Level)
  )
  plan = f'namespace kip {{\nusing Real = {real};\nstruct Level {{ {fields} }};\n{levels}'
  for kind, values in constants.items():
    plan += ''.join(
      f'inline constexpr {kind} {name} = {str(value).lower()};\n' for name, value in values.items()
    )
  coefficients = _COEFFICIENTS.read_text(encoding='utf-8').replace('#pragma once\n', '')
  return (
    plan
    + '}\n'
    + coefficients
    + ''.join((_SOURCES / name).read_text(encoding='utf-8') for name in ('arithmetic.h', *names))
  )
