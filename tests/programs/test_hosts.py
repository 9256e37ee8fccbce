"""A run whose processes are started one by one, by --role: real processes, real RPCs."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from artifacts import run_directory
from programs import hosts, local

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


@contextlib.contextmanager
def _started(log, *flags, env=None):
  """A process of launch.py in a session of its own, which does not outlive the test."""
  with open(log, 'wb') as output:
    process = subprocess.Popen(
      [sys.executable, 'launch.py', *flags],
      cwd=ROOT,
      stdout=output,
      stderr=subprocess.STDOUT,
      env={**os.environ, **(env or {})},
      start_new_session=True,
    )
  try:
    yield process
  finally:
    if process.poll() is None:
      process.kill()  # and its child dies with it
    process.wait()


def _wait(condition, seconds=300):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


def _status(workdir):
  return run_directory.RunDirectory(str(workdir)).read_status() or {'step': -1, 'state': None}


def _assert_same_bits(workdir, reference):
  with np.load(workdir / 'distilled.npz') as there, np.load(reference / 'distilled.npz') as here:
    for name in ('images', 'labels'):
      assert there[name].tobytes() == here[name].tobytes()


def test_coordinator_workers_and_evaluator_by_role(tmp_path, npz, make_run, cache):
  """A worker that shares the run directory and was there first; one with an address alone and a
  cache of its own; the coordinator, stopped in mid-run and started again at another address."""
  workdir = tmp_path / 'run'
  where = f'--workdir={workdir}'
  coordinator = (
    '--role=coordinator',
    '--config=configs/base.py',
    where,
    *SMALL,
    '--host=localhost',
    f'--config.run.data.name={npz}',
    f'--config.system.cache_dir={cache}',
  )
  with contextlib.ExitStack() as stack:
    start = lambda name, *flags, **kwargs: stack.enter_context(
      _started(tmp_path / name, *flags, **kwargs)
    )
    output = lambda name: (tmp_path / name).read_text()
    early = start('early', '--role=worker', where, '--name=early')
    _wait(lambda: f'Waiting for the coordinator to write {workdir}/address.' in output('early'))
    first = start('first', *coordinator, '--config.run.num_steps=100000')
    evaluator = start('evaluator', '--role=evaluator', where)
    _wait(lambda: _status(workdir)['step'] >= 3)
    address = run_directory.read_address(str(workdir / 'address'))
    assert address.startswith('localhost:')
    first.terminate()
    assert first.wait(60) == 75, output('first')
    stopped = _status(workdir)['step']

    num_steps = stopped + 3
    config = json.loads((workdir / 'config.json').read_text())
    config['run']['num_steps'] = num_steps  # as if it had been told so from the start
    (workdir / 'config.json').write_text(json.dumps(config))
    with socket.socket() as elsewhere:
      elsewhere.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      elsewhere.bind(('', int(address.rpartition(':')[2])))  # nobody listens there any more
      second = start('second', *coordinator, f'--config.run.num_steps={num_steps}')
      _wait(lambda: run_directory.read_address(str(workdir / 'address')) != address)
      late = start(
        'late',
        '--role=worker',
        f'--coordinator={run_directory.read_address(str(workdir / "address"))}',
        '--name=late',
        '--threads=1',
        env={'XDG_CACHE_HOME': str(tmp_path / 'elsewhere')},
      )
      assert second.wait(300) == 0, output('second') + output('early')
      assert [process.wait(120) for process in (early, late, evaluator)] == [0, 0, 0], (
        output('early') + output('late') + output('evaluator')
      )
  assert (
    f'the coordinator is at {run_directory.read_address(str(workdir / "address"))} now'
    in output('early')
  )
  assert 'early joined' in output('first')
  assert set(_status(workdir)['workers']) <= {'early', 'late'}
  assert len(os.listdir(tmp_path / 'elsewhere' / 'kip')) == 1  # the data, from the coordinator

  run = make_run(tmp_path / 'local', {'run.architecture': 'fc1', 'run.num_steps': num_steps})
  local.distil(run, threading.Event())
  _assert_same_bits(workdir, tmp_path / 'local')
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == [0, 1, num_steps]


@pytest.mark.parametrize(
  'flags, message',
  [
    (('--role=worker',), 'a worker needs --workdir=DIR'),
    (
      ('--role=worker', '--coordinator=somewhere'),
      "--coordinator must be HOST:PORT, got 'somewhere'",
    ),
    (('--role=evaluator', '--coordinator=localhost:1'), '--workdir=DIR is missing'),
    (
      ('--role=evaluator', '--coordinator=localhost:1', '--workdir=/nowhere'),
      '--workdir=/nowhere holds no run',
    ),
    (
      ('--role=coordinator', '--coordinator=localhost:1'),
      '--coordinator=HOST:PORT is for workers and the evaluator',
    ),
    (('--role=coordinator', '--workdir=/nowhere'), '--config=FILE is missing'),
    (('--role=boss',), 'value should be one of <coordinator|worker|evaluator>'),
  ],
)
def test_bad_input_gets_one_line_and_status_2(flags, message):
  done = subprocess.run(
    [sys.executable, 'launch.py', *flags],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  lines = [line for line in done.stderr.splitlines() if line.startswith('error:')]
  assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr


def test_a_worker_without_a_coordinator_gives_up(tmp_path):
  (tmp_path / 'short.py').write_text(
    'from configs import base\n\n\ndef get_config():\n  config = base.get_config()\n'
    '  config.system.coordinator_timeout = 2.0\n  return config\n'
  )
  with socket.socket() as taken:
    taken.bind(('', 0))
    address = f'localhost:{taken.getsockname()[1]}'
    with _started(
      tmp_path / 'log', '--role=worker', f'--config={tmp_path}/short.py', f'--coordinator={address}'
    ) as process:
      assert process.wait(60) == 1
  assert re.search(
    f'Giving up: the coordinator has not answered for \\d s at {address}: ',
    (tmp_path / 'log').read_text(),
  )


def test_a_proxy_in_the_environment_is_not_for_the_nodes(tmp_path, npz, cache):
  proxies = {
    name: 'http://127.0.0.1:9'
    for lower in ('http_proxy', 'https_proxy', 'grpc_proxy', 'all_proxy')
    for name in (lower, lower.upper())
  }
  where = f'--workdir={tmp_path}/run'
  with contextlib.ExitStack() as stack:
    start = lambda name, *flags: stack.enter_context(_started(tmp_path / name, *flags, env=proxies))
    processes = [
      start(
        'coordinator',
        '--role=coordinator',
        '--config=configs/base.py',
        where,
        *SMALL,
        f'--config.run.data.name={npz}',
        f'--config.system.cache_dir={cache}',
        '--config.run.num_steps=2',
        '--config.system.coordinator_timeout=20',
      ),
      start('worker', '--role=worker', where),
      start('evaluator', '--role=evaluator', where),
    ]
    assert [process.wait(120) for process in processes] == [0, 0, 0], (
      tmp_path / 'worker'
    ).read_text()
  assert _status(tmp_path / 'run')['state'] == 'finished'
  assert (
    run_directory.read_address(str(tmp_path / 'run' / 'address')).rpartition(':')[0]
    == hosts.own_host()
  )


@pytest.mark.parametrize(
  'names, addresses, by_route, expected',
  [
    (
      ('node7.cluster', 'node7'),
      {'node7.cluster': ['10.0.0.7'], 'node7': ['10.0.0.7']},
      '10.0.0.7',
      'node7.cluster',
    ),
    (
      ('localhost', 'node7'),
      {'localhost': ['127.0.0.1', '::1'], 'node7': ['10.0.0.7', 'fe80::1']},
      '10.0.0.7',
      'node7',
    ),
    (('node7', 'node7'), {'node7': ['127.0.1.1']}, '10.0.0.7', '10.0.0.7'),  # as Debian has it
    (('node7', 'node7'), {'node7': ['127.0.1.1', '10.0.0.7']}, '10.0.0.7', '10.0.0.7'),
    (
      ('localhost.localdomain', 'node7'),
      {'localhost.localdomain': ['::1']},
      '10.0.0.7',
      '10.0.0.7',
    ),  # nobody knows node7
    (
      ('localhost', 'node7'),
      {'localhost': ['127.0.0.1'], 'node7': ['127.0.1.1']},
      None,
      'localhost',
    ),  # no route
    (('localhost', 'localhost'), {'localhost': ['127.0.0.1']}, '127.0.0.1', 'localhost'),
  ],
)
def test_others_are_never_sent_to_a_loopback_address(
  monkeypatch, caplog, names, addresses, by_route, expected
):

  def resolve(name, port):
    if name not in addresses:
      raise socket.gaierror(-2, 'Name or service not known')
    return [
      (socket.AF_INET, socket.SOCK_STREAM, 6, '', (address, 0)) for address in addresses[name]
    ]

  class Probe:
    __enter__ = lambda self: self
    __exit__ = lambda self, *_: None
    getsockname = lambda self: (by_route, 40000)

    def __init__(self, family, kind):
      assert kind == socket.SOCK_DGRAM  # whose `connect` sends nothing

    def connect(self, address):
      if by_route is None:
        raise OSError(101, 'Network is unreachable')

  monkeypatch.setattr(socket, 'getfqdn', lambda: names[0])
  monkeypatch.setattr(socket, 'gethostname', lambda: names[1])
  monkeypatch.setattr(socket, 'getaddrinfo', resolve)
  monkeypatch.setattr(socket, 'socket', Probe)
  assert hosts.own_host() == expected
  said = (
    'This host has no name or address that others could reach: '
    'only processes of its own can join, unless --host=NAME tells one.'
  )
  assert caplog.messages == [said] * (expected == 'localhost')


def test_a_worker_that_waits_for_an_address_can_be_stopped(tmp_path):
  with _started(tmp_path / 'log', '--role=worker', f'--workdir={tmp_path}/run') as process:
    _wait(lambda: 'Waiting for' in (tmp_path / 'log').read_text(), 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
