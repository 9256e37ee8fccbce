"""--cluster=slurm without a Slurm; tests/slurm has one."""

import os
import re
import subprocess
import sys

import pytest

from artifacts import run_directory
from programs import slurm_cluster, status

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.mark.parametrize(
  'given, passed_on',
  [
    (['--cluster=slurm', '--config=a.py', '--host=b'], ['--config=a.py', '--host=b']),
    (
      ['--cluster', 'slurm', '-slurm_options', '--time=1 --mem=2', '--workdir', 'c'],
      ['--workdir', 'c'],
    ),
    (
      ['--slurm_worker_options=--time=1', '--config.system.num_workers=3'],
      ['--config.system.num_workers=3'],
    ),
  ],
)
def test_the_coordinator_gets_the_other_flags(given, passed_on):
  assert slurm_cluster.passed_on(['launch.py', *given]) == passed_on


def _submit(tmp_path, npz, cache, path):
  return subprocess.run(
    [
      sys.executable,
      'launch.py',
      '--cluster=slurm',
      '--config=configs/base.py',
      f'--workdir={tmp_path}/run',
      f'--config.run.data.name={npz}',
      f'--config.system.cache_dir={cache}',
      '--config.run.targets_per_step=33',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    env={**os.environ, 'PATH': path},
  )


def test_no_slurm_gets_one_line_and_status_2(tmp_path, npz, cache):
  done = _submit(tmp_path, npz, cache, path=str(tmp_path))
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert 'error: sbatch cannot be run (No such file or directory)' in done.stderr


def test_what_sbatch_says_is_passed_on(tmp_path, npz, cache):
  (tmp_path / 'sbatch').write_text(
    '#!/bin/sh\necho "sbatch: error: invalid partition" >&2\nexit 1\n'
  )
  (tmp_path / 'sbatch').chmod(0o755)
  done = _submit(tmp_path, npz, cache, path=f'{tmp_path}:{os.environ["PATH"]}')
  assert (
    done.returncode == 2
    and 'error: sbatch refuses: sbatch: error: invalid partition' in done.stderr
  )
  assert re.search(
    r'Memory: about \d+\.\d GiB for the coordinator, \d+\.\d GiB for each worker, '
    r'\d+\.\d GiB for the evaluator',
    done.stderr,
  )


def test_a_submitted_run_says_so_until_it_starts(tmp_path, npz, cache):
  """Also where an earlier one has finished there; one that is refused leaves what it finds."""
  directory = run_directory.RunDirectory(str(tmp_path / 'run'))
  (tmp_path / 'sbatch').write_text('#!/bin/sh\necho 7\n')
  (tmp_path / 'sbatch').chmod(0o755)
  path = f'{tmp_path}:{os.environ["PATH"]}'
  done = _submit(tmp_path, npz, cache, path)
  assert done.returncode == 0 and 'Submitted: coordinator 7, evaluator 7' in done.stdout
  assert not directory.is_in_use()  # the coordinator's job may open it
  assert status.read(directory)['state'] == 'submitted'
  assert status.in_words(status.read(directory)).startswith('submitted\n  step 0 of 1000')
  directory.write_status(run_directory.FINISHED, step=1000, num_steps=1000, generation=1)
  (tmp_path / 'sbatch').write_text('#!/bin/sh\nexit 1\n')
  assert _submit(tmp_path, npz, cache, path).returncode == 2
  assert (directory.read_status() or {})['state'] == 'finished'
