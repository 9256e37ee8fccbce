"""tools/setup.sh, with a stand-in for uv that writes down how it is called."""

import os
import shutil
import subprocess

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
UV = """#!/bin/sh
mkdir -p .venv
echo "$1 ${UV_CACHE_DIR:-none} ${UV_PYTHON_INSTALL_DIR:-none}" >> places
for last; do :; done
echo "$1 $last" >> calls
"""


@pytest.fixture
def setup(tmp_path):
  """A function (*arguments, home) -> the finished process of setup.sh in `tmp_path / 'copy'`."""
  copy = tmp_path / 'copy'
  (copy / 'tools').mkdir(parents=True)
  requirements = [f'requirements{extra}.txt' for extra in ('', '-dev', '-cuda')]
  for name in ('tools/setup.sh', *requirements):
    shutil.copy(os.path.join(ROOT, name), copy / name)
  (tmp_path / 'home').mkdir()
  (tmp_path / 'file').touch()
  (tmp_path / 'uv').write_text(UV)
  (tmp_path / 'uv').chmod(0o755)

  def run(*arguments, home='home'):
    return subprocess.run(
      ['tools/setup.sh', *arguments],
      cwd=copy,
      env={'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'HOME': str(tmp_path / home)},
      capture_output=True,
      text=True,
      timeout=60,
      check=False,
    )

  return run


@pytest.mark.parametrize('home, usable', [('home', True), ('file', False), ('file/below', False)])
def test_uv_has_a_place_for_its_files(tmp_path, setup, home, usable):
  """A home that can be written is used, another is not."""
  done = setup(home=home)
  assert done.returncode == 0, done.stderr
  copy = tmp_path / 'copy'
  lines = [line.partition(' ') for line in (copy / 'places').read_text().splitlines()]
  assert [command for command, _, _ in lines] == ['venv', 'pip']
  places = 'none none' if usable else f'{copy}/.uv-home/cache {copy}/.uv-home/python'
  assert {rest for _, _, rest in lines} == {places}
  assert ('cannot be written: uv keeps its files in .uv-home' in done.stdout) != usable


def test_each_file_of_requirements_is_installed_once_and_again_when_it_has_changed(tmp_path, setup):
  copy = tmp_path / 'copy'

  def calls(*arguments):
    (copy / 'calls').write_text('')
    done = setup(*arguments)
    assert done.returncode == 0, done.stderr
    return (copy / 'calls').read_text().splitlines()

  base = ['venv .venv', 'pip requirements.txt']
  dev = ['pip requirements-dev.txt']
  cuda = ['pip requirements-cuda.txt']
  assert calls('dev') == base + dev
  assert calls('cuda') == cuda
  assert calls() == calls('dev') == calls('cuda') == []
  with open(copy / 'requirements-dev.txt', 'a') as file:
    file.write('# changed\n')
  assert calls('cuda') == []
  assert calls('dev') == dev
  with open(copy / 'requirements.txt', 'a') as file:
    file.write('# changed\n')
  assert calls() == base
  assert calls('dev') == dev
  assert calls('cuda') == cuda


def test_unknown_arguments_are_refused(tmp_path, setup):
  done = setup('gpu')
  assert done.returncode == 1 and "unknown argument 'gpu'" in done.stderr
  assert not (tmp_path / 'copy' / 'calls').exists()
