"""`make` and `make demo`, in a copy with stand-ins for setup.sh and launch.py."""

import fcntl
import os
import re
import shutil
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LAUNCH = f"""
import os, sys
sys.path.insert(0, {ROOT!r})
from artifacts import run_directory
[workdir] = [flag.partition('=')[2] for flag in sys.argv if flag.startswith('--workdir=')]
directory = run_directory.RunDirectory(workdir)
os.makedirs(directory.path, exist_ok=True)
directory.write_command([os.path.basename(sys.executable), *sys.orig_argv[1:]])  # as launches do
open(os.path.join(directory.path, 'ran'), 'a').write('.')
"""


@pytest.fixture
def make(tmp_path):
  """A function (*arguments) -> the finished process of make in `tmp_path / 'copy'`."""
  copy = tmp_path / 'copy'
  (copy / 'tools').mkdir(parents=True)
  for name in ('Makefile', 'tools/demo.sh'):
    shutil.copy(os.path.join(ROOT, name), copy / name)
  (copy / 'tools' / 'setup.sh').write_text('#!/bin/sh\n')
  # A Python that runs files and no module: nothing is built.
  (copy / 'python').write_text(f'#!/bin/sh\n[ "$1" = -m ] || exec {sys.executable} "$@"\n')
  (copy / 'launch.py').write_text(LAUNCH)
  for name in ('tools/setup.sh', 'python'):
    (copy / name).chmod(0o755)
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith('MAKE') and name != 'DEMO_DIR'
  }
  return lambda *arguments: subprocess.run(
    ['make', 'PYTHON=./python', *arguments],
    cwd=copy,
    env=environment,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


def _content(folder):
  return {os.path.relpath(path, folder): names for path, _, names in os.walk(folder)}


def test_help_is_the_default_and_has_a_line_for_each_target(make, tmp_path):
  before = _content(tmp_path)
  done = make()
  assert done.returncode == 0
  assert done.stdout == make('help').stdout and _content(tmp_path) == before
  with open(os.path.join(ROOT, 'Makefile'), encoding='utf-8') as file:
    lines = file.read().replace('\\\n', '')
  phony = re.search(r'^\.PHONY: (.*)$', lines, re.MULTILINE)
  assert phony
  targets = phony[1].split()
  assert {'help', 'demo', 'test', 'lint', 'clean'} <= set(targets)
  assert [line.split()[0] for line in done.stdout.splitlines()] == targets
  assert all(len(line.split()) > 2 for line in done.stdout.splitlines())


@pytest.mark.parametrize('name', ['runs/demo', 'with a blank', "it's", '-x', '$HOME'])
def test_a_demo_takes_the_place_of_an_earlier_one(make, tmp_path, name):
  name = name.replace('$', '$$')
  folder = tmp_path / 'copy' / name.replace('$$', '$')
  flags = [] if name == 'runs/demo' else [f'DEMO_DIR={name}']
  for _ in range(2):
    done = make('demo', *flags)
    assert done.returncode == 0, done.stderr
    assert (folder / 'ran').read_text() == '.'
    (folder / 'rest').write_text('of the first')
  done = make('demo', *flags)
  assert done.returncode == 0 and not (folder / 'rest').exists()


def test_an_empty_folder_is_taken(make, tmp_path):
  (tmp_path / 'empty').mkdir()
  assert make('demo', f'DEMO_DIR={tmp_path}/empty').returncode == 0
  assert (tmp_path / 'empty' / 'ran').read_text() == '.'


@pytest.mark.parametrize(
  'kind', ['files', 'a run', 'a demo that went on', 'a file', 'a link', 'above', 'root', 'nothing']
)
def test_what_is_not_a_demo_is_refused_and_stays(make, tmp_path, kind):
  folder = tmp_path / 'mine'
  folder.mkdir()
  (folder / 'precious').write_text('years of work')
  command = 'python launch.py --config=configs/digits.py --workdir=mine --lp_launch_type=local_mp'
  if kind == 'a run':
    (folder / 'command.txt').write_text(
      'python launch.py --config=configs/digits.py --workdir=mine\n'
    )
  elif kind == 'a demo that went on':
    (folder / 'command.txt').write_text(
      command.replace(' --lp', ' --config.run.num_steps=500 --lp') + '\n'
    )
  elif kind == 'a link':
    (tmp_path / 'link').symlink_to(folder)
  elif kind == 'above':
    (folder / 'demo').mkdir()
    (folder / 'demo' / 'command.txt').write_text(command + '\n')
  others = {'a file': folder / 'precious', 'a link': tmp_path / 'link', 'root': '/', 'nothing': ''}
  named = others.get(kind, folder)
  before = _content(tmp_path)
  done = make('demo', f'DEMO_DIR={named}')
  lines = [line for line in done.stderr.splitlines() if not line.startswith('make')]
  assert done.returncode == 2 and len(lines) == 1, done.stderr
  assert lines[0].startswith(f'demo: DEMO_DIR={named} ')
  assert ('names no folder' if kind == 'nothing' else "is not an earlier demo's") in lines[0]
  assert _content(tmp_path) == before and (folder / 'precious').read_text() == 'years of work'


def test_a_demo_that_is_still_going_is_left_alone(make, tmp_path):
  make('demo')
  folder = tmp_path / 'copy' / 'runs' / 'demo'
  with open(folder / '.lock', 'w', encoding='utf-8') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = make('demo')
    assert done.returncode == 2 and 'is in use by a demo that is still going' in done.stderr
    assert (folder / 'ran').read_text() == '.'
