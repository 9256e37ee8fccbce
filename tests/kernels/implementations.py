"""The implementations under test; where there is no GPU the CUDA kernel runs on an emulator."""

import emulator
import numpy as np

from kernels import architectures, checked, contract, registry
from kernels.cuda import kernel as cuda
from kernels.native import build

IS_EMULATED = not cuda.is_available()
NAMES = tuple(registry.available())
if IS_EMULATED and build.compiler():
  NAMES = ('cuda', *NAMES)
FAST = tuple(name for name in NAMES if name != 'reference')
# In float64; without Neural Tangents the JAX kernel, which golden values hold to it.
ORACLE = 'reference' if 'reference' in NAMES else 'jax'

# (block, gradient), relative to the largest entry.
TOLERANCES = {'float32': (1e-6, 5e-6), 'float64': (1e-10, 1e-8)}


# As TOLERANCES, for images that coincide: there Neural Tangents' own float64 rounds to about 1e-8,
# since the cusp of ReLU's derivative at c = 1 turns 1e-16 into 1e-8, and the dense oracle is the
# stricter test.
CUSP_TOLERANCES = {'float32': (1e-6, 5e-6), 'float64': (5e-8, 5e-8)}


def make(implementation, architecture, dtype='float32', threads=1, kind='ntk') -> contract.Kernel:
  if implementation == 'cuda' and IS_EMULATED:
    return emulated(architecture, dtype, kind)
  return registry.make_kernel(
    architecture, implementation=implementation, dtype=dtype, threads=threads, kind=kind
  )


def emulated(architecture, dtype='float32', kind='ntk', **machine) -> contract.Kernel:
  """The CUDA kernel on an `emulator.Emulator(**machine)`."""
  network, gpu = architectures.get(architecture), emulator.Emulator(**machine)
  return checked.wrap(lambda dtype: cuda.CudaKernel(network, dtype, kind, gpu), dtype)


def error(value, expected) -> float:
  """The largest difference, relative to the largest entry."""
  return np.abs(value - expected).max() / np.abs(expected).max()
