"""The Launchpad program of a run: a coordinator that serves, and kernel workers and an evaluator
that ask it for work. How it is launched on this machine, and stopped."""

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

import launchpad as lp
import psutil
from absl import flags, logging
from launchpad.nodes.python.local_multi_processing import PythonProcess

from programs import command_line, isolation, placement, processes, signals, start, supervisor

_GRACE = 5.0  # seconds that the others have to end by themselves once the coordinator has


def make_program(run: start.Run) -> lp.Program:
  """Makes the graph of a run: `coordinator`, `kernel_worker_<i>` for each worker, `evaluator`."""
  system, workdir = run.config.system, run.directory.path
  threads = placement.worker_threads(system.worker_threads, system.num_workers)
  program = lp.Program('kip')
  coordinator = program.add_node(
    processes.CoordinatorNode(workdir, run.cache, system.port), label=processes.COORDINATOR
  )
  coordinator.set_client_kwargs(**processes.CLIENT_OPTIONS)

  def add_client(kind: str, label: str, **kwargs) -> None:
    timeout = system.coordinator_timeout
    node = processes.ClientNode(kind, coordinator, timeout, cache=run.cache, **kwargs)
    program.add_node(node, label=label)

  for i in range(system.num_workers):
    name = f'{processes.WORKER}_{i}'
    add_client(processes.WORKER, name, name=name, threads=threads)
  add_client(processes.EVALUATOR, processes.EVALUATOR, workdir=workdir, threads=1)
  return program


def prepare() -> start.Run:
  """Makes a run ready for a launch on this machine; the flags are parsed.

  Starts this process again in a network of its own: what needs the real one is done here. Raises
  what `start.ready` raises.
  """
  run = start.ready(placement.no_gpus if _is_threaded() else placement.find_gpus)
  check_port(run.config.system.port)
  isolation.restart_isolated()
  for remark in run.remarks:
    logging.info(remark)
  return run


def local_resources(run: start.Run) -> dict[str, PythonProcess]:
  """Chooses the environment of every process of a `local_mp` launch."""
  num_workers = run.config.system.num_workers
  placed = placement.place(num_workers, run.gpus.names)
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  path = os.pathsep.join([root, *filter(None, [os.environ.get('PYTHONPATH')])])
  shared = {'PYTHONPATH': path, supervisor.LAUNCHER: str(os.getpid())}
  environments = {
    processes.COORDINATOR: placed.coordinator,
    processes.EVALUATOR: placed.evaluator,
    **{f'{processes.WORKER}_{i}': worker for i, worker in enumerate(placed.workers)},
  }
  return {
    label: PythonProcess(env={**environment, **shared})
    for label, environment in environments.items()
  }


def warn_of_open_port(program: lp.Program, run: start.Run) -> None:
  """Warns if other hosts can reach the coordinator of a launched program."""
  coordinator = program.groups[processes.COORDINATOR][0]
  assert isinstance(coordinator, lp.CourierNode)
  if not isolation.is_isolated() and not run.config.system.accept_open_port:
    logging.warning(
      '%s is open to every host that can reach this one, and whoever connects can run code as you: '
      'no private network could be made (see BUILD.md; system.accept_open_port=True ends this '
      'warning).',
      coordinator.courier_address.resolve(),
    )


def stop_on_signals() -> None:
  """Makes Ctrl-C and its like stop a program that was just launched; its processes are told by this
  one alone."""
  stop_nodes = signal.getsignal(signal.SIGTERM)  # Launchpad's, which prints nothing
  assert callable(stop_nodes)
  signals.on_stop_signals(
    lambda: stop_nodes(signal.SIGTERM, None), lambda: _end_children(psutil.Process.kill)
  )


class Manager(Protocol):
  """The part of `lp.launch`'s result that is used."""

  def wait(
    self, labels_to_wait_for: Sequence[str] | None = None, raise_error: bool = True
  ) -> None: ...


def wait(manager: Manager) -> None:
  """Returns when a launched program is over.

  Without its coordinator the others have nothing left to do: they are ended.
  """
  # Launchpad, asked to stop, trips over processes that have just ended.
  with contextlib.suppress(psutil.NoSuchProcess):
    # Its names for the group in threads and in processes.
    manager.wait([processes.COORDINATOR, f'{processes.COORDINATOR}/0'], raise_error=False)
  signal.alarm(0)  # or its next look at them, every second while it stops, trips in what follows
  nodes = psutil.Process().children()
  psutil.wait_procs(nodes, timeout=_GRACE)
  for end in (psutil.Process.terminate, psutil.Process.kill):
    _end_children(end)
    psutil.wait_procs(nodes, timeout=supervisor.NOTICE + 2)
  manager.wait(raise_error=False)


def check_port(port: int) -> None:
  """Raises BadInput if the coordinator could not listen on `port`."""
  if not port:
    return
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(('', port))
    except OSError as error:
      raise command_line.BadInput(
        f'system.port={port} cannot be used ({error.strerror}); choose another, or 0 for any free '
        'one.'
      ) from error


def _is_threaded() -> bool:
  return flags.FLAGS.lp_launch_type == lp.LaunchType.LOCAL_MULTI_THREADING.value


def _end_children(end: Callable[[psutil.Process], None]) -> None:
  """Calls `end` with every process that this one has started, and with theirs."""
  for process in psutil.Process().children(recursive=True):
    with contextlib.suppress(psutil.NoSuchProcess):
      end(process)
