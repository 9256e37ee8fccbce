"""Where the nodes' processes run: the environment each of them gets."""

import os


def worker_threads(configured: int, num_workers: int) -> int:
  """CPU threads of a worker: as configured, or an equal share of what this process may use."""
  return configured or max(1, len(os.sched_getaffinity(0)) // num_workers)


def environment(threads: int) -> dict[str, str]:
  """For a process that computes on `threads` CPU threads, or shares a process with those that do.

  XLA itself gets one thread (NPROC): the bits of its long dot products follow its thread count. Kernels use their threads on whole tiles.
  """
  return {'NPROC': '1', 'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': str(threads), 'OPENBLAS_NUM_THREADS': str(threads)}
