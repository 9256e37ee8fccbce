"""NVRTC, from its wheel, by ctypes: compiles CUDA C++ without a GPU."""

import ctypes
import importlib.util
import pathlib


def library() -> ctypes.CDLL | None:
  """NVRTC of a wheel (nvidia-cuda-nvrtc-cu12, nvidia-cuda-nvrtc), or None."""
  for package in ('nvidia.cuda_nvrtc', 'nvidia.cu13'):
    try:
      spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
      spec = None
    for folder in (spec.submodule_search_locations if spec else None) or ():
      for path in pathlib.Path(folder).glob('lib/libnvrtc.so.*'):
        return ctypes.CDLL(str(path))
  return None


def compile_source(nvrtc: ctypes.CDLL, source: str, options: list[str]) -> tuple[bytes, str]:
  """Compiles CUDA C++.

  Returns:
    the cubin and the log.

  Raises:
    ValueError: there are errors; the message is the log.
  """
  program = ctypes.c_void_p()
  status = nvrtc.nvrtcCreateProgram(
    ctypes.byref(program), source.encode(), b'kernel.cu', 0, None, None
  )
  assert status == 0
  status = nvrtc.nvrtcCompileProgram(
    program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
  )

  def read(what):
    size = ctypes.c_size_t()
    getattr(nvrtc, f'nvrtcGet{what}Size')(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f'nvrtcGet{what}')(program, buffer)
    return buffer.raw

  log = read('ProgramLog').rstrip(b'\0').decode()
  if status:
    raise ValueError(log)
  return read('CUBIN'), log
