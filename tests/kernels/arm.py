"""The native kernel compiled for 64-bit Arm, on an emulated processor.

There is no JAX there: `stand_in.cc` calls the library's functions in XLA's place.
"""

import pathlib
import shutil
import subprocess

import jax
import numpy as np

from kernels.native import build
from kernels.native import kernel as native

# Clang takes the standard library and the linker from GCC.
COMPILERS = {'gcc': ['aarch64-linux-gnu-g++'], 'clang': ['clang++', '--target=aarch64-linux-gnu']}

_GCC = COMPILERS['gcc'][0]
_QEMU = 'qemu-aarch64'
_STAND_IN = pathlib.Path(__file__).with_name('stand_in.cc')
_FOLDER = pathlib.Path(__file__).with_name('build')
_DTYPES = {'int64': 5, 'float32': 11, 'float64': 12}  # XLA_FFI_DataType


def missing(compiler: str) -> str:
  """Names the programs that this machine lacks for a compiler of COMPILERS; '' if none."""
  programs = sorted({_GCC, COMPILERS[compiler][0]})
  absent = [program for program in programs if not shutil.which(program)]
  return ' and '.join(absent if _qemu() else [*absent, _QEMU])


def library(compiler: str) -> pathlib.Path:
  """Builds the library as on such a machine, if this compiler has not yet.

  Raises:
    ValueError: it cannot be compiled.
  """
  folder = _FOLDER / f'arm-{compiler}'
  folder.mkdir(parents=True, exist_ok=True)
  said = build.build(folder, 'aarch64', COMPILERS[compiler])
  path = build.find('neon', folder)
  if not path:
    raise ValueError(said)
  return path


class Processor:
  """An emulated processor that has loaded the library: a `kernels.native.kernel.Library`."""

  def __init__(self, compiler: str, folder: pathlib.Path):
    """`compiler`: of COMPILERS; `folder`: for the program that calls the library."""
    self.compiler = compiler
    program = folder / 'stand_in'
    flags = ['-std=c++17', '-O1', '-isystem', jax.ffi.include_dir()]
    subprocess.run([_GCC, *flags, str(_STAND_IN), '-o', str(program), '-ldl'], check=True)
    libc = subprocess.check_output([_GCC, '-print-file-name=libc.so.6'], text=True).strip()
    root = pathlib.Path(libc).resolve().parents[1]
    self._process = subprocess.Popen(
      [str(_qemu()), '-L', str(root), str(program), str(library(compiler))],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    assert self._process.stdin and self._process.stdout
    self._to, self._from = self._process.stdin, self._process.stdout
    name, vector_bytes = self._from.readline().decode().split()
    self.instruction_set, self.vector_bytes = name, int(vector_bytes)

  def call(self, name, results, arguments, attributes):
    """See `Library.call`."""
    arguments = [np.ascontiguousarray(argument) for argument in arguments]
    self._to.write(_text(native.HANDLERS[name]) + _number(len(arguments)))
    for argument in arguments:
      self._to.write(_shape(argument) + argument.tobytes())
    self._to.write(_number(len(results)))
    self._to.write(b''.join(map(_shape, results)) + _number(len(attributes)))
    for key, value in attributes.items():
      self._to.write(_text(key) + _shape(value) + value.tobytes())
    self._to.flush()
    return [self._array(result) for result in results]

  def close(self) -> None:
    """Ends it.

    Raises:
      AssertionError: it has failed.
    """
    self._to.close()
    assert self._process.wait(timeout=60) == 0

  def _array(self, result: jax.ShapeDtypeStruct) -> np.ndarray:
    array = np.empty(result.shape, result.dtype)
    data = self._from.read(array.nbytes)
    assert len(data) == array.nbytes, 'the emulated processor stopped; it says why on stderr'
    return np.frombuffer(data, array.dtype).reshape(array.shape)


def _qemu() -> str | None:
  return shutil.which(_QEMU) or shutil.which(f'{_QEMU}-static')


def _number(value: int) -> bytes:
  return np.int64(value).tobytes()


def _text(value: str) -> bytes:
  return _number(len(value)) + value.encode()


def _shape(array: np.ndarray | np.generic | jax.ShapeDtypeStruct) -> bytes:
  numbers = [_DTYPES[str(array.dtype)], len(array.shape), *array.shape]
  return np.array(numbers, np.int64).tobytes()
