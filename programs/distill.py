"""The Launchpad program: one coordinator that serves, kernel workers and an evaluator that ask it for work."""

import os
import socket
import sys
from typing import Any

from absl import logging
import launchpad as lp
from launchpad import address as lp_address
from launchpad.nodes.python.local_multi_processing import PythonProcess

from nodes.remote import CoordinatorLost
from nodes.remote import Retrying
from programs import placement
from programs import start

_CALL_TIMEOUT = 60  # seconds: no answer of the coordinator's takes longer
_EVALUATOR_NICENESS = 10  # where cores are few, evaluation must not hold distillation up
_UNREACHABLE = ('UNAVAILABLE', 'DEADLINE_EXCEEDED')


def make_program(run: start.Run) -> lp.Program:
  """The graph of a run that is ready: `coordinator`, `kernel_worker_<i>`, `evaluator`."""
  system, workdir = run.config['system'], run.directory.path
  threads = placement.worker_threads(system['worker_threads'], system['num_workers'])
  program = lp.Program('kip')
  coordinator = program.add_node(_PortNode(_coordinator, workdir, run.cache, port=system['port']), label='coordinator')
  coordinator.set_client_kwargs(call_timeout=_CALL_TIMEOUT, wait_for_ready=False)
  for i in range(system['num_workers']):
    name = f'kernel_worker_{i}'
    program.add_node(lp.PyClassNode(_Client, 'kernel_worker', coordinator, system['coordinator_timeout'],
                                    name=name, threads=threads, cache=run.cache), label=name)
  program.add_node(lp.PyClassNode(_Client, 'evaluator', coordinator, system['coordinator_timeout'], workdir=workdir, threads=1,
                                  cache=run.cache), label='evaluator')
  return program


def local_resources(run: start.Run) -> dict[str, PythonProcess]:
  """The environment of every process of a `local_mp` launch."""
  system = run.config['system']
  threads = placement.worker_threads(system['worker_threads'], system['num_workers'])
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  path = os.pathsep.join([root, *filter(None, [os.environ.get('PYTHONPATH')])])
  environment = lambda threads: {**placement.environment(threads), 'PYTHONPATH': path}
  return {'coordinator': PythonProcess(env=environment(1)), 'evaluator': PythonProcess(env=environment(1)),
          **{f'kernel_worker_{i}': PythonProcess(env=environment(threads)) for i in range(system['num_workers'])}}


def coordinator_address(program: lp.Program) -> str:
  """`host:port` of a launched program's coordinator."""
  return program.groups['coordinator'][0].courier_address.resolve()


def check_port(port: int) -> None:
  """Raises BadInput where the coordinator could not listen on `port`."""
  if port:
    with socket.socket() as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        probe.bind(('', port))
      except OSError as error:
        raise start.BadInput(f'system.port={port} cannot be used ({error.strerror}); choose another, or 0 for any free one.') from error


class _PortNode(lp.CourierNode):
  """A Courier node on a port of our choice."""

  def __init__(self, constructor, *args, port: int):
    super().__init__(constructor, *args)
    self._port = port

  def bind_addresses(self, **kwargs):
    if self._port:
      self.courier_address.bind(_FixedAddress(f'localhost:{self._port}'))
    else:
      super().bind_addresses(**kwargs)


class _FixedAddress(lp_address.AbstractAddressBuilder):

  def __init__(self, address: str):
    self._address = address

  def build(self) -> str:
    return self._address


def _coordinator(workdir: str, cache: str):
  from nodes import coordinator  # here and below: each process imports what its own node needs
  start.log_plainly()
  return coordinator.Coordinator(workdir, cache, lp.stop_event())


class _Client:
  """A node that calls the coordinator: a kernel worker or the evaluator."""

  def __init__(self, kind: str, coordinator: Any, timeout: float, **kwargs: Any):
    start.log_plainly()
    stop = lp.stop_event()
    coordinator = Retrying(coordinator, timeout, stop, _unreachable)
    if kind == 'evaluator':
      from nodes import evaluator
      os.nice(_EVALUATOR_NICENESS)
      self._node = evaluator.Evaluator(coordinator, stop=stop, **kwargs)
    else:
      from nodes import kernel_worker
      self._node = kernel_worker.KernelWorker(coordinator, stop=stop, **kwargs)

  def run(self) -> None:
    try:
      self._node.run()
    except CoordinatorLost as error:
      logging.error('Giving up: %s', error)
      sys.exit(1)


def _unreachable(error: Exception) -> bool:
  return type(error).__name__ == 'StatusNotOk' and any(name in str(getattr(error, 'code', '')) for name in _UNREACHABLE)
