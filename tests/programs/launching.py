"""Real processes, as a user starts them: what the tests of launches share."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import compiled
import numpy as np
import psutil

from artifacts import run_directory
from programs import local

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SMALL = (
  '--config.run.architecture=fc1',
  '--config.run.images_per_class=2',
  '--config.run.targets_per_step=33',
  '--config.run.plan.support_tile=4',
  '--config.run.plan.target_tile=5',
  '--config.run.plan.target_tiles_per_task=2',
  '--config.system.evaluation.nn_steps=0',
  '--config.system.log_seconds=0.1',
  '--config.system.snapshot_steps=0,1',
)
LOCAL_MP = ('launch.py', '--lp_launch_type=local_mp')
IN_ONE_PROCESS = ('-m', 'programs.local')


def command(workdir, *flags, config='configs/base.py', program=LOCAL_MP, npz=None, cache=None):
  """The command line of a run; `npz` and `cache` are the fixtures' files."""
  flags += (f'--config.run.data.name={npz}',) if npz else ()
  flags += (f'--config.system.cache_dir={cache}',) if cache else ()
  return [sys.executable, *program, f'--config={config}', f'--workdir={workdir}', *flags]


def run(command, timeout=400, **environment):
  """Runs a command to its end, with its output as text."""
  return subprocess.run(
    command,
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=timeout,
    env={**os.environ, **environment},
    check=False,
  )


def without_neural_tangents(folder):
  """A PYTHONPATH with which a process finds, in its place, a module that raises."""
  (folder / 'neural_tangents.py').write_text('raise ImportError("only the reference needs it")')
  return str(folder)


@contextlib.contextmanager
def started(command, log, **environment):
  """A process in a session of its own that writes to the file `log`; it does not outlive the
  context."""
  with open(log, 'wb') as output:
    process = subprocess.Popen(
      command,
      cwd=ROOT,
      stdout=output,
      stderr=subprocess.STDOUT,
      env={**os.environ, **environment},
      start_new_session=True,
    )
  try:
    yield process
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


def status(workdir):
  return run_directory.RunDirectory(str(workdir)).read_status() or {'step': -1, 'state': None}


def step(workdir, generation=1):
  """The step of a run while its coordinator is in this life; else -1."""
  now = status(workdir)
  is_running = now['state'] == 'running' and now['generation'] == generation
  return now['step'] if is_running else -1


def rows(workdir):
  return {row['step']: row for row in run_directory.RunDirectory(str(workdir)).read_metrics()}


def listening(process):
  """TCP ports at which a process listens."""
  connections = psutil.Process(process.pid).net_connections('tcp')
  return [it.laddr.port for it in connections if it.status == psutil.CONN_LISTEN]


def change_num_steps(workdir, num_steps):
  """Changes the length of a stopped run, as if it had been given so from the start."""
  path = pathlib.Path(workdir, 'config.json')
  config = json.loads(path.read_text())
  config['run']['num_steps'] = num_steps
  path.write_text(json.dumps(config))


def assert_as_in_one_process(workdir, make_run, num_steps):
  """A run of `SMALL` gave the bits of one that nothing disturbed, and a row for each snapshot."""
  reference = make_run(
    f'{workdir}-in-one-process', {'run.architecture': 'fc1', 'run.num_steps': num_steps}
  )
  with compiled.as_for_users():
    local.distil(reference, threading.Event())
  directory = run_directory.RunDirectory(str(workdir))
  with np.load(directory.distilled) as found, np.load(reference.directory.distilled) as expected:
    for name in ('images', 'labels'):
      assert found[name].tobytes() == expected[name].tobytes()
  assert [row['step'] for row in directory.read_metrics()] == [0, 1, num_steps]
