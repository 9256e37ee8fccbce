"""The implementations by name: `make_kernel` picks one, and all obey the contract."""

import importlib
import os
from typing import TYPE_CHECKING

from absl import logging

from kernels import architectures
from kernels.checked import Checked
from kernels.contract import DTYPES, IMPLEMENTATIONS, KINDS, PARAMETERIZATIONS, Kernel
from kernels.scale_free import ScaleFree

if TYPE_CHECKING:
  from configs import schema

# Module and class of each; imported when asked for, because Neural Tangents takes seconds to import
# and only one of them needs it.
_CLASSES = {
  'cuda': ('kernels.cuda.kernel', 'CudaKernel'),
  'native': ('kernels.native.kernel', 'NativeKernel'),
  'jax': ('kernels.band', 'JaxKernel'),
  'reference': ('kernels.reference', 'ReferenceKernel'),
}


def make_kernel(
  architecture,
  *,
  implementation: str = 'auto',
  dtype: str = 'float32',
  threads: int | None = None,
  kind: str = 'ntk',
  parameterization: str = 'ntk',
  width: int = 1024,
) -> Kernel:
  """An evaluator of `architecture`'s kernel.

  Args:
    architecture: a name, a dict of stages or an `architectures.Architecture`; see
      `architectures.get`.
    implementation: 'reference' is Neural Tangents, 'jax' runs wherever JAX does, 'native' is C++
      for CPUs (`python -m kernels.native.build`), 'cuda' CUDA C++ for NVIDIA's GPUs (`make cuda`);
      'auto' is the fastest one this machine can run that can do what is asked.
    dtype: 'float32' or 'float64'.
    threads: how many CPU threads to use; by default as many as this process may. No result depends
      on it.
    kind: 'ntk', or 'nngp'.
    parameterization: 'ntk', or 'standard' (https://arxiv.org/abs/2001.07301): 'reference' alone.
    width: of every hidden layer, which the NTK in standard parameterisation depends on.

  Raises:
    ValueError: for an unknown architecture, implementation or dtype, and by the returned object for
      images that are not [N, H, W, D] with N >= 1 and equal H, W, D, that are too small for the
      network's poolings, or that contain NaN or infinity.
  """
  architecture = architectures.get(architecture)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation: expected one of {", ".join(IMPLEMENTATIONS)}, got {implementation!r}.'
    )
  if dtype not in DTYPES:
    raise ValueError(f'dtype: expected one of {", ".join(DTYPES)}, got {dtype!r}.')
  check_variant(implementation, kind, parameterization)
  threads = threads or len(os.sched_getaffinity(0))
  if implementation == 'auto':
    implementation = _fastest() if parameterization == 'ntk' else 'reference'
  module, name = _CLASSES[implementation]
  extra = (parameterization, width) if implementation == 'reference' else ()

  def make(dtype):
    implementation_of = getattr(importlib.import_module(module), name)
    kernel = implementation_of(architecture, dtype, threads, kind, *extra)
    return kernel if architecture.b_std else ScaleFree(kernel)

  has_relu = architecture.hidden > 0 or any(stage.convs for stage in architecture.stages)
  is_delicate = (
    has_relu
    and architecture.is_convolutional
    and dtype == 'float32'
    and implementation != 'reference'
  )
  return Checked(make(dtype), lambda: Checked(make('float64')), is_delicate)


def for_run(run: 'schema.Run', threads: int) -> Kernel:
  """The kernel that a run's configuration asks for."""
  return make_kernel(
    run.architecture,
    implementation=run.implementation,
    dtype=run.kernel_dtype,
    threads=threads,
    kind=run.kernel,
    parameterization=run.parameterization,
    width=run.standard_width,
  )


def check_variant(implementation: str, kind: str, parameterization: str) -> None:
  """Raises ValueError where there is no such kernel, or `implementation` cannot do it."""
  if kind not in KINDS:
    raise ValueError(f'kernel: expected one of {", ".join(KINDS)}, got {kind!r}.')
  if parameterization not in PARAMETERIZATIONS:
    raise ValueError(
      f'parameterization: expected one of {", ".join(PARAMETERIZATIONS)}, got {parameterization!r}.'
    )
  if parameterization != 'ntk' and implementation not in ('auto', 'reference'):
    raise ValueError(
      f'implementation: {implementation!r} knows NTK parameterisation alone; parameterization={parameterization!r} needs '
      'reference (or auto).'
    )


def available() -> list[str]:
  """The implementations that this machine can run, 'auto' apart."""
  from kernels.cuda import kernel as cuda
  from kernels.native import build

  missing = {'cuda': not cuda.is_available(), 'native': not build.is_built()}
  return [name for name in _CLASSES if not missing.get(name)]


def _fastest() -> str:
  from kernels.cuda import kernel as cuda

  if cuda.is_available():
    return 'cuda'
  import jax

  from kernels.native import build

  if jax.default_backend() != 'cpu':
    logging.log_first_n(
      logging.WARNING,
      'There is a GPU, but no CuPy for the CUDA kernel (`make cuda` installs it); using the JAX '
      'kernel.',
      1,
    )
    return 'jax'
  if build.is_built():
    return 'native'
  logging.log_first_n(
    logging.WARNING,
    'The native kernel is not built (`python -m kernels.native.build` does that); '
    'using the JAX kernel.',
    1,
  )
  return 'jax'
