"""Runs whose processes are started one by one, by --role: real processes, real RPCs."""

import contextlib
import os
import re
import signal
import socket
import stat
import sys

import psutil
import pytest
from launching import (
  SMALL,
  assert_as_in_one_process,
  change_num_steps,
  command,
  listening,
  run,
  started,
  status,
  step,
  wait,
)

from artifacts import run_directory
from programs import hosts
from transport import relay, secret


def _role(role, *flags):
  return [sys.executable, 'launch.py', f'--role={role}', *flags]


def _coordinator(workdir, *flags, **files):
  return command(workdir, *SMALL, *flags, program=('launch.py', '--role=coordinator'), **files)


def _address(workdir):
  return run_directory.read_address(str(workdir / 'address')) or ''


def test_coordinator_workers_and_evaluator_by_role(tmp_path, npz, make_run, cache):
  """A worker that shares the run directory and was there first; one with an address, a key and a
  cache of its own; the coordinator, killed, then stopped in mid-run and started again at another
  address. Nothing but the coordinator's supervisor listens on the network."""
  workdir = tmp_path / 'run'
  where = f'--workdir={workdir}'
  with contextlib.ExitStack() as stack:

    def start(name, arguments, **environment):
      return stack.enter_context(started(arguments, tmp_path / name, **environment))

    def coordinate(name, num_steps):
      flags = ('--host=localhost', f'--config.run.num_steps={num_steps}')
      return start(name, _coordinator(workdir, *flags, npz=npz, cache=cache))

    def log(name):
      return (tmp_path / name).read_text()

    early = start('early', _role('worker', where, '--name=early'))
    wait(lambda: f'Waiting for the coordinator to write {workdir}/address.' in log('early'))
    first = coordinate('first', 100000)
    evaluator = start('evaluator', _role('evaluator', where))
    wait(lambda: step(workdir) >= 3)
    address = _address(workdir)
    assert address.startswith('localhost:')
    port = int(address.rpartition(':')[2])
    (child,) = psutil.Process(first.pid).children()
    others = (early, evaluator, *psutil.Process(early.pid).children())
    assert [listening(process) for process in (first, child)] == [[port], []]
    assert not any(listening(process) for process in others)
    assert stat.S_IMODE(os.stat(workdir / 'secret').st_mode) == 0o600
    child.kill()
    wait(lambda: step(workdir, 2) >= 4)
    assert _address(workdir) == address
    first.terminate()
    assert first.wait(60) == 75, log('first')

    num_steps = status(workdir)['step'] + 3
    change_num_steps(workdir, num_steps)
    with socket.socket() as elsewhere:
      elsewhere.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      elsewhere.bind(('', port))  # nobody listens there any more
      second = coordinate('second', num_steps)
      wait(lambda: _address(workdir) != address)
      late = start(
        'late',
        _role(
          'worker',
          f'--coordinator={_address(workdir)}',
          f'--secret={workdir}/secret',
          '--name=late',
          '--threads=1',
        ),
        XDG_CACHE_HOME=str(tmp_path / 'elsewhere'),
      )
      assert second.wait(300) == 0, log('second') + log('early')
      logs = log('early') + log('late') + log('evaluator')
      assert [process.wait(120) for process in (early, late, evaluator)] == [0, 0, 0], logs
  assert 'early joined' in log('first')
  assert set(status(workdir)['workers']) <= {'early', 'late'}
  assert len(os.listdir(tmp_path / 'elsewhere' / 'kip')) == 1  # the data, from the coordinator
  assert_as_in_one_process(workdir, make_run, num_steps)


@pytest.mark.parametrize(
  'flags, message',
  [
    (('--role=worker',), 'a worker needs --workdir=DIR'),
    (
      ('--role=worker', '--coordinator=localhost:1'),
      "a worker without --workdir needs --secret=FILE, a copy of the run's key",
    ),
    (
      ('--role=worker', '--coordinator=localhost:1', '--secret=/nowhere'),
      "the run's key, /nowhere, cannot be read: No such file or directory",
    ),
    (
      ('--role=worker', '--coordinator=somewhere', '--secret=x'),
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
  _assert_refused([sys.executable, 'launch.py', *flags], message)


def _assert_refused(arguments, message):
  done = run(arguments, timeout=100)
  lines = [line for line in done.stderr.splitlines() if line.startswith('error:')]
  assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr


def test_a_worker_with_the_key_of_another_run(tmp_path):
  for name in ('mine', 'other'):
    secret.make(str(tmp_path / name))
  listener = relay.Listener(secret.Secret(str(tmp_path / 'other')), 0, str(tmp_path / 'nobody'))
  address = f'localhost:{listener.port}'
  worker = _role('worker', f'--coordinator={address}', f'--secret={tmp_path}/mine')
  message = f"the process at {address} does not have this run's key, {tmp_path}/mine"
  _assert_refused(worker, message)
  listener.close()


def test_a_key_that_others_can_read(tmp_path, npz, cache):
  secret.make(str(tmp_path / 'secret'))
  (tmp_path / 'secret').chmod(0o644)
  coordinator = _coordinator(tmp_path, npz=npz, cache=cache)
  worker = _role('worker', '--coordinator=localhost:1', f'--secret={tmp_path}/secret')
  for arguments in (coordinator, worker):
    _assert_refused(
      arguments, f'{tmp_path}/secret, is open to other users (mode 0644): `chmod 600 '
    )


def test_a_port_that_is_taken(tmp_path, npz, cache):
  with socket.create_server(('', 0)) as taken:
    port = taken.getsockname()[1]
    _assert_refused(
      _coordinator(tmp_path / 'run', f'--config.system.port={port}', npz=npz, cache=cache),
      f'system.port={port} cannot be used (Address already in use); choose another, or 0 for any',
    )


def test_a_worker_without_a_coordinator_gives_up(tmp_path):
  (tmp_path / 'short.py').write_text(
    'from configs import base\n\n\ndef get_config():\n  config = base.get_config()\n'
    '  config.system.worker_timeout = 2.0\n  return config\n'
  )
  with socket.socket() as taken:
    taken.bind(('', 0))
    address = f'localhost:{taken.getsockname()[1]}'
    secret.make(str(tmp_path / 'secret'))
    flags = (f'--config={tmp_path}/short.py', f'--coordinator={address}')
    flags += (f'--secret={tmp_path}/secret',)
    with started(_role('worker', *flags), tmp_path / 'log') as process:
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
  workdir = tmp_path / 'run'
  flags = ('--config.run.num_steps=2', '--config.system.worker_timeout=60')
  commands = {
    'coordinator': _coordinator(workdir, *flags, npz=npz, cache=cache),
    'worker': _role('worker', f'--workdir={workdir}'),
    'evaluator': _role('evaluator', f'--workdir={workdir}'),
  }
  with contextlib.ExitStack() as stack:
    processes = [
      stack.enter_context(started(arguments, tmp_path / name, **proxies))
      for name, arguments in commands.items()
    ]
    assert [process.wait(120) for process in processes] == [0, 0, 0], (
      tmp_path / 'worker'
    ).read_text()
  assert status(workdir)['state'] == 'finished'
  assert _address(workdir).rpartition(':')[0] == hosts.own_host()


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

  class Probe(contextlib.nullcontext):
    def __init__(self, family, kind):
      assert kind == socket.SOCK_DGRAM  # whose `connect` sends nothing
      super().__init__(self)

    def getsockname(self):
      return by_route, 40000

    def connect(self, address):
      if by_route is None:
        raise OSError(101, 'Network is unreachable')

  monkeypatch.setattr(socket, 'getfqdn', lambda: names[0])
  monkeypatch.setattr(socket, 'gethostname', lambda: names[1])
  monkeypatch.setattr(socket, 'getaddrinfo', resolve)
  monkeypatch.setattr(socket, 'socket', Probe)
  assert hosts.own_host() == expected
  warning = (
    'This host has no name or address that others could reach: '
    'only processes of its own can join, unless --host=NAME tells one.'
  )
  assert caplog.messages == [warning] * (expected == 'localhost')


def test_a_worker_that_waits_for_an_address_can_be_stopped(tmp_path):
  with started(_role('worker', f'--workdir={tmp_path}/run'), tmp_path / 'log') as process:
    wait(lambda: 'Waiting for' in (tmp_path / 'log').read_text(), 60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 75
