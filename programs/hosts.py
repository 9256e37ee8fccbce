"""A run on several hosts: each process runs one node of the program.

    python launch.py --role=coordinator --config=FILE --workdir=DIR
    python launch.py --role=worker --workdir=DIR
    python launch.py --role=evaluator --workdir=DIR

The directory is on a disk that all hosts share; a worker without it takes --coordinator=HOST:PORT
and --secret=FILE. The coordinator itself listens on a unix socket alone: its supervising parent
takes connections from the network, of those who have the run's key (transport/relay.py).
"""

import contextlib
import ipaddress
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator

import launchpad as lp
from absl import flags, logging

from artifacts import files, run_directory, waiting
from configs import schema, validation
from data import store
from programs import (
  command_line,
  memory,
  outcome,
  placement,
  processes,
  signals,
  start,
  supervisor,
  terminal,
)
from transport import relay, unix_socket
from transport import secret as keys

_COORDINATOR, _WORKER, _EVALUATOR = _ROLES = 'coordinator', 'worker', 'evaluator'
ROLE = flags.DEFINE_enum('role', None, _ROLES, 'Run this one node of the program.')
_ADDRESS = flags.DEFINE_string(
  'coordinator',
  None,
  'HOST:PORT of the coordinator; not needed where --workdir is on a shared disk.',
)
_SECRET = flags.DEFINE_string(
  'secret',
  None,
  "The run's key; by default the file `secret` in the run directory, of which a worker without a "
  'shared disk needs a copy.',
)
_HOST = flags.DEFINE_string(
  'host',
  None,
  'For the coordinator: the name or address by which the other hosts reach this one; by default '
  'its own.',
)
_NAME = flags.DEFINE_string('name', None, 'For a worker: its name, unique within the run.')
_THREADS = flags.DEFINE_integer(
  'threads', 0, 'For a worker: its CPU threads; 0: all that it may use.', lower_bound=0
)

_SOCKET = 'KIP_SOCKET'  # environment of a child: path of the coordinator's unix socket
_PATIENCE = 1800.0  # seconds to wait for an address: the coordinator prepares the data before
_SILENCE = 1.0, 30.0  # seconds of waiting before the first log line, and between two
_LOOK = 0.2  # seconds between two looks for an address
_ELSEWHERE = '192.0.2.1', 9  # no host has this address: it is reserved for documentation


def run_role(role: str) -> int:
  """Runs the node that --role names until the run is over or the process is asked to stop.

  Returns the exit status. Raises what `start.ready` and `unix_socket.check` raise, and SecretError.
  """
  _check_flags(role)
  if supervisor.is_child():
    _run_node(role)
    return 0
  unix_socket.check()
  if role == _COORDINATOR:
    return _supervise_coordinator(signals.stop_event())
  return _supervise_client(role, signals.stop_event('Stopping'))


def _check_flags(role: str) -> None:
  """Raises BadInput if flags are missing, or not for this role."""
  if role == _COORDINATOR and _ADDRESS.value:
    raise command_line.BadInput(
      '--coordinator=HOST:PORT is for workers and the evaluator; the coordinator takes --host=NAME '
      'and --config.system.port=PORT.'
    )
  if role == _EVALUATOR and not start.WORKDIR.value:
    raise command_line.BadInput(
      '--workdir=DIR is missing: the run directory, where the evaluator writes its rows.'
    )
  if role == _WORKER and not (start.WORKDIR.value or _ADDRESS.value):
    raise command_line.BadInput(
      'a worker needs --workdir=DIR, the run directory on a shared disk, or '
      '--coordinator=HOST:PORT.'
    )
  if _ADDRESS.value and not (start.WORKDIR.value or _SECRET.value):
    raise command_line.BadInput(
      "a worker without --workdir needs --secret=FILE, a copy of the run's key, which is the file "
      '`secret` in the run directory.'
    )
  if _ADDRESS.value and not re.fullmatch(r'\S+:\d{1,5}', _ADDRESS.value):
    raise command_line.BadInput(f'--coordinator must be HOST:PORT, got {_ADDRESS.value!r}.')


def _supervise_coordinator(stop: threading.Event) -> int:
  """Prepares the run, publishes its address and supervises the coordinator."""
  run = start.ready(None, memory.Here.COORDINATOR)
  for remark in run.remarks:
    logging.info(remark)
  secret_file = _SECRET.value or run.directory.secret
  if not _SECRET.value:
    keys.make(secret_file)
  key, port = keys.Secret(secret_file), run.config.system.port
  with _socket() as path:
    try:
      listener = relay.Listener(key, port, path)
    except OSError as error:
      raise command_line.BadInput(
        f'system.port={port} cannot be used ({os.strerror(error.errno or 0)}); choose another, '
        'or 0 for any free one.'
      ) from error
    address = f'{_HOST.value or own_host()}:{listener.port}'
    files.write_atomically(run.directory.address, address + '\n')
    logging.info(
      'The coordinator is at %s, for those who have the key in %s.', address, secret_file
    )
    with terminal.show_output(run.directory):
      run.directory.begin()
      supervisor.supervise(processes.COORDINATOR, stop)
    listener.close()
  return outcome.conclude(run.directory)


def _supervise_client(role: str, stop: threading.Event) -> int:
  """Waits for the coordinator's address and supervises a worker or the evaluator."""
  if not _await_address(stop):
    return outcome.STOPPED_STATUS if stop.is_set() else 1
  config, secret_file = _config(), _SECRET.value or _directory().secret
  key = keys.Secret(secret_file)
  # Of several workers on a host each has to be given its own GPU, as Slurm does.
  gpus = placement.take_gpu(config.run.implementation)
  logging.info(gpus.remark)
  with _socket() as path:
    dialer = relay.Dialer(key, _coordinator, path)
    try:
      dialer.connect().close()
    except relay.AnotherKey as error:
      if _ADDRESS.value:
        raise command_line.BadInput(
          f'{error}, {secret_file}: it takes part in another run, or the key is an old one.'
        ) from error
    except OSError:
      pass  # it may come: the node goes on asking
    status = supervisor.supervise(_label(role, os.getpid()), stop)
  # Not 0, by which a scheduler would take its work for done.
  return outcome.STOPPED_STATUS if stop.is_set() and status == 0 else status


def _run_node(role: str) -> None:
  """Runs the node itself, in the supervised child."""
  config, stop = _config(), signals.supervised_stop_event()
  workdir, system = start.WORKDIR.value or '', config.system
  cache = store.cache_folder(system.cache_dir)
  path = os.environ[_SOCKET]
  if role == _COORDINATOR:
    processes.serve_coordinator(workdir, cache, path, stop)
    return
  if role == _WORKER:
    kind = processes.WORKER
    threads = placement.worker_threads(_THREADS.value, workers=1)
    settings = {'name': _label(role, os.getppid()), 'threads': threads}
  else:
    kind, settings = processes.EVALUATOR, {'workdir': workdir, 'threads': 1}
  coordinator = lp.CourierClient(unix_socket.SCHEME + path, **processes.CLIENT_OPTIONS)
  where, timeout = _coordinator() or '', system.worker_timeout
  processes.Client(kind, coordinator, timeout, stop, where, cache=cache, **settings).run()


@contextlib.contextmanager
def _socket() -> Iterator[str]:
  """Gives the path of the socket between this process and its child; its folder is removed."""
  folder = unix_socket.new_folder()
  os.environ[_SOCKET] = path = os.path.join(folder, 'courier')
  try:
    yield path
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _label(role: str, parent: int) -> str:
  """Names a node; a worker keeps its name when process `parent` starts it again."""
  if role != _WORKER:
    return role
  return _NAME.value or f'worker_{socket.gethostname()}_{parent}'


def _config() -> schema.Config:
  """Reads the configuration of the run that this process takes part in: --config's, the run
  directory's, or the defaults.

  Raises:
    BadInput, ConfigError, RunDirectoryError: there is no such run, or the settings are wrong.
  """
  if command_line.CONFIG.value:
    return validation.validate(command_line.CONFIG.value.to_dict())
  if not start.WORKDIR.value:
    return schema.Config()
  saved = _directory().read_config()
  if saved is None:
    raise command_line.BadInput(
      f'--workdir={_directory().path} holds no run; a worker without a shared disk needs '
      '--coordinator and --secret alone.'
    )
  return saved.config


def _directory() -> run_directory.RunDirectory:
  return run_directory.RunDirectory(start.WORKDIR.value or '')


def _coordinator() -> str | None:
  """The coordinator's HOST:PORT: by --coordinator, or as it is published now."""
  return _ADDRESS.value or run_directory.read_address(_directory().address)


def _await_address(stop: threading.Event) -> bool:
  """Waits until the coordinator's address is known, at most _PATIENCE; returns whether it is and
  `stop` is not set."""
  path = _directory().address
  begin = time.monotonic()
  first, interval = _SILENCE
  next_line = begin + first
  while _coordinator() is None and not stop.is_set():
    now = time.monotonic()
    if now > begin + _PATIENCE:
      logging.error('Giving up: no coordinator has written %s for %.0f s.', path, _PATIENCE)
      return False
    if now > next_line:
      logging.info('Waiting for the coordinator to write %s.', path)
      next_line = now + interval
    waiting.pause(_LOOK, stop)
  return not stop.is_set()


def own_host() -> str:
  """Finds a name of this host, or else an address, by which others may reach it.

  'localhost' if it has none; then a warning is logged.
  """
  for name in (socket.getfqdn(), socket.gethostname()):
    try:
      addresses = [ipaddress.ip_address(info[4][0]) for info in socket.getaddrinfo(name, None)]
    except (OSError, ValueError):  # a name that even this host cannot resolve
      continue
    if not any(address.is_loopback for address in addresses):
      return name
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      probe.connect(_ELSEWHERE)  # sends nothing, but chooses an interface
      address = probe.getsockname()[0]
    except OSError:  # there is no route
      address = None
  if address and not ipaddress.ip_address(address).is_loopback:
    return address
  logging.warning(
    'This host has no name or address that others could reach: '
    'only processes of its own can join, unless --host=NAME tells one.'
  )
  return 'localhost'
