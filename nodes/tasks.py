"""What travels between the coordinator and its workers, and how a step is cut into it.

Courier hangs on arrays in arguments, so a piece goes up as bytes, in parts of at most PART_BYTES; arrays in results are fine. Tasks carry
indices, never images.
"""

import hashlib
import io
from typing import NamedTuple

import numpy as np

PART_BYTES = 2 ** 22

# The phases of a step of KIP, in order.
SUPPORT_BLOCKS = 'support_blocks'  # tiles of K_ss on and above the diagonal
TARGETS = 'targets'  # K_ts, its residual and its cotangent, in one pass
SUPPORT_VJP = 'support_vjp'  # all tiles of K_ss, pulled back through their first argument
# Label Solve has SUPPORT_BLOCKS and this one, which is posted again and again until the whole training set is done.
LABEL_SOLVE = 'label_solve'  # the R factor of [K_ts, y_t]

Range = tuple[int, int]


class Task(NamedTuple):
  """A unit of work, valid for one step of one life of one run.

  Attributes:
    run_id: names the run.
    generation: counts the coordinator's lives.
    step: of the support set it is about.
    phase: SUPPORT_BLOCKS, TARGETS, SUPPORT_VJP or LABEL_SOLVE.
    index: place in the phase's plan.
    target_range: the second argument's images, [start, stop): of the step's target batch, of the support set in the K_ss phases, of the
      training set in LABEL_SOLVE.
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
    return (self.target_range[1] - self.target_range[0]) * (self.support_range[1] - self.support_range[0])


class Stale(Exception):
  """The coordinator has moved on from the step, phase or life that a request is about."""


def ranges(total: int, size: int) -> list[Range]:
  """[0, total) cut into pieces of `size`, the last one shorter."""
  return [(start, min(start + size, total)) for start in range(0, total, size)]


def plan(phase: str, num_support: int, targets: Range, support_tile: int, targets_per_task: int) -> list[tuple[Range, Range]]:
  """The (target_range, support_range) of every task of a phase, in the order in which their pieces are summed."""
  tiles = ranges(num_support, support_tile)
  if phase == SUPPORT_BLOCKS:
    return [(columns, rows) for i, rows in enumerate(tiles) for columns in tiles[i:]]
  if phase == SUPPORT_VJP:
    return [(columns, rows) for rows in tiles for columns in tiles]
  first, last = targets
  return [((first + start, first + stop), (0, num_support)) for start, stop in ranges(last - first, targets_per_task)]


def encode(piece: dict[str, np.ndarray]) -> tuple[list[bytes], str]:
  """A piece as parts to send, and their digest."""
  buffer = io.BytesIO()
  np.savez(buffer, **piece)
  data = buffer.getvalue()
  return [data[i:i + PART_BYTES] for i in range(0, len(data), PART_BYTES)], hashlib.sha256(data).hexdigest()


def decode(parts: list[bytes], digest: str) -> dict[str, np.ndarray]:
  """The piece again. Raises ValueError where the digest does not fit."""
  data = b''.join(parts)
  if hashlib.sha256(data).hexdigest() != digest:
    raise ValueError('a piece arrived damaged: its digest does not fit')
  with np.load(io.BytesIO(data), allow_pickle=False) as file:
    return dict(file)
