"""Builds the native kernel with the system's C++ compiler: `python -m kernels.native.build`.

One shared library per instruction set, from the same sources. Their names carry a hash of sources,
flags and XLA's headers, and a library of another name is stale. The compiler does not count: what
is built is found without one. To build with another, remove `build/`.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys

INSTRUCTION_SETS = {  # the best one first
  'avx512': (
    '-mavx512f',
    '-mavx512dq',
    '-mavx512vl',
    '-mavx512bw',
    '-mavx2',
    '-mfma',
    '-mprefer-vector-width=512',
  ),
  'avx2': ('-mavx2', '-mfma'),
  'portable': (),
}
SOURCES = pathlib.Path(__file__).parent / 'src'
FOLDER = pathlib.Path(__file__).parent / 'build'

# -ffast-math would switch subnormal numbers off for the whole process that loads the library.
_FLAGS = (
  '-std=c++17',
  '-O3',
  '-fno-math-errno',
  '-fno-trapping-math',
  '-ffp-contract=fast',
  '-fPIC',
  '-shared',
  '-pthread',
  '-fno-gnu-unique',
  '-Wl,-Bsymbolic',
  '-Wno-psabi',
)


def compiler() -> list[str] | None:
  """The C++ compiler's command: $CXX, or the system's c++."""
  command = os.environ.get('CXX', 'c++').split()
  return command if command and shutil.which(command[0]) else None


def find(instruction_set: str) -> pathlib.Path | None:
  """The library for `instruction_set`, if one is built from these very sources."""
  path = _path(instruction_set)
  return path if path.exists() else None


def is_built() -> bool:
  return all(find(name) for name in INSTRUCTION_SETS)


def build() -> str:
  """Builds what is missing; returns a line that says what was done, or why nothing can be."""
  if platform.machine() not in ('x86_64', 'AMD64'):
    return (
      f'native kernel: not built, {platform.machine()} is not x86-64; the JAX kernel will be used.'
    )
  missing = [name for name in INSTRUCTION_SETS if not find(name)]
  if not missing:
    return f'native kernel: up to date in {FOLDER}.'
  command = compiler()
  if not command:
    wanted = os.environ.get('CXX', 'c++')
    return f'native kernel: not built, no C++ compiler ({wanted}) found; install one or set CXX. The JAX kernel will be used.'
  try:
    FOLDER.mkdir(exist_ok=True)
  except OSError as error:
    return (
      f'native kernel: not built, {FOLDER} cannot be written ({error.strerror}); '
      'the JAX kernel will be used.'
    )
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    compiled = pool.map(lambda name: _compile(command, name, _path(name)), missing)
    errors = list(filter(None, compiled))
  if errors:
    return f'native kernel: not built, {" ".join(command)} failed; the JAX kernel will be used.\n{errors[0]}'
  current = {_path(name) for name in INSTRUCTION_SETS}
  for path in FOLDER.glob('*.so'):
    if path not in current:
      path.unlink(missing_ok=True)
  return f'native kernel: built for {", ".join(missing)} in {FOLDER}.'


def _compile(command: list[str], instruction_set: str, path: pathlib.Path) -> str | None:
  """Compiles to a name of its own and renames, so that two builds at once do no harm. Returns the
  compiler's complaint, if any."""
  partial = path.with_suffix(f'.{os.getpid()}.partial')
  result = subprocess.run(
    [
      *command,
      *_FLAGS,
      *INSTRUCTION_SETS[instruction_set],
      '-isystem',
      str(_headers()),
      str(SOURCES / 'ffi.cc'),
      '-o',
      str(partial),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  if result.returncode:
    partial.unlink(missing_ok=True)
    return result.stderr.strip() or f'exit status {result.returncode}'
  partial.replace(path)
  return None


def _path(instruction_set: str) -> pathlib.Path:
  digest = hashlib.sha256(repr((_FLAGS, INSTRUCTION_SETS[instruction_set])).encode())
  headers = _headers()
  for path in [*sorted(SOURCES.iterdir()), *sorted((headers / 'xla' / 'ffi' / 'api').glob('*.h'))]:
    digest.update(path.name.encode() + path.read_bytes())
  return FOLDER / f'kip-{instruction_set}-{digest.hexdigest()[:16]}.so'


def _headers() -> pathlib.Path:
  import jaxlib  # not jax.ffi.include_dir(), which imports all of JAX for the same folder

  return pathlib.Path(jaxlib.__file__).parent / 'include'


if __name__ == '__main__':
  print(build())
  sys.exit(0)
