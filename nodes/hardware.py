"""Describes a worker: all of it that can change the bits of its results, and its speed."""

import platform
import time
from typing import Any

import jax
import numpy as np

from artifacts import hardware
from configs import schema
from data import store
from kernels.contract import Kernel

# A larger block is measured if it takes no longer than this at the speed so far, which is far too
# low after a single pair.
_CALIBRATION_SECONDS = 80.0


def fingerprint(kernel: Kernel, prepared: store.Prepared) -> dict[str, Any]:
  """Names all that can change the bits of a result, apart from the run's configuration."""
  return {
    'implementation': kernel.implementation,
    'dtype': str(kernel.dtype),
    'instruction_set': kernel.instruction_set,
    'device': kernel.device or _device(),
    'data': prepared.content,
    'numpy': np.__version__,
    'jax': jax.__version__,
    'python': platform.python_version(),
  }


def pairs_per_second(
  kernel: Kernel, images: np.ndarray, run: schema.Run, num_support: int
) -> float:
  """Measures the speed on a single pair, then on larger blocks if these are cheap; also compiles.

  Args:
    kernel: to be measured.
    images: [N, H, W, D], the training set.
    run: with its plan and method.
    num_support: `S`.
  """

  def compute(x1: np.ndarray, x2: np.ndarray) -> None:
    if run.method == 'label_solve':
      kernel.block(x1, x2)
    else:
      kernel.block_vjp(x1, x2, lambda block: block)

  rows = run.plan.split_support(num_support) or num_support
  columns = min(run.plan.target_tile, len(images))
  rate = 0.0
  for a, b in ((1, 1), (rows, min(16, columns)), (rows, columns)):
    if rate and a * b > rate * _CALIBRATION_SECONDS:
      break
    x1, x2 = images[:a], images[len(images) - b :]
    compute(x1, x2)
    start = time.perf_counter()
    compute(x1, x2)
    rate = a * b / (time.perf_counter() - start)
  return rate


def _device() -> str:
  """Names the device that JAX computes on."""
  device = jax.devices()[0]
  return hardware.cpu_model() if device.platform == 'cpu' else device.device_kind
