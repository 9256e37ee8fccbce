"""The contract of a kernel: what its callers may rely on, and what an implementation owes them.

An implementation imports this module, never the registry that finds it by name. Letters: A and B
images on the two sides of a block, N images, of H x W pixels and D channels.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from kernels import architectures

IMPLEMENTATIONS = ('auto', 'cuda', 'native', 'jax', 'reference')
DTYPES = ('float32', 'float64')
KINDS = ('ntk', 'nngp')
PARAMETERIZATIONS = ('ntk', 'standard')

# Host memory for derivatives of all blocks that are linearised and not yet pulled back, unless the
# implementation keeps them elsewhere.
KEPT_BYTES = 2**31

Cotangent = np.ndarray | Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """Images with what a kernel precomputes of each one alone; indexed like an array of images.

  Attributes:
    images: [N, H, W, D].
    variances: the kernel's own tables, arrays [N, ...].
    kernel: the kernel that made them, and alone can use them.
  """

  images: np.ndarray
  variances: list[np.ndarray]
  kernel: object

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: slice | np.ndarray) -> 'Prepared':
    return Prepared(self.images[index], [q[index] for q in self.variances], self.kernel)


Images = np.ndarray | Prepared


def pixels(x: Images) -> np.ndarray:
  """The images [N, H, W, D] themselves, prepared or not."""
  return x.images if isinstance(x, Prepared) else x


class Linearised(NamedTuple):
  """A block, and what its gradient needs.

  Attributes:
    block: [A, B].
    pull_back: from a cotangent [A, B] to the gradient of sum(block * cotangent) with respect to x1,
      [A, H, W, D].
    nbytes: the memory that `pull_back` holds.
  """

  block: np.ndarray
  pull_back: Callable[[np.ndarray], np.ndarray]
  nbytes: int


@runtime_checkable
class Kernel(Protocol):
  """The kernel of one architecture. Arrays are NumPy's; A and B are any positive numbers.

  Implementations derive from this class and inherit its defaults.

  Attributes:
    implementation: the implementation's name, never 'auto'.
    architecture: the network.
    dtype: of images, blocks and gradients.
    instruction_set: the CPU's that is used, where the implementation chooses one; else ''.
    device: the GPU's model, where the implementation uses one itself; else ''.
    compiled: names what this machine has compiled of the implementation's own source, and by which
      compiler, where that may change bits; else ''.
    kept_bytes: memory for all blocks that are linearised and not yet pulled back; it is the caller
      who adds up `Linearised.nbytes`.
  """

  implementation: str
  architecture: architectures.Architecture
  dtype: np.dtype
  instruction_set: str = ''
  device: str = ''
  compiled: str = ''
  kept_bytes: int = KEPT_BYTES

  def prepare(self, x: np.ndarray) -> Prepared:
    """Precomputes what can be reused of images x [N, H, W, D].

    The result may be given to this kernel, again and again, in place of the images.
    """
    ...

  def block(self, x1: Images, x2: Images) -> np.ndarray:
    """The kernel [A, B] between all images of x1 [A, H, W, D] and of x2 [B, H, W, D].

    Where x1 is x2, the same object, it is exactly symmetric, for half the work.
    """
    ...

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
    ...

  def linearise(self, x1: Images, x2: Images) -> Linearised:
    """`block_vjp` in two halves, for a cotangent that is known only later.

    An implementation that can keep derivatives overrides this default, which computes the block
    twice.
    """

    def pull_back(cotangent: np.ndarray) -> np.ndarray:
      return self.block_vjp(x1, x2, cotangent)[1]

    return Linearised(self.block(x1, x2), pull_back, pixels(x2).nbytes)


def prepared(kernel: Kernel, x1: Images, x2: Images) -> tuple[Prepared, Prepared]:
  """Both sides of a block, prepared where they are not; one object where x1 is x2."""
  first = x1 if isinstance(x1, Prepared) else kernel.prepare(x1)
  if x2 is x1:
    return first, first
  return first, x2 if isinstance(x2, Prepared) else kernel.prepare(x2)


class Wrapper(Kernel):
  """A kernel around another, `inner`, whose attributes it has and to whose methods it passes on."""

  def __init__(self, inner: Kernel):
    self.inner = inner
    self.implementation = inner.implementation
    self.architecture = inner.architecture
    self.dtype = inner.dtype
    self.instruction_set = inner.instruction_set
    self.device = inner.device
    self.compiled = inner.compiled
    self.kept_bytes = inner.kept_bytes

  def prepare(self, x: np.ndarray) -> Prepared:
    return self.inner.prepare(x)

  def block(self, x1: Images, x2: Images) -> np.ndarray:
    return self.inner.block(x1, x2)

  def block_vjp(
    self, x1: Images, x2: Images, cotangent: Cotangent
  ) -> tuple[np.ndarray, np.ndarray]:
    return self.inner.block_vjp(x1, x2, cotangent)

  def linearise(self, x1: Images, x2: Images) -> Linearised:
    return self.inner.linearise(x1, x2)
