"""launch.py and programs/local.py as a user runs them: exit status, messages and files."""

import os
import signal
import sys
import time

import forked
import psutil
import pytest
from launching import IN_ONE_PROCESS, SMALL, command, rows, run, status

from programs import distill


def test_a_worker_that_raises_stops_the_run_with_its_message(tmp_path, npz, cache):
  (tmp_path / 'sitecustomize.py').write_text("""
try:
  from kernels import registry
except ImportError:
  pass
else:
  make = registry.for_run
  class Broken:
    def __init__(self, *arguments):
      self._kernel = make(*arguments)
    def __getattr__(self, name):
      return getattr(self._kernel, name)
    def block(self, *arguments):
      raise ValueError('the dog ate the block')
  registry.for_run = Broken
""")
  done = run(command(tmp_path / 'run', *SMALL, npz=npz, cache=cache), PYTHONPATH=str(tmp_path))
  assert done.returncode == 1
  assert 'The run failed: step 0: the support_blocks task' in done.stderr
  assert 'ValueError: the dog ate the block' in done.stderr
  ended = status(tmp_path / 'run')
  assert ended['state'] == 'failed' and 'the dog ate the block' in ended['message']


def test_a_worker_that_cannot_start_stops_the_run_with_its_message(tmp_path, npz, cache):
  (tmp_path / 'sitecustomize.py').write_text("""
try:
  from kernels import registry
except ImportError:
  pass
else:
  def make_kernel(*args, **kwargs):
    raise RuntimeError('no kernel today')
  registry.make_kernel = make_kernel
""")
  done = run(command(tmp_path / 'run', *SMALL, npz=npz, cache=cache), PYTHONPATH=str(tmp_path))
  assert done.returncode == 1
  assert 'every worker failed to start; last error: RuntimeError: no kernel today' in done.stderr


def test_a_proxy_in_the_environment_is_not_for_the_nodes(tmp_path, npz, cache):
  proxies = {
    name: 'http://127.0.0.1:9'
    for lower in ('http_proxy', 'https_proxy', 'grpc_proxy', 'all_proxy')
    for name in (lower, lower.upper())
  }
  flags = (*SMALL, '--config.run.num_steps=2', '--config.system.worker_timeout=60')
  done = run(command(tmp_path, *flags, npz=npz, cache=cache), timeout=120, **proxies)
  assert done.returncode == 0, done.stdout + done.stderr
  assert status(tmp_path)['state'] == 'finished'


def test_threads_instead_of_processes(tmp_path, npz, cache):
  program = ('launch.py', '--lp_launch_type=local_mt')
  flags = (*SMALL, '--config.run.num_steps=2')
  done = run(command(tmp_path, *flags, program=program, npz=npz, cache=cache))
  assert done.returncode == 0, done.stdout + done.stderr
  assert status(tmp_path)['state'] == 'finished' and sorted(rows(tmp_path)) == [0, 1, 2]


def _assert_refused(arguments, message, run=forked.run):
  done = run(arguments)
  assert done.returncode == 2, done.stdout + done.stderr
  lines = [line for line in done.stderr.splitlines() if line.startswith('error:')]
  assert len(lines) == 1 and 'Traceback' not in done.stderr
  assert message in lines[0], lines[0]


@pytest.mark.parametrize(
  'flags, message',
  [
    (('--config=configs/nothing.py',), '--config=configs/nothing.py: there is no such file.'),
    (('--config.run.sed=3',), 'unknown field run.sed; did you mean run.seed'),
    (('--config.run.seed=three',), "--config.run.seed=three: expected a whole number, got 'three'"),
    (('--config.run.learning_rate=-1',), 'run.learning_rate must be above 0'),
    (('--config.run.architecture=resnet',), "run.architecture: unknown name 'resnet'; known: fc1"),
    (('--config.run.images_per_class=1000',), 'run.images_per_class must be at most'),
    (('--config.run.targets_per_step=7',), 'run.targets_per_step must be a multiple of 10'),
    (('--config.run.data.name=mnits',), "run.data.name: no data set 'mnits'; known: digits, mnist"),
    (('--config.run.data.dir=/nowhere',), "run.data.dir: no folder '/nowhere'"),
    (
      (
        '--config.run.architecture=fc1',
        '--config.run.targets_per_step=1000',
        '--config.system.num_workers=100000',
      ),
      'GiB of memory',
    ),
    (('--wrokdir=x',), "Unknown command line flag 'wrokdir'"),
    (('stray',), "unknown argument 'stray'"),
  ],
)
def test_bad_input_gets_one_line_and_status_2(tmp_path, cache, flags, message):
  flags = ('--config.run.targets_per_step=200', *flags)
  _assert_refused(command(tmp_path / 'run', *flags, program=IN_ONE_PROCESS, cache=cache), message)
  assert not (tmp_path / 'run').exists() or not os.listdir(tmp_path / 'run')


def test_missing_flags(tmp_path):
  launch = [sys.executable, 'launch.py']
  _assert_refused([*launch, f'--workdir={tmp_path}'], '--config=FILE is missing')
  _assert_refused([*launch, '--config=configs/base.py'], '--workdir=DIR is missing')


def test_a_config_file_with_a_bug(tmp_path):
  (tmp_path / 'mine.py').write_text('import nothing_like_it\n')
  _assert_refused(
    command(tmp_path / 'run', config=tmp_path / 'mine.py'),
    "ModuleNotFoundError: No module named 'nothing_like_it'",
    run,  # without any help of the tests'
  )


def test_a_workdir_that_cannot_be_written(tmp_path, npz, cache):
  (tmp_path / 'file').write_text('')
  _assert_refused(
    command(tmp_path / 'file' / 'run', *SMALL, npz=npz, cache=cache),
    'cannot be written: Not a directory',
  )


def test_a_directory_of_another_run(tmp_path, npz, cache, make_run):
  other = make_run(tmp_path / 'run', {'run.architecture': 'fc1'})
  same = command(tmp_path / 'run', *SMALL, '--config.run.num_steps=3', npz=npz, cache=cache)
  _assert_refused(same, 'is in use by a run')
  other.directory.close()
  _assert_refused([*same, '--config.run.seed=4'], 'holds another run: run.seed (0 there, 4 here)')


def test_launchpad_may_trip_over_ended_processes_while_it_stops(monkeypatch):
  """Its alarm, which looks at them every second, raises where one has just ended."""
  monkeypatch.setattr(psutil.Process, 'children', lambda self, recursive=False: [])
  calls = []

  def trip(number, frame):
    raise psutil.NoSuchProcess(1)

  class Manager:
    def wait(self, labels_to_wait_for=None, raise_error=True):
      calls.append(labels_to_wait_for)
      if labels_to_wait_for:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        raise psutil.NoSuchProcess(1)
      time.sleep(0.5)

  before = signal.signal(signal.SIGALRM, trip)
  try:
    distill.wait(Manager())
  finally:
    signal.signal(signal.SIGALRM, before)
  assert calls == [['coordinator', 'coordinator/0'], None]
