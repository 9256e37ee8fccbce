"""The process of one node: it does the node's work, or, if a launcher has started it, supervises a
child that does."""

import atexit
import functools
import os
import shutil
import sys
import threading
from typing import Any

import launchpad as lp
from absl import flags, logging
from launchpad import address as lp_address
from launchpad import context

from nodes.client import CoordinatorLost, Retrying
from programs import command_line, supervisor
from transport import unix_socket

COORDINATOR, EVALUATOR, WORKER = 'coordinator', 'evaluator', 'kernel_worker'
# Of `lp.CourierClient`. No answer of the coordinator takes longer than the timeout (seconds).
CLIENT_OPTIONS = {'call_timeout': 60, 'wait_for_ready': False}
_EVALUATOR_NICENESS = 10  # where cores are few, evaluation must not hold distillation up
_CONNECT_SECONDS = 5.0
_UNREACHABLE = ('UNAVAILABLE', 'DEADLINE_EXCEEDED', 'CANCELLED')
_PROGRESS = ('complete', 'evaluated')  # calls that show progress of the caller

# Here, because a node's process imports this module before Launchpad reads the flag, and gets no
# flag of the launcher's.
flags.FLAGS.set_default('lp_termination_notice_secs', supervisor.LAUNCHER_NOTICE)


class _Supervised(lp.PyClassNode):
  """A Launchpad node whose `run` goes on in a supervised child process.

  Attributes:
    label: for messages.
  """

  label: str

  def run(self) -> None:
    in_thread = self.launch_context.launch_type is context.LaunchType.LOCAL_MULTI_THREADING
    if in_thread or supervisor.is_child():
      super().run()
      return
    command_line.log_plainly()
    sys.exit(supervisor.supervise(self.label, lp.stop_event()))


class _UnixCourierNode(lp.CourierNode):
  """A Courier node that serves on a unix socket instead of a port."""

  def bind_addresses(self, **kwargs):
    del kwargs  # they are about ports
    folder = unix_socket.new_folder()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    self.courier_address.bind(_FixedAddress(unix_socket.SCHEME + os.path.join(folder, 'courier')))

  def run(self) -> None:
    instance = self._construct_instance()
    path = self.courier_address.resolve().removeprefix(unix_socket.SCHEME)
    with unix_socket.serving(instance, path):
      instance.run()


class CoordinatorNode(_Supervised, _UnixCourierNode):
  """The coordinator: the program's only server; it keeps its address when it is restarted."""

  label = COORDINATOR

  def __init__(self, workdir: str, cache: str):
    super().__init__(make_coordinator, workdir, cache)


class ClientNode(_Supervised):
  """A kernel worker or the evaluator; the arguments are those of `Client`."""

  def __init__(self, kind: str, coordinator: Any, timeout: float, **kwargs: Any):
    super().__init__(Client, kind, coordinator, timeout, **kwargs)
    self.label = kwargs.get('name', kind)


class _FixedAddress(lp_address.AbstractAddressBuilder):
  """An address that is known before the launch."""

  def __init__(self, address: str):
    self._address = address

  def build(self) -> str:
    return self._address


def make_coordinator(workdir: str, cache: str, stop: threading.Event | None = None):
  """Makes the coordinator of the run in `workdir`, or exits with a message.

  `stop` is set when the process is to stop; None: Launchpad's event.
  """
  from nodes import coordinator  # here and below: each process imports what its own node needs

  command_line.log_plainly()
  try:
    return coordinator.Coordinator(workdir, cache, stop or lp.stop_event(), supervisor.progressed)
  except coordinator.EXPECTED as error:
    logging.error('The run failed: %s', error)
    sys.exit(1)


def serve_coordinator(workdir: str, cache: str, path: str, stop: threading.Event) -> None:
  """Does without Launchpad what a `CoordinatorNode` does: serves the coordinator at the unix socket
  `path` until its run is over."""
  coordinator = make_coordinator(workdir, cache, stop)
  with unix_socket.serving(coordinator, path):
    coordinator.run()


class Client:
  """Runs a node that calls the coordinator."""

  def __init__(
    self,
    kind: str,
    coordinator: lp.CourierClient,
    timeout: float,
    stop: threading.Event | None = None,
    where: str = '',
    **kwargs: Any,
  ):
    """
    Args:
      kind: WORKER or EVALUATOR.
      coordinator: to call, at a unix socket.
      timeout: seconds without an answer after which the node gives up.
      stop: set when the process is to stop; None: Launchpad's event.
      where: the coordinator's address on the network, for messages.
      **kwargs: the node's own.
    """
    command_line.log_plainly()
    stop = stop or lp.stop_event()
    path = coordinator.address.removeprefix(unix_socket.SCHEME)
    answers = functools.partial(unix_socket.answers, path, _CONNECT_SECONDS)
    retrying = Retrying(coordinator, timeout, stop, _is_unreachable, answers, _note_progress, where)
    if kind == EVALUATOR:
      from nodes import evaluator

      os.nice(_EVALUATOR_NICENESS)
      self._node = evaluator.Evaluator(retrying, stop=stop, **kwargs)
    else:
      from nodes import kernel_worker

      self._node = kernel_worker.KernelWorker(retrying, stop=stop, **kwargs)

  def run(self) -> None:
    """Runs the node until it is told to stop; exits if the coordinator is lost."""
    try:
      self._node.run()
    except CoordinatorLost as error:
      logging.error('Giving up: %s', error)
      sys.exit(1)


def _note_progress(method: str) -> None:
  if method in _PROGRESS:
    supervisor.progressed()


def _is_unreachable(error: Exception) -> bool:
  """Tells whether an error is Courier's about a connection."""
  return type(error).__name__ == 'StatusNotOk' and any(
    name in str(getattr(error, 'code', '')) for name in _UNREACHABLE
  )
