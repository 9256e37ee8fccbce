"""A CPU in the place of a GPU: the CUDA kernel's source compiled as plain C++, with a shim."""

import ctypes
import hashlib
import os
import pathlib
import subprocess
import threading

import numpy as np

from kernels.native import build

_SHIM = pathlib.Path(__file__).with_name('emulator.h')
_FOLDER = pathlib.Path(__file__).with_name('build')
_FLAGS = ('-std=c++17', '-O1', '-fPIC', '-shared', '-pthread', '-w')


class Emulator:
  """A `kernels.cuda.kernel.Device`. A block's threads are real ones; memory starts as NaN."""

  name, compiler = 'emulator', ''

  def __init__(
    self,
    threads: int = 1,
    blocks: int = 1,
    shared_bytes: int = 2**20,
    kept_bytes: int = 2**28,
    table_bytes: int = 2**29,
  ):
    self.threads, self.shared_bytes = threads, shared_bytes
    self.kept_bytes, self.table_bytes = kept_bytes, table_bytes
    self._blocks = blocks

  def load(self, plan):
    source = _SHIM.read_text(encoding='utf-8') + plan.source
    command = [*(build.compiler() or ['c++']), *_FLAGS]
    path = _FOLDER / f'cuda-{hashlib.sha256((source + repr(command)).encode()).hexdigest()[:20]}.so'
    if not path.exists():
      _FOLDER.mkdir(exist_ok=True)
      partial = path.with_suffix(f'.{os.getpid()}')
      subprocess.run(
        [*command, '-x', 'c++', '-', '-o', str(partial)], input=source, text=True, check=True
      )
      partial.replace(path)
    library = ctypes.CDLL(str(path))
    library.kip_new_barrier.restype = ctypes.c_void_p
    return library

  def upload(self, value):
    return np.array(value)

  def zeros(self, shape, dtype):
    return np.zeros(shape, dtype)

  def empty(self, shape, dtype):
    return np.full(shape, np.nan, dtype)

  def download(self, value):
    return value.copy()

  def blocks(self, program, name, work):
    return min(self._blocks, work)

  def launch(self, program, name, blocks, plan, arguments):
    arguments = [
      a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments
    ]

    def run(thread, block, shared, barrier):
      program.kip_be(thread, block, blocks, shared.ctypes.data_as(ctypes.c_void_p), barrier)
      getattr(program, name)(*arguments)

    for block in range(blocks):
      shared = np.full(plan.shared_bytes // 8 + 1, np.nan)
      if plan.threads == 1:
        run(0, block, shared, None)
        continue
      barrier = ctypes.c_void_p(program.kip_new_barrier(plan.threads))
      threads = [
        threading.Thread(target=run, args=(thread, block, shared, barrier))
        for thread in range(plan.threads)
      ]
      for thread in threads:
        thread.start()
      for thread in threads:
        thread.join()
