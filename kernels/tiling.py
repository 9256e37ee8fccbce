"""Tiles of images: equal shapes, so that few of them compile."""

import numpy as np


def tiles(x: np.ndarray, size: int) -> list[np.ndarray]:
  """`x` [N, ...] cut into tiles of exactly `size`, the last one padded with the last image."""
  x = np.concatenate([x, np.repeat(x[-1:], -len(x) % size, axis=0)])
  return [x[i : i + size] for i in range(0, len(x), size)]


def power_of_two_from(n: int) -> int:
  """The least power of two that is at least n > 0."""
  return 1 << (n - 1).bit_length()


def power_of_two_to(n: int) -> int:
  """The greatest power of two that is at most n, or 1."""
  return 1 << max(0, n.bit_length() - 1)
