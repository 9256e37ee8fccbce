"""What travels between the coordinator and its workers, and how a step is cut into it.

Courier hangs on arrays in arguments, and takes twice as long for them in results, so arrays travel
as bytes; pieces in parts of at most PART_BYTES. Tasks carry indices, never images.
"""

import json
import math
from typing import NamedTuple

import numpy as np
import xxhash

PART_BYTES = 2**22
_ALIGNMENT = 64

# The phases of a step of KIP.
SUPPORT_BLOCKS = 'support_blocks'  # tiles of K_ss on and above the diagonal
TARGETS = 'targets'  # K_ts, its residual and its cotangent, in one pass
SUPPORT_VJP = 'support_vjp'  # all tiles of K_ss, pulled back through their first argument
# With several support ranges a step has two halves: SUPPORT_BLOCKS with TARGET_BLOCKS, then
# SUPPORT_VJP with TARGET_VJP; both of K_ss are about `support_tile` whole rows, so that the
# gradient of a support image comes in one piece.
TARGET_BLOCKS = 'target_blocks'  # K_ts
TARGET_VJP = 'target_vjp'  # these blocks, pulled back through the support images
# Label Solve has SUPPORT_BLOCKS and this one, which is posted again and again until the whole
# training set is done.
LABEL_SOLVE = 'label_solve'  # the R factor of [K_ts, y_t]

SUPPORT_PHASES = (SUPPORT_BLOCKS, SUPPORT_VJP)  # whose target_range is of the support set too

Range = tuple[int, int]


class Task(NamedTuple):
  """A unit of work, valid for one step of one life of one run.

  Attributes:
    run_id: names the run.
    generation: counts the coordinator's lives.
    step: of the support set it is about.
    phase: one of those above.
    index: place in the phase's plan.
    target_range: the second argument's images, [start, stop): of the step's target batch, of the
      support set in the K_ss phases, of the training set in LABEL_SOLVE.
    support_range: the first argument's images, [start, stop) of the support set.
  """

  run_id: str
  generation: int
  step: int
  phase: str
  index: int
  target_range: Range
  support_range: Range

  @property
  def pairs(self) -> int:
    """Kernel entries it asks for."""
    return (self.target_range[1] - self.target_range[0]) * (
      self.support_range[1] - self.support_range[0]
    )


class Stale(Exception):
  """The coordinator has moved on from the step, phase or life that a request is about."""


def ranges(total: int, size: int) -> list[Range]:
  """[0, total) cut into pieces of `size`, the last one shorter."""
  return [(start, min(start + size, total)) for start in range(0, total, size)]


def plan(
  phase: str,
  num_support: int,
  targets: Range,
  support_tile: int,
  targets_per_task: int,
  support_per_task: int,
) -> list[tuple[Range, Range]]:
  """The (target_range, support_range) of every task of a phase, in the order in which their pieces
  are summed.

  `support_per_task` is 0 where target tasks are about all support images.
  """
  tiles = ranges(num_support, support_tile)
  if phase in SUPPORT_PHASES and support_per_task:
    return [((0, num_support), rows) for rows in tiles]
  if phase == SUPPORT_BLOCKS:
    return [(columns, rows) for i, rows in enumerate(tiles) for columns in tiles[i:]]
  if phase == SUPPORT_VJP:
    return [(columns, rows) for rows in tiles for columns in tiles]
  first, last = targets
  support = ranges(
    num_support, support_per_task if phase in (TARGET_BLOCKS, TARGET_VJP) else num_support
  )
  return [
    ((first + start, first + stop), rows)
    for start, stop in ranges(last - first, targets_per_task)
    for rows in support
  ]


def encode(piece: dict[str, np.ndarray]) -> tuple[list[bytes], bytes]:
  """A piece as parts to send, and their checksum."""
  data = pack(piece)
  return [data[i : i + PART_BYTES] for i in range(0, len(data), PART_BYTES)], xxhash.xxh3_64_digest(
    data
  )


def decode(parts: list[bytes], checksum: bytes) -> dict[str, np.ndarray]:
  """The piece again, read-only. Raises ValueError where the checksum does not fit."""
  data = b''.join(parts)
  if xxhash.xxh3_64_digest(data) != checksum:
    raise ValueError('a piece arrived damaged: its checksum does not fit')
  return unpack(data)


def pack(arrays: dict[str, np.ndarray]) -> bytes:
  """A line of JSON that names the arrays, then their bytes."""
  header = json.dumps(
    [(name, value.dtype.str, value.shape) for name, value in arrays.items()]
  ).encode()
  header += b' ' * (-(len(header) + 1) % _ALIGNMENT) + b'\n'
  return b''.join(
    [
      header,
      *(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data for value in arrays.values()),
    ]
  )


def unpack(data: bytes) -> dict[str, np.ndarray]:
  """The arrays again, read-only."""
  offset = data.index(b'\n') + 1
  arrays = {}
  for name, dtype, shape in json.loads(data[:offset]):
    arrays[name] = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape)
    offset += arrays[name].nbytes
  return arrays
