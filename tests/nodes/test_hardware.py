"""A worker's fingerprint: the code that makes bits, and the library that it has compiled."""

import pathlib
import re
import shutil
import sys

import jaxlib
import numpy as np
import pytest

from kernels import registry
from kernels.native import build
from nodes import hardware, messages

CODE = hardware.software()['code']


@pytest.fixture
def copy(tmp_path):
  """A copy of the project's code at another path, without what Git ignores."""
  for name in CODE:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(hardware.ROOT / name, tmp_path / name)
  return tmp_path


def test_it_is_about_all_that_makes_bits():
  assert {
    'distillation/krr.py',
    'kernels/checked.py',
    'kernels/native/src/engine.h',
    'kernels/native/src/ffi.cc',
    'kernels/cuda/src/pairs.cu',
    'data/sampling.py',
    'configs/schema.py',
  } <= CODE.keys()
  folders = {pathlib.PurePath(name).parts[0] for name in CODE}
  assert folders == {'configs', 'data', 'distillation', 'kernels'}
  assert hardware.software()['protocol'] == messages.PROTOCOL


def test_a_copy_elsewhere_has_the_same(copy):
  (copy / 'kernels' / '__pycache__').mkdir()
  for extra in (
    'kernels/__pycache__/x.cpython-310.pyc',
    'kernels/native/src/.engine.h.swp',
    'data/.hidden.py',
    'data/notes.txt',
    'tests.py',
  ):
    (copy / extra).write_text('no code')
  (copy / 'distillation' / '.ipynb_checkpoints').mkdir()
  (copy / 'distillation' / '.ipynb_checkpoints' / 'krr.py').write_text('old')
  krr = copy / 'distillation' / 'krr.py'
  krr.write_bytes(krr.read_bytes().replace(b'\n', b'\r\n'))
  assert hardware.software(copy)['code'] == CODE


@pytest.mark.parametrize('name', ['distillation/krr.py', 'kernels/native/src/lines.h'])
def test_an_altered_file_is_the_one_that_differs(copy, name):
  path = copy / name
  path.write_text(path.read_text() + '\n')
  code = hardware.software(copy)['code']
  assert {file for file in CODE if code.pop(file) != CODE[file]} == {name} and not code


@pytest.mark.skipif(not build.is_built(), reason='the native kernel is not built')
def test_the_native_library_is_named_by_its_compiler_and_all_its_bytes(tmp_path):
  path = build.find(build.instruction_sets()[-1])
  assert path is not None
  kernel = registry.make_kernel('fc1', implementation='native', threads=1)
  used = build.find(kernel.instruction_set)
  assert used is not None and kernel.compiled == build.identity(used)
  content = path.read_bytes()
  for folder in (hardware.ROOT, pathlib.Path(jaxlib.__file__).parent):  # they differ by host
    assert str(folder).encode() not in content
  changed = bytearray(content)
  changed[len(changed) // 2] ^= 4
  (tmp_path / 'other.so').write_bytes(changed)
  same, other = build.identity(path), build.identity(tmp_path / 'other.so')
  compiler, _, digest = same.rpartition(', ')
  assert (sys.platform == 'darwin' or re.search('GCC|clang', compiler)) and len(digest) == 16
  assert other.rpartition(', ')[0] == compiler and other != same


def test_other_implementations_compile_nothing_of_their_own():
  kernel = registry.make_kernel('fc1', implementation='jax', threads=1)
  assert kernel.compiled == '' and kernel.dtype == np.float32
