"""The implementations by name; `make_kernel` picks one. All obey the contract."""

import importlib.util
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from absl import logging

from kernels import architectures, checked, cpus
from kernels.contract import DTYPES, IMPLEMENTATIONS, KINDS, PARAMETERIZATIONS, Kernel

if TYPE_CHECKING:
  from configs import schema


def make_kernel(
  architecture: str | Mapping[str, Any] | architectures.Architecture,
  *,
  implementation: str = 'auto',
  dtype: str = 'float32',
  threads: int | None = None,
  kind: str = 'ntk',
  parameterization: str = 'ntk',
  width: int = 1024,
) -> Kernel:
  """Makes an evaluator of `architecture`'s kernel.

  Args:
    architecture: a name, a dict of stages or an `Architecture`; see `architectures.get`.
    implementation: 'reference' is Neural Tangents, 'jax' runs wherever JAX does, 'native' is C++
      for CPUs (`python -m kernels.native.build`), 'cuda' is CUDA C++ for NVIDIA's GPUs (`make
      cuda`); 'auto' is the fastest one this machine can run that can do what is asked.
    dtype: 'float32' or 'float64'.
    threads: CPU threads to use; by default as many as this process may. No result depends on it.
    kind: 'ntk' or 'nngp'.
    parameterization: 'ntk', or 'standard' (Sohl-Dickstein et al. 2020,
      https://arxiv.org/abs/2001.07301), which 'reference' alone knows.
    width: of every hidden layer, which the NTK in standard parameterisation depends on.

  Raises:
    ValueError: unknown architecture, or a setting that is not one of these; and by the returned
      kernel, see `checked.Checked`.
  """
  network = architectures.get(architecture)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation: expected one of {", ".join(IMPLEMENTATIONS)}, got {implementation!r}.'
    )
  if dtype not in DTYPES:
    raise ValueError(f'dtype: expected one of {", ".join(DTYPES)}, got {dtype!r}.')
  check_variant(implementation, kind, parameterization)
  threads = threads or cpus.available()
  if implementation == 'auto':
    implementation = _fastest() if parameterization == 'ntk' else 'reference'

  # Imported when asked for: Neural Tangents alone takes seconds to import.
  def make(dtype: str) -> Kernel:
    if implementation == 'cuda':
      from kernels.cuda import kernel as cuda

      return cuda.CudaKernel(network, dtype, kind)
    if implementation == 'native':
      from kernels.native import kernel as native

      return native.NativeKernel(network, dtype, threads, kind)
    if implementation == 'jax':
      from kernels.band import kernel as band

      return band.JaxKernel(network, dtype, threads, kind)
    from kernels import reference

    return reference.ReferenceKernel(network, dtype, threads, kind, parameterization, width)

  return checked.wrap(make, dtype)


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
  """Raises ValueError where there is no such kernel, or `implementation` cannot compute it."""
  if kind not in KINDS:
    raise ValueError(f'kernel: expected one of {", ".join(KINDS)}, got {kind!r}.')
  if parameterization not in PARAMETERIZATIONS:
    raise ValueError(
      f'parameterization: expected one of {", ".join(PARAMETERIZATIONS)}, got {parameterization!r}.'
    )
  if parameterization != 'ntk' and implementation not in ('auto', 'reference'):
    raise ValueError(
      f'implementation: {implementation!r} knows NTK parameterisation alone; '
      f'parameterization={parameterization!r} needs reference (or auto).'
    )


def available() -> list[str]:
  """The implementations that this machine can run, without 'auto'."""
  from kernels.cuda import kernel as cuda
  from kernels.native import build

  missing = {
    'cuda': not cuda.is_available(),
    'native': not build.is_built(),
    'reference': importlib.util.find_spec('neural_tangents') is None,
  }
  return [name for name in IMPLEMENTATIONS if name != 'auto' and not missing.get(name)]


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
