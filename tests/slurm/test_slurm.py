"""--cluster=slurm on a real Slurm of several nodes on this machine: workers cancelled, a node lost, the coordinator requeued."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from nodes import run_directory
from programs import local

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CLUSTER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'cluster.sh')

if 'KIP_TEST_SLURM' not in os.environ:
  pytest.skip('takes minutes; run it by make test-slurm', allow_module_level=True)
if os.geteuid() or not all(map(shutil.which, ('slurmctld', 'slurmd', 'sbatch', 'munged'))):
  pytest.skip("needs root and Debian's slurm-wlm and munge", allow_module_level=True)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  folder = str(tmp_path / 'cluster')
  subprocess.run([CLUSTER, 'up', folder, '4'], check=True)
  monkeypatch.setenv('SLURM_CONF', f'{folder}/slurm.conf')
  yield folder
  subprocess.run([CLUSTER, 'down', folder], check=True)


def _output(*command):
  return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _wait(condition, seconds):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, _output('squeue')
    time.sleep(0.2)


def test_the_run_survives_all_and_ends_in_the_same_bits(tmp_path, cluster, npz, cache, make_run):
  workdir, num_steps = tmp_path / 'run', 120
  done = subprocess.run(
      [sys.executable, 'launch.py', '--cluster=slurm', '--config=configs/base.py', f'--workdir={workdir}', '--host=localhost',
       f'--config.run.data.name={npz}', f'--config.system.cache_dir={cache}', '--config.run.architecture=convnet2',
       '--config.run.images_per_class=2', '--config.run.targets_per_step=33', '--config.run.plan.support_tile=4',
       '--config.run.plan.target_tile=5', '--config.run.plan.target_tiles_per_task=2', f'--config.run.num_steps={num_steps}',
       '--config.system.num_workers=4', '--config.system.evaluation.nn_steps=0', '--config.system.snapshot_steps=0,1',
       '--config.system.log_seconds=0.1', '--config.system.checkpoint_seconds=1', '--config.system.lease_seconds=20',
       '--slurm_worker_options=--cpus-per-task=1'], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  coordinator, array = re.search(r'coordinator (\d+), .* workers (\d+)\.', done.stdout).groups()
  status = lambda: run_directory.RunDirectory(str(workdir)).read_status() or {'step': -1, 'generation': 0, 'state': None}

  def goes_on(generation=1):
    step = status()['step'] if status()['generation'] == generation else -1
    _wait(lambda: status()['generation'] == generation and status()['step'] > max(step, 0) + 3, 200)
  goes_on()
  subprocess.run(['scancel', f'{array}_1'], check=True)
  added = subprocess.run(shlex.split(re.search('add workers: (.*)', done.stdout)[1]), capture_output=True, text=True, check=True).stdout
  assert added.strip().isdigit()
  goes_on()
  home = _output('squeue', '--noheader', f'--jobs={coordinator}', '--format=%N').strip()
  lost = next(node for node in ('node4', 'node3') if node != home)
  with open(os.path.join(cluster, f'{lost}.pid'), encoding='ascii') as file:
    os.kill(int(file.read()), 9)
  goes_on()
  subprocess.run([CLUSTER, 'node', cluster, lost[-1]], check=True)
  subprocess.run(['scontrol', 'requeue', coordinator], check=True)
  _wait(lambda: status()['generation'] == 2, 300)  # Slurm waits two minutes
  _wait(lambda: status()['state'] == 'finished', 300)
  _wait(lambda: not _output('squeue', '--noheader', '--states=running,pending'), 60)

  run = make_run(tmp_path / 'local', {'run.num_steps': num_steps, 'system.snapshot_steps': (0, 1)})
  local.distil(run, threading.Event())
  with np.load(workdir / 'distilled.npz') as there, np.load(tmp_path / 'local' / 'distilled.npz') as here:
    for name in ('images', 'labels'):
      assert there[name].tobytes() == here[name].tobytes()
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == [0, 1, num_steps]
