"""--cluster=slurm on a real Slurm of several nodes on this machine: jobs that are cancelled,
requeued and added, and a node that is lost; steps of an allocation; and each worker's GPU."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import compiled
import numpy as np
import psutil
import pytest

from artifacts import run_directory
from configs import cifar10_fc1, schema
from data import store
from programs import local, start

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
CLUSTER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'cluster.sh')
CIFAR = os.path.join(ROOT, '..', 'shared', 'data', 'cifar10')
NEEDS_CIFAR = pytest.mark.skipif(
  not os.path.isdir(CIFAR), reason='CIFAR-10 is not beside this checkout (../shared/data)'
)

if 'KIP_TEST_SLURM' not in os.environ:
  pytest.skip('takes minutes; run it by make test-slurm', allow_module_level=True)
if os.geteuid() or not all(map(shutil.which, ('slurmctld', 'slurmd', 'sbatch', 'munged'))):
  pytest.skip("needs root and Debian's slurm-wlm and munge", allow_module_level=True)


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp('cluster'))
  subprocess.run([CLUSTER, 'up', folder, '4'], check=True)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('SLURM_CONF', f'{folder}/slurm.conf')
    yield folder
  subprocess.run([CLUSTER, 'down', folder], check=True)


def _output(*command):
  return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _wait(condition, seconds, explain=lambda: ''):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, _output('squeue') + explain()
    time.sleep(0.2)


def _status(workdir):
  found = run_directory.RunDirectory(str(workdir)).read_status()
  return found or {'step': -1, 'generation': 0, 'state': None}


def _logs(workdir):
  return ''.join(
    f'\n{path.name}:\n{path.read_text()[-1500:]}'
    for path in sorted((workdir / 'logs').glob('*.log'))
  )


def _assert_as_local(tmp_path, workdir, cache, snapshots):
  """The run in `workdir` gave what its own configuration gives in one process."""
  config = run_directory.RunDirectory(str(workdir)).read_saved().config
  config = dataclasses.replace(config, system=dataclasses.replace(config.system, num_workers=2))
  prepared = store.prepare(config.run.data, cache)
  directory = run_directory.RunDirectory(str(tmp_path / 'local'))
  directory.open(config, prepared.key)
  with compiled.as_for_users():
    local.distil(start.Run(config, directory, cache), threading.Event())
  with (
    np.load(workdir / 'distilled.npz') as there,
    np.load(tmp_path / 'local' / 'distilled.npz') as here,
  ):
    for name in ('images', 'labels'):
      assert there[name].tobytes() == here[name].tobytes()
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == snapshots


@pytest.mark.parametrize(
  'config, num_steps, options',
  [
    ('digits', 80, ['--config.run.plan.target_tile=25', '--config.system.evaluation.nn_steps=0']),
    pytest.param('cifar10_fc1', 150, [f'--config.run.data.dir={CIFAR}'], marks=NEEDS_CIFAR),
  ],
)
def test_jobs_survive_all_and_end_in_the_same_bits(
  tmp_path, cluster, cache, config, num_steps, options
):
  """A worker cancelled, workers added, a node lost, the coordinator requeued."""
  workdir = tmp_path / 'run'
  done = subprocess.run(
    [
      sys.executable,
      'launch.py',
      '--cluster=slurm',
      f'--config=configs/{config}.py',
      f'--workdir={workdir}',
      '--host=localhost',
      f'--config.system.cache_dir={cache}',
      f'--config.run.num_steps={num_steps}',
      '--config.system.num_workers=4',
      '--config.system.snapshot_steps=0,1',
      '--config.system.log_seconds=0.1',
      '--config.system.checkpoint_seconds=1',
      '--config.system.lease_seconds=20',
      '--slurm_worker_options=--cpus-per-task=1',
      *options,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  submitted = re.search(
    r'coordinator (\d+), .* workers (\d+)\.\n(?:.*\n)* +add workers: (.*)', done.stdout
  )
  assert submitted, done.stdout
  coordinator, array, add_workers = submitted.groups()

  def status():
    return _status(workdir)

  def goes_on(generation=1):
    step = status()['step'] if status()['generation'] == generation else -1
    _wait(
      lambda: status()['generation'] == generation and status()['step'] > max(step, 0) + 3,
      200,
      lambda: _logs(workdir),
    )

  goes_on()
  subprocess.run(['scancel', f'{array}_1'], check=True)
  added = subprocess.run(
    shlex.split(add_workers), capture_output=True, text=True, check=True
  ).stdout
  assert added.strip().isdigit()
  goes_on()
  home = _output('squeue', '--noheader', f'--jobs={coordinator}', '--format=%N').strip()
  lost = next(node for node in ('node4', 'node3') if node != home)
  with open(os.path.join(cluster, f'{lost}.pid'), encoding='ascii') as file:
    os.kill(int(file.read()), signal.SIGKILL)
  goes_on()
  subprocess.run([CLUSTER, 'node', cluster, lost[-1]], check=True)
  assert status()['state'] == 'running'
  subprocess.run(['scontrol', 'requeue', coordinator], check=True)
  # Slurm waits two minutes before it starts a job again.
  again = ['scontrol', 'update', f'JobId={coordinator}', 'StartTime=now']
  _wait(
    lambda: subprocess.run(again, capture_output=True, check=False) and status()['generation'] == 2,
    150,
    lambda: _logs(workdir),
  )
  _wait(lambda: status()['state'] == 'finished', 300, lambda: _logs(workdir))
  _wait(lambda: not _output('squeue', '--noheader', '--states=running,pending'), 60)
  assert len(status()['workers']) > 4
  _assert_as_local(tmp_path, workdir, cache, [0, 1, num_steps])


@NEEDS_CIFAR
def test_steps_of_an_allocation_end_in_the_same_bits(tmp_path, cluster, cache):
  """FC1 on CIFAR-10, stopped in mid-run and gone on with; each time the command's status is the
  run's."""
  workdir, num_steps = tmp_path / 'run', 12
  data = schema.Data(**{**cifar10_fc1.get_config().run.data, 'dir': CIFAR})
  store.prepare(data, cache)  # here, so that no time limit below has to allow for it
  command = [
    'salloc',
    '--ntasks=6',
    sys.executable,
    'launch.py',
    '--cluster=slurm',
    '--config=configs/cifar10_fc1.py',
    f'--workdir={workdir}',
    '--host=localhost',
    f'--config.run.data.dir={CIFAR}',
    f'--config.system.cache_dir={cache}',
    f'--config.run.num_steps={num_steps}',
    '--config.system.num_workers=4',
    '--config.system.snapshot_steps=0,1',
    '--config.system.log_seconds=0.1',
    '--slurm_worker_options=--cpus-per-task=1',
  ]
  with subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  ) as first:
    _wait(lambda: _status(workdir)['step'] >= 3, 200, lambda: _logs(workdir))
    _descendant(first.pid, 'allocation.sh').terminate()
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 75, output + _logs(workdir)
  stopped = _status(workdir)
  assert stopped['state'] == 'stopped' and 3 <= stopped['step'] < num_steps
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
  assert done.returncode == 0, done.stdout + done.stderr + _logs(workdir)
  assert _status(workdir)['state'] == 'finished'
  assert 'Runs in allocation' in done.stdout and f'Finished {num_steps} steps' in done.stdout
  assert not _output('squeue', '--noheader', '--states=running,pending')
  _assert_as_local(tmp_path, workdir, cache, [0, 1, num_steps])


def _descendant(pid, name):
  return next(
    child
    for child in psutil.Process(pid).children(recursive=True)
    if any(name in word for word in child.cmdline())
  )


def test_bad_input_in_an_allocation_is_refused_before_anything_starts(tmp_path, cluster):
  done = subprocess.run(
    [
      'salloc',
      '--ntasks=1',
      sys.executable,
      'launch.py',
      '--cluster=slurm',
      '--config=configs/digits.py',
      f'--workdir={tmp_path}',
      '--config.run.num_steps=0',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert (
    done.returncode == 2 and 'error: run.num_steps must be a whole number from 1' in done.stderr
  )


def test_each_worker_has_the_gpu_that_slurm_gave_it(tmp_path, cluster, cache):
  """Two workers on one node, jobs and steps alike: launch.py starts with the CUDA_VISIBLE_DEVICES
  of its own worker."""
  script = tmp_path / 'python'  # in place of Python: records what launch.py would see
  script.write_text(
    f'#!/bin/sh\necho "$*" | grep -o "role=[a-z]*" | tr "\\n" " " >> {tmp_path}/seen.$$\n'
    f'echo "$SLURMD_NODENAME ${{CUDA_VISIBLE_DEVICES-none}}" >> {tmp_path}/seen.$$\nsleep 5\n'
  )
  script.chmod(0o755)
  environment = {
    **os.environ,
    'KIP_ROOT': ROOT,
    'KIP_PYTHON': str(script),
    'KIP_WORKDIR': str(tmp_path),
    'KIP_WORKERS': '2',
  }
  os.makedirs(tmp_path / 'logs')
  subprocess.run(
    [
      'salloc',
      '--nodelist=node1',
      '--ntasks=4',
      '--gpus=2',
      f'{ROOT}/programs/slurm/allocation.sh',
      '--nodelist=node1',
      '--',
      '--gpus-per-task=1',
      '--',
    ],
    env=environment,
    timeout=100,
    capture_output=True,
    check=True,
  )
  seen = [path.read_text().split() for path in tmp_path.glob('seen.*')]
  gpus = sorted(line[2] for line in seen if line[0] == 'role=worker')
  assert gpus == ['0', '1'] and all(line[1] == 'node1' for line in seen)
  subprocess.run(
    [
      'sbatch',
      '--wait',
      '--nodelist=node1',
      '--array=1-2',
      '--gpus=1',
      '--output=/dev/null',
      f'{ROOT}/programs/slurm/client.sh',
      ROOT,
      str(script),
      '--role=worker',
    ],
    env=environment,
    timeout=100,
    capture_output=True,
    check=True,
  )
  later = [path.read_text().split() for path in tmp_path.glob('seen.*')]
  assert sorted(line[2] for line in later if line[0] == 'role=worker') == ['0', '0', '1', '1']
