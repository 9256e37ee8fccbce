"""A run on several hosts: each process runs one node of the program.

    python launch.py --role=coordinator --config=FILE --workdir=DIR
    python launch.py --role=worker --workdir=DIR
    python launch.py --role=evaluator --workdir=DIR

The directory is on a disk that all hosts share; a worker without it takes --coordinator=HOST:PORT.
"""

import ipaddress
import os
import re
import socket
import threading
import time

import launchpad as lp
from absl import flags, logging

from artifacts import files, run_directory, waiting
from configs import schema, validation
from data import store
from programs import (
  command_line,
  distill,
  memory,
  outcome,
  placement,
  processes,
  signals,
  start,
  supervisor,
  terminal,
)

_COORDINATOR, _WORKER, _EVALUATOR = _ROLES = 'coordinator', 'worker', 'evaluator'
ROLE = flags.DEFINE_enum('role', None, _ROLES, 'Run this one node of the program.')
_ADDRESS = flags.DEFINE_string(
  'coordinator',
  None,
  'HOST:PORT of the coordinator; not needed where --workdir is on a shared disk.',
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

_PATIENCE = 1800.0  # seconds to wait for an address: the coordinator prepares the data before
_SILENCE = 1.0, 30.0  # seconds of waiting before the first log line, and between two
_LOOK = 0.2  # seconds between two looks for an address
_ELSEWHERE = '192.0.2.1', 9  # no host has this address: it is reserved for documentation


def run_role(role: str) -> int:
  """Runs the node that --role names until the run is over or the process is asked to stop.

  Returns the exit status. Raises what `start.ready` raises.
  """
  _check_flags(role)
  if supervisor.is_child():
    _run_node(role)
    return 0
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
  if _ADDRESS.value and not re.fullmatch(r'\S+:\d{1,5}', _ADDRESS.value):
    raise command_line.BadInput(f'--coordinator must be HOST:PORT, got {_ADDRESS.value!r}.')


def _supervise_coordinator(stop: threading.Event) -> int:
  """Prepares the run, publishes its address and supervises the coordinator."""
  run = start.ready(None, memory.Here.COORDINATOR)
  for remark in run.remarks:
    logging.info(remark)
  port = run.config.system.port
  distill.check_port(port)
  address = f'{_HOST.value or own_host()}:{port or _free_port()}'
  files.write_atomically(run.directory.address, address + '\n')
  logging.info(
    'The coordinator is at %s. Whoever can connect to it can run code as you: see BUILD.md, '
    '"The coordinator\'s port".',
    address,
  )
  with terminal.show_output(run.directory):
    run.directory.begin()
    supervisor.supervise(processes.COORDINATOR, stop)
  return outcome.conclude(run.directory)


def _supervise_client(role: str, stop: threading.Event) -> int:
  """Waits for the coordinator's address and supervises a worker or the evaluator."""
  if not (_ADDRESS.value or _await_address(_published(), stop)):
    return 0 if stop.is_set() else 1
  config = _config()
  # Of several workers on a host each has to be given its own GPU, as Slurm does.
  gpus = placement.take_gpu(config.run.implementation)
  logging.info(gpus.remark)
  return supervisor.supervise(_label(role, os.getpid()), stop)


def _run_node(role: str) -> None:
  """Runs the node itself, in the supervised child."""
  config, stop = _config(), signals.supervised_stop_event()
  workdir, system = start.WORKDIR.value or '', config.system
  cache = store.cache_folder(system.cache_dir)
  address = _ADDRESS.value or run_directory.read_address(_published()) or ''
  if role == _COORDINATOR:
    port = int(address.rpartition(':')[2])
    processes.serve_coordinator(workdir, cache, port, stop)
    return
  if role == _WORKER:
    kind = processes.WORKER
    threads = placement.worker_threads(_THREADS.value, workers=1)
    settings = {'name': _label(role, os.getppid()), 'threads': threads}
  else:
    kind, settings = processes.EVALUATOR, {'workdir': workdir, 'threads': 1}
  coordinator = lp.CourierClient(address, **processes.CLIENT_OPTIONS)
  processes.Client(
    kind, coordinator, system.coordinator_timeout, _published(), stop, cache=cache, **settings
  ).run()


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
  directory = run_directory.RunDirectory(start.WORKDIR.value)
  saved = directory.read_config()
  if saved is None:
    raise command_line.BadInput(
      f'--workdir={directory.path} holds no run; a worker without a shared disk needs '
      '--coordinator alone.'
    )
  return saved.config


def _published() -> str:
  """Names the file with the coordinator's address; '' if --coordinator gives it."""
  if _ADDRESS.value:
    return ''
  return run_directory.RunDirectory(start.WORKDIR.value or '').address


def _await_address(path: str, stop: threading.Event) -> bool:
  """Waits for the file with the coordinator's address, at most _PATIENCE; returns whether it is
  there and `stop` is not set."""
  begin = time.monotonic()
  first, interval = _SILENCE
  next_line = begin + first
  while run_directory.read_address(path) is None and not stop.is_set():
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


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]
