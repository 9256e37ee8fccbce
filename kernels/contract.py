"""The contract of a kernel: what every implementation takes and gives.

An implementation imports this module and `architectures`, never the registry that finds it.
"""

import dataclasses
from typing import Any, Callable, NamedTuple, Protocol

import numpy as np

from kernels import architectures

IMPLEMENTATIONS = ('auto', 'cuda', 'native', 'jax', 'reference')
DTYPES = ('float32', 'float64')
KINDS = ('ntk', 'nngp')
PARAMETERIZATIONS = ('ntk', 'standard')

# Of memory, where derivatives are kept there, for all that is linearised and not yet pulled back.
KEPT_BYTES = 2**31

Cotangent = np.ndarray | Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """Images with what a kernel needs to know of each of them on its own; made by `Kernel.prepare`,
  indexed like an array of images.

  Attributes:
    images: [N, H, W, D].
    variances: the kernel's own, a list of arrays [N, ...].
    kernel: the one that made it.
  """

  images: np.ndarray
  variances: list[np.ndarray]
  kernel: Any

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: 'slice | np.ndarray') -> 'Prepared':
    return Prepared(self.images[index], [q[index] for q in self.variances], self.kernel)


Images = np.ndarray | Prepared


class Linearised(NamedTuple):
  """A block, and what its gradient needs.

  Attributes:
    block: [A, B].
    pull_back: from a cotangent [A, B] to the gradient of sum(block * cotangent) with respect to x1,
      [A, H, W, D].
    nbytes: what it holds in memory.
  """

  block: np.ndarray
  pull_back: Callable[[np.ndarray], np.ndarray]
  nbytes: int


class Kernel(Protocol):
  """What `make_kernel` returns. Arrays are NumPy's; `A`, `B` any positive numbers of images.

  Attributes:
    implementation: the implementation's name, 'auto' resolved.
    architecture: the network.
    dtype: of images, blocks and gradients.
    instruction_set, device: of the CPU, and the GPU's model, where the implementation chooses one;
      else ''.
    kept_bytes: for which there is room in all that has been linearised and not yet pulled back. The
      caller keeps count.
  """

  implementation: str
  architecture: architectures.Architecture
  dtype: np.dtype
  instruction_set: str
  device: str
  kept_bytes: int

  def prepare(self, x: np.ndarray) -> Prepared:
    """Images x [N, H, W, D] in the form in which they may be given again and again, to this kernel,
    in place of an array."""

  def block(self, x1: Images, x2: Images) -> np.ndarray:
    """The NTK between every image of x1 [A, H, W, D] and of x2 [B, H, W, D]: [A, B]. Half the work,
    and symmetric, where x1 is x2."""

  def block_vjp(
    self, x1: Images, x2: Images, cotangent: Cotangent
  ) -> tuple[np.ndarray, np.ndarray]:
    """The block, and the gradient of sum(block * cotangent) with respect to x1.

    Args:
      x1: [A, H, W, D].
      x2: [B, H, W, D], held constant.
      cotangent: [A, B], or a function from the finished block [A, B] to it.

    Returns:
      block [A, B] and gradient [A, H, W, D].
    """

  def linearise(self, x1: Images, x2: Images) -> Linearised:
    """`block_vjp` in two halves, for a cotangent that is known much later. An implementation that
    has none of its own computes twice."""
