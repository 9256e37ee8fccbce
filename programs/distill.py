"""The Launchpad program: one coordinator that serves, kernel workers and an evaluator that ask it
for work."""

import contextlib
import os
import signal
import socket
from typing import Callable, Sequence

import launchpad as lp
import psutil
from launchpad.launch import worker_manager
from launchpad.nodes.python.local_multi_processing import PythonProcess

from programs import placement, processes, start, supervisor

COORDINATOR = 'coordinator'
_CALL_TIMEOUT = 60  # seconds: no answer of the coordinator's takes longer
_GRACE = 5.0  # seconds that the others have to end by themselves once the coordinator has


def make_program(run: start.Run, workers: Sequence[str] = (), published: str = '') -> lp.Program:
  """The graph of a run that is ready: `coordinator`, the workers, `evaluator`.

  Args:
    run: as `start.ready` gives it.
    workers: names of those that share this host; all of the run's, `kernel_worker_<i>`, where it is
      empty.
    published: file with the coordinator's address, where that may change.
  """
  system, workdir = run.config.system, run.directory.path if run.directory else ''
  workers = workers or [f'kernel_worker_{i}' for i in range(system.num_workers)]
  threads = placement.worker_threads(system.worker_threads, len(workers))
  program = lp.Program('kip')
  coordinator = program.add_node(
    processes.CoordinatorNode(workdir, run.cache, system.port), label=COORDINATOR
  )
  coordinator.set_client_kwargs(call_timeout=_CALL_TIMEOUT, wait_for_ready=False)
  for name in workers:
    program.add_node(
      processes.ClientNode(
        'kernel_worker',
        coordinator,
        system.coordinator_timeout,
        published,
        name=name,
        threads=threads,
        cache=run.cache,
      ),
      label=name,
    )
  program.add_node(
    processes.ClientNode(
      'evaluator',
      coordinator,
      system.coordinator_timeout,
      published,
      workdir=workdir,
      threads=1,
      cache=run.cache,
    ),
    label='evaluator',
  )
  return program


def local_resources(run: start.Run) -> dict[str, PythonProcess]:
  """The environment of every process of a `local_mp` launch."""
  system = run.config.system
  placed = placement.place(system.num_workers, run.gpus.names)
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  path = os.pathsep.join([root, *filter(None, [os.environ.get('PYTHONPATH')])])
  process = lambda environment: PythonProcess(
    env={**environment, 'PYTHONPATH': path, supervisor.LAUNCHER: str(os.getpid())}
  )
  return {
    COORDINATOR: process(placed.coordinator),
    'evaluator': process(placed.evaluator),
    **{f'kernel_worker_{i}': process(environment) for i, environment in enumerate(placed.workers)},
  }


def launch(program: lp.Program, run: start.Run) -> worker_manager.WorkerManager:
  """Launches a program on this machine.

  What stops it, Ctrl-C for one, reaches its processes through this one alone.
  """
  with supervisor.terminal_signals_blocked():
    manager = lp.launch(program, local_resources=local_resources(run), terminal='current_terminal')
  launchpads = signal.getsignal(signal.SIGTERM)  # it asks all nodes to stop, without a word
  start.on_stop_signals(
    lambda: launchpads(signal.SIGTERM, None), lambda: _end_children(psutil.Process.kill)
  )
  return manager


def _end_children(end: Callable[[psutil.Process], None]) -> None:
  """Calls `end` with every process that this one has started, and with theirs."""
  for process in psutil.Process().children(recursive=True):
    with contextlib.suppress(psutil.NoSuchProcess):
      end(process)


def wait(manager: worker_manager.WorkerManager) -> None:
  """Returns when a launched program is over: without its coordinator the others have nothing left
  to do."""
  # Launchpad, asked to stop, trips over processes that have just ended.
  with contextlib.suppress(psutil.NoSuchProcess):
    # Local_mt's and local_mp's name for it.
    manager.wait([COORDINATOR, f'{COORDINATOR}/0'], raise_error=False)
  signal.alarm(0)  # or its next look at them, every second while it stops, trips in what follows
  nodes = psutil.Process().children()
  psutil.wait_procs(nodes, timeout=_GRACE)
  for end in (psutil.Process.terminate, psutil.Process.kill):
    _end_children(end)
    psutil.wait_procs(nodes, timeout=supervisor.NOTICE + 2)
  manager.wait(raise_error=False)


def coordinator_address(program: lp.Program) -> str:
  """`host:port` of a launched program's coordinator."""
  return program.groups[COORDINATOR][0].courier_address.resolve()


def check_port(port: int) -> None:
  """Raises BadInput where the coordinator could not listen on `port`."""
  if port:
    with socket.socket() as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        probe.bind(('', port))
      except OSError as error:
        raise start.BadInput(
          f'system.port={port} cannot be used ({error.strerror}); choose another, or 0 for any free one.'
        ) from error
