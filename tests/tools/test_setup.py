"""tools/setup.sh, with a stand-in for uv that tells its environment."""

import os
import shutil
import subprocess

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
UV = """#!/bin/sh
mkdir -p .venv
echo "$1 ${UV_CACHE_DIR:-none} ${UV_PYTHON_INSTALL_DIR:-none}" >> told
"""


@pytest.mark.parametrize('home, usable', [('home', True), ('file', False), ('file/below', False)])
def test_uv_has_a_place_for_its_files(tmp_path, home, usable):
  """A home that can be written is used, another is not."""
  copy = tmp_path / 'copy'
  (copy / 'tools').mkdir(parents=True)
  for name in ('tools/setup.sh', 'requirements.txt', 'requirements-cuda.txt'):
    shutil.copy(os.path.join(ROOT, name), copy / name)
  (tmp_path / 'home').mkdir()
  (tmp_path / 'file').touch()
  (tmp_path / 'uv').write_text(UV)
  (tmp_path / 'uv').chmod(0o755)
  environment = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'HOME': str(tmp_path / home)}
  done = subprocess.run(
    ['tools/setup.sh'],
    cwd=copy,
    env=environment,
    capture_output=True,
    text=True,
    timeout=60,
    check=True,
  )
  told = (copy / 'told').read_text().splitlines()
  assert [line.partition(' ')[0] for line in told] == ['venv', 'pip']
  places = 'none none' if usable else f'{copy}/.uv-home/cache {copy}/.uv-home/python'
  assert {line.partition(' ')[2] for line in told} == {places}
  assert ('cannot be written: uv keeps its files in .uv-home' in done.stdout) != usable
