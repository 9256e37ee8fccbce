"""Builds the native kernel with the system's C++ compiler: `python -m kernels.native.build`.

One shared library per instruction set, from the same sources. Their names carry a hash of sources,
flags and XLA's headers, and a library of another name is stale. The compiler is not in the hash:
what is built is found without one. To build with another compiler, remove `build/`.
"""

import concurrent.futures
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

# By the machine's name on Linux and on macOS; the best one first.
_INSTRUCTION_SETS = {
  'x86_64': ('avx512', 'avx2', 'portable'),
  'aarch64': ('neon',),
  'arm64': ('neon',),
}
_OWN_FLAGS = {
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
  'neon': (),
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
  '-Wno-psabi',
  # Messages of XLA's headers name their file: no folder of this machine's in the library.
  '-fmacro-prefix-map={headers}=',
  # Several libraries in one process share no function: hidden are ours, and -Bsymbolic binds what
  # the standard library's templates make. On macOS the first does for both; there a library has a
  # name, by default the path that it is first written to.
  '-fvisibility=hidden',
  '-Wl,-install_name,kip' if sys.platform == 'darwin' else '-Wl,-Bsymbolic',
)


def instruction_sets(machine: str = platform.machine()) -> tuple[str, ...]:
  """Those that libraries are built for, the best one first; none where there is no such kernel."""
  return _INSTRUCTION_SETS.get(machine, ())


def compiler() -> list[str] | None:
  """The C++ compiler's command, $CXX or the system's c++; None where there is no such program."""
  command = os.environ.get('CXX', 'c++').split()
  return command if command and shutil.which(command[0]) else None


def find(
  instruction_set: str, folder: pathlib.Path = FOLDER, sources: pathlib.Path = SOURCES
) -> pathlib.Path | None:
  """The library for `instruction_set`, if one is built from these very sources."""
  path = _path(instruction_set, folder, sources)
  return path if path.exists() else None


def is_built(
  folder: pathlib.Path = FOLDER, sources: pathlib.Path = SOURCES, machine: str = platform.machine()
) -> bool:
  """Whether there is a library for every instruction set of a machine that has any."""
  names = instruction_sets(machine)
  return bool(names) and all(find(name, folder, sources) for name in names)


def identity(path: pathlib.Path) -> str:
  """Names a library by the compiler that made it, and by a digest of all its bytes.

  The same compiler makes the same bytes wherever it runs.
  """
  content = path.read_bytes()
  found = re.search(rb'(GCC: [^\0]*|clang version [^\0]*)\0', content)
  compiler = found[1].decode(errors='replace') if found else 'unknown compiler'
  return f'{compiler}, {hashlib.sha256(content).hexdigest()[:16]}'


def build(
  folder: pathlib.Path = FOLDER, machine: str = platform.machine(), command: list[str] | None = None
) -> str:
  """Builds the missing libraries in `folder`.

  Args:
    folder: is made, in one that is there.
    machine: to build for, as `platform.machine` names it.
    command: the C++ compiler for that machine, by default `compiler()`.

  Returns:
    a line that says what was built, or why nothing could be.
  """
  refusal = 'native kernel: not built, {}; the JAX kernel will be used.'
  names = instruction_sets(machine)
  if not names:
    return refusal.format(f'{machine} is neither x86-64 nor 64-bit Arm')
  missing = [name for name in names if not find(name, folder)]
  if not missing:
    return f'native kernel: up to date in {folder}.'
  command = command or compiler()
  if not command:
    wanted = os.environ.get('CXX', 'c++')
    return (
      f'native kernel: not built, no C++ compiler ({wanted}) found; install one or set CXX. '
      'The JAX kernel will be used.'
    )
  try:
    folder.mkdir(exist_ok=True)
  except OSError as error:
    return refusal.format(f'{folder} cannot be written ({error.strerror})')
  paths = {name: _path(name, folder) for name in names}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    compiled = pool.map(lambda name: _compile(command, name, paths[name]), missing)
    errors = [error for error in compiled if error]
  if errors:
    return refusal.format(f'{" ".join(command)} failed') + f'\n{errors[0]}'
  for path in folder.glob('*.so'):
    if path not in paths.values():
      path.unlink(missing_ok=True)
  return f'native kernel: built for {", ".join(missing)} in {folder}.'


def _compile(command: list[str], instruction_set: str, path: pathlib.Path) -> str | None:
  """Compiles to a name of its own and renames, so that two builds at once do no harm.

  Returns:
    the compiler's complaint, if any.
  """
  partial = path.with_suffix(f'.{os.getpid()}.partial')
  headers = str(_headers())
  flags = [flag.format(headers=headers) for flag in _FLAGS]
  flags += [*_OWN_FLAGS[instruction_set], '-isystem', headers]
  result = subprocess.run(
    [*command, *flags, str(SOURCES / 'ffi.cc'), '-o', str(partial)],
    capture_output=True,
    text=True,
    check=False,
  )
  if result.returncode:
    partial.unlink(missing_ok=True)
    return result.stderr.strip() or f'exit status {result.returncode}'
  partial.replace(path)
  return None


def _path(
  instruction_set: str, folder: pathlib.Path, sources: pathlib.Path = SOURCES
) -> pathlib.Path:
  digest = hashlib.sha256(repr((_FLAGS, _OWN_FLAGS[instruction_set])).encode())
  headers = _headers()
  for path in [*sorted(sources.iterdir()), *sorted((headers / 'xla' / 'ffi' / 'api').glob('*.h'))]:
    digest.update(path.name.encode() + path.read_bytes())
  return folder / f'kip-{instruction_set}-{digest.hexdigest()[:16]}.so'


def _headers() -> pathlib.Path:
  import jaxlib  # Not jax.ffi.include_dir(), which imports all of JAX for the same folder.

  return pathlib.Path(jaxlib.__file__).parent / 'include'


if __name__ == '__main__':
  print(build())
