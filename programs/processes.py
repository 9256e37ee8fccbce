"""What one node's process does: the node's work, or, in the process that a launcher starts,
watching over a child that does it."""

import functools
import os
import socket
import sys
from typing import Any

import launchpad as lp
from absl import logging
from launchpad import address as lp_address
from launchpad import context
from launchpad.launch import worker_manager

from artifacts import run_directory
from nodes.client import CoordinatorLost, Retrying
from programs import start, supervisor

_EVALUATOR_NICENESS = 10  # where cores are few, evaluation must not hold distillation up
_CONNECT_SECONDS = 5.0
_UNREACHABLE = ('UNAVAILABLE', 'DEADLINE_EXCEEDED', 'CANCELLED')
_PROGRESS = ('complete', 'evaluated')  # calls by which a client has made progress


class _Supervised:
  """Of a Launchpad node: `run` in a process of its own, respawned."""

  def run(self) -> None:
    # No flag of the launcher's gets here.
    worker_manager.get_worker_manager()._termination_notice_secs = supervisor.LAUNCHER_NOTICE
    if (
      self.launch_context.launch_type is context.LaunchType.LOCAL_MULTI_THREADING
      or supervisor.is_child()
    ):
      super().run()
      return
    start.log_plainly()
    sys.exit(supervisor.supervise(self.name, lp.stop_event()))


class CoordinatorNode(_Supervised, lp.CourierNode):
  """The coordinator: a server on `port`, or on any free one; every life of it has the same
  address."""

  name = 'coordinator'

  def __init__(self, workdir: str, cache: str, port: int):
    super().__init__(_coordinator, workdir, cache)
    self._port = port

  def bind_addresses(self, **kwargs):
    if self._port:
      self.courier_address.bind(FixedAddress(f'localhost:{self._port}'))
    else:
      super().bind_addresses(**kwargs)


class ClientNode(_Supervised, lp.PyClassNode):
  """A node that calls the coordinator: a kernel worker or the evaluator."""

  def __init__(self, kind: str, coordinator: Any, timeout: float, published: str, **kwargs: Any):
    super().__init__(_Client, kind, coordinator, timeout, published, **kwargs)
    self.name = kwargs.get('name', kind)


class FixedAddress(lp_address.AbstractAddressBuilder):
  """An address that is known beforehand."""

  def __init__(self, address: str):
    self._address = address

  def build(self) -> str:
    return self._address


def _coordinator(workdir: str, cache: str):
  from nodes import coordinator  # here and below: each process imports what its own node needs

  start.log_plainly()
  try:
    return coordinator.Coordinator(workdir, cache, lp.stop_event(), supervisor.progressed)
  except coordinator.EXPECTED as error:
    logging.error('The run failed: %s', error)
    sys.exit(1)


class _Client:
  """Runs a kernel worker or the evaluator."""

  def __init__(self, kind: str, coordinator: Any, timeout: float, published: str, **kwargs: Any):
    start.log_plainly()
    stop = lp.stop_event()
    address = coordinator.address
    coordinator = Retrying(
      coordinator,
      timeout,
      stop,
      _unreachable,
      functools.partial(_listens, address, published),
      _note_progress,
      address,
    )
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
      logging.error('%s: %s', 'Starting afresh' if error.was_there else 'Giving up', error)
      sys.exit(supervisor.RESTART_STATUS if error.was_there else 1)


def _listens(address: str, published: str) -> bool:
  """Whether somebody listens at `address`. Raises CoordinatorLost where the file `published` names
  another."""
  now = run_directory.read_address(published) if published else None
  if now not in (None, address):
    raise CoordinatorLost(f'the coordinator is at {now} now.', was_there=True)
  host, _, port = address.rpartition(':')
  try:
    socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    return True
  except OSError:
    return False


def _note_progress(method: str) -> None:
  if method in _PROGRESS:
    supervisor.progressed()


def _unreachable(error: Exception) -> bool:
  return type(error).__name__ == 'StatusNotOk' and any(
    name in str(getattr(error, 'code', '')) for name in _UNREACHABLE
  )
