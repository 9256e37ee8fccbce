"""Describes a worker: all of it that can change the bits of its results, and its speed."""

import hashlib
import pathlib
import platform
import time
from typing import Any

import jax
import numpy as np

from artifacts import hardware
from configs import schema
from data import store
from kernels.contract import Kernel
from nodes import messages

ROOT = pathlib.Path(__file__).parent.parent
# What makes bits, or cuts a step into tasks; what else there is moves arrays, or draws them.
_CODE = ('configs/schema.py', 'data', 'distillation', 'kernels')
_SUFFIXES = ('.py', '.h', '.cc', '.cu')
# A larger block is measured if it takes no longer than this at the speed so far, which is far too
# low after a single pair.
_CALIBRATION_SECONDS = 80.0


def fingerprint(kernel: Kernel, prepared: store.Prepared) -> dict[str, Any]:
  """Names all that can change the bits of a result, apart from the run's configuration."""
  return {
    **software(),
    'implementation': kernel.implementation,
    'dtype': str(kernel.dtype),
    'instruction_set': kernel.instruction_set,
    'device': kernel.device or _device(),
    'compiled': kernel.compiled,
    'data': prepared.content,
    'numpy': np.__version__,
    'jax': jax.__version__,
    'python': platform.python_version(),
  }


def software(root: pathlib.Path = ROOT) -> dict[str, Any]:
  """The part of a fingerprint that the coordinator has, too: its protocol, and its code in `root`.

  Returns:
    `protocol`, and `code` {file: digest}. Line ends do not count: a checkout may change them.
  """
  code = {}
  for name in _CODE:
    path = root / name
    for file in sorted(path.rglob('*')) if path.is_dir() else [path]:
      name = file.relative_to(root).as_posix()
      if file.suffix in _SUFFIXES and '/.' not in name:  # hidden files and folders are editors'
        content = file.read_bytes().replace(b'\r\n', b'\n')
        code[name] = hashlib.sha256(content).hexdigest()[:16]
  return {'protocol': messages.PROTOCOL, 'code': code}


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
