"""The Launchpad program of a run: a coordinator that serves, and kernel workers and an evaluator
that ask it for work. How it is launched on this machine, and stopped."""

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from typing import Protocol

import launchpad as lp
import psutil
from absl import flags, logging
from launchpad.nodes.python.local_multi_processing import PythonProcess

from programs import placement, processes, signals, start, supervisor
from transport import unix_socket

_GRACE = 5.0  # seconds that the others have to end by themselves once the coordinator has


def make_program(run: start.Run) -> lp.Program:
  """Makes the graph of a run: `coordinator`, `kernel_worker_<i>` for each worker, `evaluator`."""
  system, workdir = run.config.system, run.directory.path
  threads = placement.worker_threads(system.worker_threads, system.num_workers)
  program = lp.Program('kip')
  coordinator = program.add_node(
    processes.CoordinatorNode(workdir, run.cache), label=processes.COORDINATOR
  )
  coordinator.set_client_kwargs(**processes.CLIENT_OPTIONS)

  def add_client(kind: str, label: str, **kwargs) -> None:
    timeout = system.worker_timeout
    node = processes.ClientNode(kind, coordinator, timeout, cache=run.cache, **kwargs)
    program.add_node(node, label=label)

  for i in range(system.num_workers):
    name = f'{processes.WORKER}_{i}'
    add_client(processes.WORKER, name, name=name, threads=threads)
  add_client(processes.EVALUATOR, processes.EVALUATOR, workdir=workdir, threads=1)
  return program


def prepare() -> start.Run:
  """Makes a run ready for a launch on this machine; the flags are parsed.

  Raises what `start.ready` and `unix_socket.check` raise.
  """
  unix_socket.check()
  run = start.ready(placement.no_gpus if _is_threaded() else placement.find_gpus)
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


def _is_threaded() -> bool:
  return flags.FLAGS.lp_launch_type == lp.LaunchType.LOCAL_MULTI_THREADING.value


def _end_children(end: Callable[[psutil.Process], None]) -> None:
  """Calls `end` with every process that this one has started, and with theirs."""
  for process in psutil.Process().children(recursive=True):
    with contextlib.suppress(psutil.NoSuchProcess):
      end(process)
