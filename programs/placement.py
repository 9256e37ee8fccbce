"""The placement of the nodes' processes: a GPU or none, CPU threads, and the environment for both.

Nothing here starts JAX or CUDA: a process that has started CUDA holds memory on the GPU, and can no
longer be moved to another one.
"""

import importlib.util
import itertools
import os
import re
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

from kernels import cpus

_ON_CPU = 2  # workers, where the configuration leaves it open and there is no GPU
_MEMORY = 0.9  # share of a GPU's memory for all processes on it together
_NVIDIA_SMI_SECONDS = 60  # it initialises the driver where nobody has yet

# Packages of which kernels on a GPU need any one.
_JAX, _CUPY = ('jax_cuda12_plugin', 'jax_cuda13_plugin'), ('cupy',)
# By run.implementation; all others need JAX's. None: computes on CPU, whatever is installed.
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
  """Finds the first `at_most` GPUs for kernels of `run.implementation`.

  Of this machine's, or of those in an inherited CUDA_VISIBLE_DEVICES.
  """
  names = _gpus_of_the_machine()
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if not names:
    return Gpus((), 'No NVIDIA GPU was found: kernels are computed on CPU.')
  if visible is not None:
    # CUDA, too, ends the list at the first entry that is not a name, such as -1.
    given = map(str.strip, visible.split(','))
    names = tuple(itertools.takewhile(re.compile(r'\d+|(GPU|MIG)-.+').fullmatch, given))
  names = names[:at_most]
  if not names:
    return Gpus((), f'CUDA_VISIBLE_DEVICES={visible} hides all GPUs: kernels are computed on CPU.')
  found, needs = f'{len(names)} GPU{"s" * (len(names) > 1)}', _NEEDS.get(implementation, _JAX)
  if needs is None:
    return Gpus((), f'{found} found, but run.implementation={implementation} computes on CPU.')
  if not _has_any(needs):
    return Gpus(
      (),
      f'{found} found, but nothing to compute on them with: `make cuda` installs it. Kernels are '
      'computed on CPU.',
    )
  return Gpus(names, f'Kernels are computed on {found}: {", ".join(names)}.')


def take_gpu(implementation: str) -> Gpus:
  """Puts this process on the first GPU for `run.implementation`, or on CPU. JAX must not have
  started."""
  gpus = find_gpus(implementation, at_most=1)
  os.environ.update(environment(gpus.names[0] if gpus.names else ''))
  return gpus


def no_gpus(implementation: str) -> Gpus:
  """Replaces `find_gpus` in a process whose threads are the nodes: its JAX keeps to the CPU."""
  del implementation
  os.environ.update(_HIDDEN)
  return Gpus((), 'Threads of one process: kernels are computed on CPU.')


def num_workers(configured: int, gpus: Sequence[str]) -> int:
  """Number of workers of a local launch: as configured, or one a GPU, or two on CPU."""
  return configured or len(gpus) or _ON_CPU


def worker_threads(configured: int, workers: int) -> int:
  """CPU threads of a worker: as configured, or an equal share of what this process may use."""
  return configured or max(1, cpus.available() // max(1, workers))


def place(workers: int, gpus: Sequence[str]) -> Placement:
  """Gives every worker a GPU in turn, if there are any, and the evaluator one that is left over, or
  the last."""
  if not gpus:
    return Placement(environment(), [environment()] * workers, environment())
  places = [i % len(gpus) for i in range(workers)] + [min(workers, len(gpus) - 1)]
  on_gpus = [environment(gpus[place], places.count(place)) for place in places]
  return Placement(environment(), on_gpus[:-1], on_gpus[-1])


def environment(gpu: str = '', sharers: int = 1) -> dict[str, str]:
  """Environment of a process on a GPU that `sharers` processes use, or, if `gpu` is '', on CPU.

  On CPU it sees no GPU. On a GPU XLA takes memory when it needs it, up to the process's share.
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
  """Environment of a process whose JAX keeps to the CPU, but which may still find GPUs for others.

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
  """Lists UUIDs, whose order does not depend on CUDA_DEVICE_ORDER; for a GPU that is split into MIG
  slices, those of the slices.

  Asks nvidia-smi, which comes with every driver. NVML's Python bindings (nvidia-ml-py) would be one
  more package to install by hand where programs/local.py runs without requirements.txt, and would
  need a loop over the slices that nvidia-smi lists already.
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
