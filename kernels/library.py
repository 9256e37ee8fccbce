"""A fixed set of images of which parts are used again and again."""

import threading

import numpy as np

from kernels.contract import Kernel, Prepared


class Library:
  """Images [N, H, W, D], each prepared once, when it is first asked for. Thread safe."""

  def __init__(self, kernel: Kernel, images: np.ndarray):
    """`images` may be memory-mapped; only those asked for are read."""
    self._kernel, self._images = kernel, images
    self._is_prepared = np.zeros(len(images), bool)
    self._variances: list[np.ndarray] = []
    self._maker: object = None
    self._lock = threading.Lock()

  def __getitem__(self, index: slice | np.ndarray) -> Prepared:
    chosen = np.arange(len(self._images))[index]
    with self._lock:
      new = np.unique(chosen[~self._is_prepared[chosen]])
      if len(new):
        self._prepare(new)
    images = np.asarray(self._images[chosen], self._kernel.dtype)
    return Prepared(images, [q[chosen] for q in self._variances], self._maker)

  def _prepare(self, new: np.ndarray) -> None:
    fresh = self._kernel.prepare(self._images[new])
    if self._maker is None:
      shapes = [(len(self._images), *q.shape[1:]) for q in fresh.variances]
      self._variances = [np.empty(s, q.dtype) for s, q in zip(shapes, fresh.variances)]
      self._maker = fresh.kernel
    for kept, q in zip(self._variances, fresh.variances):
      kept[new] = q
    self._is_prepared[new] = True
