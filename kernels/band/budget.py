"""The sizes of tiles.

Tiles belong to the bits of a result, so nothing here follows the memory that happens to be free.
"""

from typing import NamedTuple

from kernels import architectures
from kernels.band import offsets
from kernels.tiling import power_of_two_from, power_of_two_to


class Budget(NamedTuple):
  """The work that a device takes on at once.

  Attributes:
    is_gpu: whether it is a GPU, where launches cost time, and so do tiles that are not full.
    tile_bytes: for what a tile keeps for its vjp; at its worst it holds four times as much (a
      compiled ConvNet's and Myrtle10's memory).
    kept_bytes: for what is kept between a block and its vjp, all tiles together.
    images: whose variances one tile computes.
    pairs: of images in a tile, on CPU.
    entries: numbers in an offset's arrays, which on a GPU set the pairs.
    tiles: computed at a time; as many as there are threads where 0.
  """

  is_gpu: bool
  tile_bytes: int
  kept_bytes: int
  images: int
  pairs: int = 128  # On CPU an offset's arrays stay in a core's cache.
  entries: int = 2**21  # With 8 MB to read, a launch lasts longer than the launching of the next.
  tiles: int = 0


CPU = Budget(is_gpu=False, tile_bytes=2**28, kept_bytes=2**29, images=16)
# 6 GiB at most. One tile is sent there and launched while another is computed.
GPU = Budget(is_gpu=True, tile_bytes=2**29, kept_bytes=2**31, images=256, tiles=2)


def bytes_per_pair(
  architecture: architectures.Architecture, height: int, width: int, itemsize: int
) -> int:
  """Bytes that a tile keeps of a pair of images for its vjp."""
  if not architecture.is_convolutional:
    return 8
  levels = offsets.plan(architecture, height, width)[1:]
  numbers = (2 * level.offsets * level.axes[0].rows * level.axes[1].rows for level in levels)
  return sum(numbers) * itemsize


def tile_shape(
  budget: Budget,
  architecture: architectures.Architecture,
  shape: tuple[int, ...],
  itemsize: int,
  count1: int,
  count2: int,
) -> tuple[int, int]:
  """Numbers of images (a, b) of a tile, for blocks of `count1` images against `count2`.

  The least work, padding included, then the most images of x2, that a tile's number of pairs
  allows. On CPU powers of two, so that few shapes compile; on a GPU the images of x1 are shared out
  evenly, and a tile's launches count as an eighth of a full one's work.

  Args:
    shape: an image's [H, W, D].
    itemsize: bytes of a number.
  """
  height, width, _ = shape
  if not architecture.is_convolutional:
    pairs = 2**18
  else:
    pairs = power_of_two_to(budget.entries // (height * width)) if budget.is_gpu else budget.pairs
    kept = bytes_per_pair(architecture, height, width, itemsize)
    pairs = min(pairs * 4 // itemsize, power_of_two_to(budget.tile_bytes // max(1, kept)))
    pairs = max(16, pairs)
  launches = pairs // 8 if budget.is_gpu else 0

  def rows(b: int) -> int:
    if budget.is_gpu:
      return -(-count1 // -(-count1 // (pairs // b)))
    return min(pairs // b, power_of_two_from(count1))

  def work(a: int, b: int) -> int:
    return -(-count1 // a) * -(-count2 // b) * (a * b + launches)

  most = max(16, power_of_two_from(count2))
  widths = [2**k for k in range(4, pairs.bit_length() - 1) if 2**k <= most]
  return min(((rows(b), b) for b in widths), key=lambda ab: (work(*ab), -ab[1]))
