"""A fixed set of images of which parts are used again and again."""

import threading

import numpy as np

from kernels.contract import Kernel, Prepared


class Library:
  """A fixed set of images of which parts are used again and again. Thread safe.

  Each image's variances are computed once, when they are first asked for.
  """

  def __init__(self, kernel: Kernel, images: np.ndarray):
    """`images` [N, H, W, D] may be memory-mapped; only what is asked for is read."""
    self._kernel, self._images = kernel, images
    self._known = np.zeros(len(images), bool)
    self._variances: list[np.ndarray] | None = None
    self._maker = None
    self._lock = threading.Lock()

  def __getitem__(self, index: 'slice | np.ndarray') -> Prepared:
    chosen = np.arange(len(self._images))[index]
    with self._lock:
      new = np.unique(chosen[~self._known[chosen]])
      if len(new):
        fresh = self._kernel.prepare(self._images[new])
        if self._variances is None:
          self._maker = fresh.kernel
          self._variances = [
            np.empty((len(self._images),) + q.shape[1:], q.dtype) for q in fresh.variances
          ]
        for kept, q in zip(self._variances, fresh.variances):
          kept[new] = q
        self._known[new] = True
    return Prepared(
      np.asarray(self._images[chosen], self._kernel.dtype),
      [q[chosen] for q in self._variances],
      self._maker,
    )
