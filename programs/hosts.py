"""A run on several hosts: each process builds the program's graph, knows the coordinator's address,
and plays one node of it.

    python launch.py --role=coordinator --config=FILE --workdir=DIR
    python launch.py --role=worker --workdir=DIR            (or, without a shared disk, --coordinator=HOST:PORT)
    python launch.py --role=evaluator --workdir=DIR
"""

import dataclasses
import ipaddress
import os
import re
import socket
import threading
import time

from absl import flags, logging
from launchpad import context
from launchpad.launch import worker_manager

from artifacts import files, run_directory
from configs import schema, validation
from data import store
from programs import command_line, distill, placement, processes, start, supervisor, terminal

_WORKER = 'worker'
ROLE = flags.DEFINE_enum(
  'role', None, [distill.COORDINATOR, _WORKER, 'evaluator'], 'Run this one node of the program.'
)
_ADDRESS = flags.DEFINE_string(
  'coordinator',
  None,
  'HOST:PORT of the coordinator; not needed where --workdir is on a shared disk.',
)
_HOST = flags.DEFINE_string(
  'host',
  None,
  'Of the coordinator: the name or address by which the '
  'other hosts reach this one; by default its own.',
)
_NAME = flags.DEFINE_string('name', None, "Of a worker: its name, unique among the run's.")
_THREADS = flags.DEFINE_integer(
  'threads', 0, 'Of a worker: its CPU threads; 0: all that it may use.', lower_bound=0
)

_PATIENCE = 1800.0  # seconds to wait for an address: the coordinator prepares the data before
_TELL_EVERY = 30.0
_ELSEWHERE = '192.0.2.1', 9  # no host's: reserved for documentation


def play() -> int:
  """Plays --role until the run is over or the process is asked to stop; gives the exit status.
  Raises BadInput."""
  role = ROLE.value
  if role == distill.COORDINATOR and _ADDRESS.value:
    raise start.BadInput(
      '--coordinator=HOST:PORT is for workers and the evaluator; the coordinator takes --host=NAME and '
      '--config.system.port=PORT.'
    )
  if role == 'evaluator' and not start.WORKDIR.value:
    raise start.BadInput(
      '--workdir=DIR is missing: the run directory, where the evaluator writes its rows.'
    )
  if role == _WORKER and not (start.WORKDIR.value or _ADDRESS.value):
    raise start.BadInput(
      'a worker needs --workdir=DIR, the run directory on a shared disk, or --coordinator=HOST:PORT.'
    )
  if _ADDRESS.value and not re.fullmatch(r'\S+:\d{1,5}', _ADDRESS.value):
    raise start.BadInput(f'--coordinator must be HOST:PORT, got {_ADDRESS.value!r}.')
  if supervisor.is_child():
    _play_node(_label(os.getppid()))
    return 0
  if role == distill.COORDINATOR:
    return _coordinate(start.stop_event())
  stop = start.stop_event(said='Stopping')
  if not (
    _ADDRESS.value or _await_address(run_directory.RunDirectory(start.WORKDIR.value).address, stop)
  ):
    return 0 if stop.is_set() else 1
  run, _ = _joined()
  # Of several here each has to be given its own, as Slurm does.
  gpus = placement.take_gpu(run.config.run.implementation)
  logging.info(gpus.remark)
  return supervisor.supervise(_label(os.getpid()), stop)


def own_host() -> str:
  """A name of this host, or else an address, by which others may reach it.

  'localhost' only where it has none; a warning says so.
  """
  for name in (socket.getfqdn(), socket.gethostname()):
    try:
      addresses = [ipaddress.ip_address(info[4][0]) for info in socket.getaddrinfo(name, None)]
    except (OSError, ValueError):  # a name that is not even known here
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


def _label(supervising: int) -> str:
  """The node's label; a worker keeps its name when it is started again by process `supervising`."""
  return (
    _NAME.value or f'worker_{socket.gethostname()}_{supervising}'
    if ROLE.value == _WORKER
    else ROLE.value
  )


def _coordinate(stop: threading.Event) -> int:
  run = start.ready(None, start.Here.COORDINATOR)
  for remark in run.remarks:
    logging.info(remark)
  port = run.config.system.port
  distill.check_port(port)
  address = f'{_HOST.value or own_host()}:{port or _free_port()}'
  files.write_atomically(run.directory.address, address + '\n')
  logging.info(
    'The coordinator is at %s. Whoever can connect to it can run code as you: see BUILD.md, "The coordinator\'s port".',
    address,
  )
  with terminal.shown(run.directory):
    run.directory.begin()
    supervisor.supervise(distill.COORDINATOR, stop)
  return start.outcome(run.directory)


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


def _await_address(path: str, stop: threading.Event) -> bool:
  """Whether the coordinator has published its address, within _PATIENCE."""
  begin = time.monotonic()
  tell = begin + 1.0
  while run_directory.read_address(path) is None and not stop.is_set():
    now = time.monotonic()
    if now > begin + _PATIENCE:
      logging.error('Giving up: no coordinator has written %s for %.0f s.', path, _PATIENCE)
      return False
    if now > tell:
      logging.info('Waiting for the coordinator to write %s.', path)
      tell = now + _TELL_EVERY
    time.sleep(0.2)
  return not stop.is_set()


def _joined() -> tuple[start.Run, str]:
  """The run this process takes part in, and the coordinator's address. Its settings are --config's,
  the run directory's, or the defaults.

  Raises:
    BadInput: there is no such run, or the settings are wrong.
  """
  directory = run_directory.RunDirectory(start.WORKDIR.value) if start.WORKDIR.value else None
  try:
    if command_line.CONFIG.value:
      config = validation.validate(command_line.CONFIG.value.to_dict())
    elif directory is None:
      config = schema.Config()
    elif (saved := directory.read_config()) is not None:
      config = saved.config
    else:
      raise start.BadInput(
        f'--workdir={directory.path} holds no run; a worker without a shared disk needs --coordinator alone.'
      )
  except (validation.ConfigError, run_directory.RunDirectoryError) as error:
    raise start.BadInput(str(error)) from error
  config = dataclasses.replace(
    config, system=dataclasses.replace(config.system, worker_threads=_THREADS.value)
  )
  address = _ADDRESS.value or run_directory.read_address(directory.address)
  return start.Run(config, directory, store.cache_folder(config.system.cache_dir)), address


def _play_node(label: str) -> None:
  """What a Launchpad launcher does for one node of a program: tells it where the others are, and
  runs it."""
  run, address = _joined()
  workers = [label] if ROLE.value == _WORKER else []
  program = distill.make_program(
    run, workers, published='' if _ADDRESS.value else run.directory.address
  )
  for node in program.get_all_nodes():
    node._initialize_context(context.LaunchType.LOCAL_MULTI_PROCESSING, launch_config=None)
  for group, nodes in program.groups.items():
    for node in nodes:
      for handle in node.input_handles:
        handle.connect(node, group)
  program.groups[distill.COORDINATOR][0].courier_address.bind(processes.FixedAddress(address))
  worker_manager.WorkerManager(register_in_thread=True)  # signals, and the event they set
  program.groups[label][0].function()
