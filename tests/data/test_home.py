"""Users whose home is not there or cannot be written: every program runs, and says where data
go."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import numpy as np
import pytest

from data import home, store

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
VARIABLES = (
  'HOME',
  'XDG_CACHE_HOME',
  'XDG_CONFIG_HOME',
  'MPLCONFIGDIR',
  'CUPY_CACHE_DIR',
  'HF_HOME',
  'HF_DATASETS_CACHE',
)
STRANGER = 12345  # a user that nobody knows


@pytest.fixture
def environment(monkeypatch, tmp_path):
  """os.environ of a user with the home tmp_path/home and the temporary folder tmp_path/tmp."""
  for name in ('home', 'tmp'):
    (tmp_path / name).mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'tmp'))
  with mock.patch.dict(os.environ):
    for name in VARIABLES:
      os.environ.pop(name, None)
    os.environ['HOME'] = str(tmp_path / 'home')
    yield os.environ


def _set(environment):
  return {name: environment[name] for name in VARIABLES if name in environment}


def test_a_home_that_can_be_written_is_used(environment, tmp_path, caplog):
  before = _set(environment)
  assert store.cache_folder() == f'{tmp_path}/home/.cache/kip'
  assert store.cache_folder(f'{tmp_path}/mine') == f'{tmp_path}/mine'
  environment['XDG_CACHE_HOME'] = f'{tmp_path}/made/later'
  assert store.cache_folder() == f'{tmp_path}/made/later/kip'
  del environment['XDG_CACHE_HOME']
  assert _set(environment) == before and not caplog.messages
  assert os.listdir(tmp_path / 'home') == os.listdir(tmp_path / 'tmp') == []


@pytest.mark.parametrize('configured', ['', 'mine', 'home/.cache'])
def test_one_that_cannot_be_gets_a_folder_that_can(environment, tmp_path, caplog, configured):
  for name in ('.cache', '.config', '.cupy'):
    (tmp_path / 'home' / name).write_text('')  # in the way
  configured = configured and f'{tmp_path}/{configured}'
  folder = configured if configured.endswith('mine') else f'{tmp_path}/tmp/kip-{os.getuid()}'
  for _ in range(2):
    assert store.cache_folder(configured) == (configured or f'{folder}/kip')
  assert _set(environment) == {
    'HOME': f'{tmp_path}/home',
    'XDG_CACHE_HOME': folder,
    'MPLCONFIGDIR': f'{folder}/matplotlib',
    'CUPY_CACHE_DIR': f'{folder}/cupy',
  }
  assert caplog.messages == [
    f'{tmp_path}/home/.cache cannot be written: data and caches are kept in {folder}.'
  ]


def test_what_the_user_has_set_stays(environment, tmp_path):
  environment.update(
    HOME='/nonexistent/home',
    MPLCONFIGDIR='a',
    CUPY_CACHE_DIR='b',
    HF_HOME='c',
    XDG_CACHE_HOME=str(tmp_path),
  )
  before = _set(environment)
  assert store.cache_folder() == f'{tmp_path}/kip' and _set(environment) == before


def test_nobody_elses_temporary_folder_is_used(environment, tmp_path):
  environment['HOME'] = '/nonexistent/home'
  (tmp_path / 'tmp' / f'kip-{os.getuid()}').symlink_to(tmp_path / 'home' if os.getuid() else '/')
  home.settle()
  if os.getuid() == 0:
    os.unlink(tmp_path / 'tmp' / 'kip-0')
    (tmp_path / 'tmp' / 'kip-0').mkdir()
    os.chown(tmp_path / 'tmp' / 'kip-0', STRANGER, STRANGER)
    del environment['XDG_CACHE_HOME']
    home.settle()
  assert os.path.dirname(environment['XDG_CACHE_HOME']) == f'{tmp_path}/tmp'
  assert (
    environment['XDG_CACHE_HOME'] != f'{tmp_path}/tmp/kip-{os.getuid()}'
    and os.stat(environment['XDG_CACHE_HOME']).st_mode & 0o77 == 0
  )


@pytest.fixture
def parquet(npz, tmp_path):
  """A folder with the small set as the hub has it, one channel of it."""
  import datasets

  with np.load(npz) as file:
    for split in ('train', 'test'):
      features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('int64')})
      rows = {
        'image': [np.ascontiguousarray(image[..., 0]) for image in file[f'x_{split}']],
        'label': file[f'y_{split}'],
      }
      (tmp_path / 'parquet').mkdir(exist_ok=True)
      datasets.Dataset.from_dict(rows, features=features).to_parquet(
        str(tmp_path / 'parquet' / f'{split}.parquet')
      )
  return tmp_path / 'parquet'


@pytest.fixture
def strangers():
  """A folder of the stranger's, below none that only others may enter."""
  folder = pathlib.Path(tempfile.mkdtemp())
  for path in (folder, folder / 'tmp', folder / 'here'):
    path.mkdir(exist_ok=True)
    os.chown(path, STRANGER, STRANGER)
  yield folder
  shutil.rmtree(folder)


@pytest.mark.skipif(
  os.getuid() != 0 or not shutil.which('setpriv'),
  reason='needs root, and setpriv, to become a user that nobody knows',
)
@pytest.mark.parametrize(
  'home_is, configured', [(None, False), ('/nonexistent', False), ('/', True)]
)
def test_every_program_runs_for_a_user_without_a_home(strangers, parquet, home_is, configured):
  environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
  environment.update(
    PYTHONPATH=ROOT, TMPDIR=str(strangers / 'tmp'), **({'HOME': home_is} if home_is else {})
  )
  folder = strangers / 'here' / 'mine' if configured else strangers / 'tmp' / f'kip-{STRANGER}'
  # It may read everything: an interpreter below root's own home could not be started else.
  stranger = [
    'setpriv',
    f'--reuid={STRANGER}',
    f'--regid={STRANGER}',
    '--clear-groups',
    '--inh-caps=+dac_read_search',
    '--ambient-caps=+dac_read_search',
    sys.executable,
    '-m',
  ]

  def run(program, *flags):
    done = subprocess.run(
      [*stranger, program, *flags],
      cwd=strangers / 'here',
      env=environment,
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert (
      output.count('data and caches are kept in')
      == output.count(f'data and caches are kept in {folder}.')
      == 1
    ), output
    return output

  config = [
    f'--config={ROOT}/configs/base.py',
    *([f'--config.system.cache_dir={folder}'] if configured else []),
  ]
  run(
    'programs.local',
    *config,
    '--workdir=run',
    '--config.run.data.name=blobs',
    f'--config.run.data.dir={parquet}',
    '--config.run.architecture=fc1',
    '--config.run.num_steps=1',
    '--config.run.images_per_class=2',
    '--config.run.targets_per_step=33',
    '--config.system.evaluation.nn_steps=0',
    '--config.system.num_workers=1',
  )
  if home_is is None:
    run('programs.export', 'run/distilled.npz', '--to=dataset', '--format=dataset')
    run('programs.report', '--workdir=run')
    assert 'distilled ' in run('programs.evaluate', '--dataset=run/distilled.npz')
  assert {'matplotlib', *([] if configured else ['kip'])} <= set(os.listdir(folder))
  expected = {'run', *(['dataset'] if home_is is None else []), *(['mine'] if configured else [])}
  assert set(os.listdir(strangers / 'here')) == expected
  assert {'report.html', 'images.png'} <= set(os.listdir(strangers / 'here' / 'run'))
  assert os.listdir(strangers / 'tmp') == [name for name in [folder.name] if not configured]
