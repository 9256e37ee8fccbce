"""Where the nodes' processes run: a GPU or none, CPU threads, and the environment that puts each of
them there.

Nothing here starts JAX or CUDA: a process that has started CUDA holds memory on the GPU, and can no
longer be told which one to take.
"""

import importlib.util
import itertools
import os
import re
import subprocess
from typing import NamedTuple, Sequence

_ON_CPU = 2  # workers, where the configuration leaves it open and there is no GPU
_MEMORY = 0.9  # of a GPU's memory, for all processes on it together
_NVIDIA_SMI_SECONDS = 60  # it initialises the driver where nobody has yet

# Of these packages any will do, for kernels on a GPU; None: whatever there is, they are computed on
# CPU.
_JAX, _CUPY = ('jax_cuda12_plugin', 'jax_cuda13_plugin'), ('cupy',)
# By run.implementation; others need JAX's.
_NEEDS = {'auto': _CUPY + _JAX, 'cuda': _CUPY, 'native': None}

_HIDDEN = {'CUDA_VISIBLE_DEVICES': ''}


class Gpus(NamedTuple):
  """The GPUs for a run's kernels.

  Attributes:
    names: each as CUDA_VISIBLE_DEVICES names it; none: the kernels are computed on CPU.
    remark: a line that tells the user so, and why.
  """

  names: tuple[str, ...]
  remark: str


class Placement(NamedTuple):
  """The environment of every process of a local launch.

  Attributes:
    coordinator: on CPU, always.
    workers: one for each.
    evaluator: beside them.
  """

  coordinator: dict[str, str]
  workers: list[dict[str, str]]
  evaluator: dict[str, str]


def find_gpus(implementation: str, at_most: int | None = None) -> Gpus:
  """The first `at_most` GPUs for kernels of `run.implementation`: of this machine's, or of those in
  an inherited CUDA_VISIBLE_DEVICES."""
  names, visible, needs = (
    _gpus_of_the_machine(),
    os.environ.get('CUDA_VISIBLE_DEVICES'),
    _NEEDS.get(implementation, _JAX),
  )
  if not names:
    return Gpus((), 'No NVIDIA GPU was found: kernels are computed on CPU.')
  if visible is not None:
    # Like CUDA, which ends the list at the first name that is none, such as -1.
    names = tuple(
      itertools.takewhile(
        re.compile(r'\d+|(GPU|MIG)-.+').fullmatch, map(str.strip, visible.split(','))
      )
    )
  names = names[:at_most]
  if not names:
    return Gpus((), f'CUDA_VISIBLE_DEVICES={visible} hides all GPUs: kernels are computed on CPU.')
  found = f'{len(names)} GPU{"s" if len(names) > 1 else ""}'
  if needs is None:
    return Gpus((), f'{found} found, but run.implementation={implementation} computes on CPU.')
  if not _has_any(needs):
    return Gpus(
      (),
      f'{found} found, but nothing to compute on them with: `make cuda` installs it. Kernels are computed on CPU.',
    )
  return Gpus(names, f'Kernels are computed on {found}: {", ".join(names)}.')


def take_gpu(implementation: str) -> Gpus:
  """Puts this process on the first GPU for `run.implementation`, or on CPU. JAX must not have
  started."""
  gpus = find_gpus(implementation, at_most=1)
  os.environ.update(environment(*gpus.names))
  return gpus


def no_gpus(implementation: str) -> Gpus:
  """In place of `find_gpus` in a process whose threads are the nodes and whose JAX keeps to the
  CPU."""
  del implementation
  os.environ.update(_HIDDEN)
  return Gpus((), 'Threads of one process: kernels are computed on CPU.')


def num_workers(configured: int, gpus: Sequence[str]) -> int:
  """Workers of a local launch: as configured, or one a GPU, or two on CPU."""
  return configured or len(gpus) or _ON_CPU


def worker_threads(configured: int, workers: int) -> int:
  """CPU threads of a worker: as configured, or an equal share of what this process may use."""
  return configured or max(1, len(os.sched_getaffinity(0)) // max(1, workers))


def place(workers: int, gpus: Sequence[str]) -> Placement:
  """Gives every worker a GPU in turn, if there are any, and the evaluator one that is left, or the
  last."""
  if not gpus:
    return Placement(environment(), [environment()] * workers, environment())
  of_workers, of_evaluator = [i % len(gpus) for i in range(workers)], min(workers, len(gpus) - 1)
  sharers = [*of_workers, of_evaluator]
  *of_workers, of_evaluator = [environment(gpus[gpu], sharers.count(gpu)) for gpu in sharers]
  return Placement(environment(), of_workers, of_evaluator)


def environment(gpu: str = '', sharers: int = 1) -> dict[str, str]:
  """For a process on a GPU that `sharers` processes use, or, without a name of one, on CPU and with
  no GPU in sight.

  On a GPU XLA takes memory when it needs it, up to the process's share.
  """
  if not gpu:
    return {**launcher_environment(), **_HIDDEN}
  return {
    **launcher_environment(),
    'CUDA_VISIBLE_DEVICES': gpu,
    'JAX_PLATFORMS': 'cuda,cpu' if _has_any(_JAX) else 'cpu',
    'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{_MEMORY / sharers:.3f}',
  }


def launcher_environment() -> dict[str, str]:
  """For a process whose JAX is to keep to the CPU, but which still has GPUs to find or to give to
  others.

  Libraries get one thread (XLA's CPU part by NPROC), since the bits of long dot products follow
  their number of threads; kernels use theirs on whole tiles. An empty grpc_proxy keeps gRPC, which
  would send even localhost there, from using http_proxy or https_proxy; downloads still do.
  """
  return {
    'NPROC': '1',
    'JAX_PLATFORMS': 'cpu',
    'OMP_NUM_THREADS': '1',
    'OPENBLAS_NUM_THREADS': '1',
    'grpc_proxy': '',
  }


def _has_any(packages: Sequence[str]) -> bool:
  return any(importlib.util.find_spec(package) for package in packages)


def _gpus_of_the_machine() -> tuple[str, ...]:
  """UUIDs, whose order no CUDA_DEVICE_ORDER changes; of a GPU that is cut into MIG slices, the
  slices'.

  From nvidia-smi, which comes with every driver: NVML's Python bindings would be one more package
  to install by hand where programs/local.py runs without requirements.txt, and ask for a loop over
  slices that this listing has done.
  """
  try:
    listing = subprocess.run(
      ['nvidia-smi', '-L'], capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True
    ).stdout
  except (OSError, subprocess.SubprocessError):
    return ()
  names = []
  for line in listing.splitlines():
    if found := re.search(r'UUID: ([^)]+)\)', line):
      if line.startswith(' ') and names and names[-1].startswith('GPU-'):
        names.pop()
      names.append(found[1])
  return tuple(names)
