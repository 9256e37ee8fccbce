"""Calls to the coordinator that neither hang nor give up at the first lost packet."""

import threading
import time
from typing import Any, Callable

from absl import logging

_PAUSE = 0.5  # seconds between tries
_SILENCE = 15.0  # seconds before it is worth a word


class CoordinatorLost(ConnectionError):
  """The coordinator has not answered for too long. `was_there`: it did before."""

  def __init__(self, message: str, was_there: bool):
    super().__init__(message)
    self.was_there = was_there


class Stopping(Exception):
  """This process was asked to stop while it waited for an answer."""


class Retrying:
  """Wraps a coordinator, local or remote: a call that does not get through is repeated until
  `timeout` seconds have passed.

  Every call of the coordinator's may safely be made twice. Where there were answers before, half of
  `timeout` is enough: a process that is then started afresh, with a new connection, has the other
  half and more.
  """

  def __init__(
    self,
    coordinator: Any,
    timeout: float,
    stop: threading.Event,
    unreachable: Callable[[Exception], bool] = lambda error: False,
    listening: Callable[[], bool] = lambda: True,
    answered: Callable[[str], None] = lambda method: None,
    address: str = '',
  ):
    """
    Args:
      coordinator: what to call.
      timeout: seconds.
      stop: set when the process is to stop.
      unreachable: tells an error of the connection from one that the coordinator raised.
      listening: whether it is worth another try. gRPC backs off further with every try that fails,
        up to two minutes.
      answered: called with the method's name after each call.
      address: where the coordinator is, for messages.
    """
    self._coordinator, self._timeout, self._stop = coordinator, timeout, stop
    self._unreachable, self._listening, self._answered = unreachable, listening, answered
    self._where = f' at {address}' if address else ''
    self._was_there = False

  def until(self, stop: threading.Event) -> 'Retrying':
    """The same, but its calls are given up when `stop` is set."""
    other = Retrying.__new__(Retrying)
    vars(other).update(vars(self), _stop=stop)
    return other

  def __getattr__(self, method: str) -> Callable[..., Any]:
    def call(*args):
      start, told, lost = time.monotonic(), 0.0, None
      while True:
        if lost is None or self._listening():
          try:
            result = getattr(self._coordinator, method)(*args)
            self._was_there = True
            self._answered(method)
            return result
          except Exception as error:
            # The transport's own type is not known here; all but lost connections go on up.
            if not self._unreachable(error):
              raise
            lost = error
        silent, timeout = (
          time.monotonic() - start,
          self._timeout / 2 if self._was_there else self._timeout,
        )
        if silent > timeout:
          raise CoordinatorLost(
            f'the coordinator has not answered for {silent:.0f} s{self._where}: {lost}',
            self._was_there,
          ) from lost
        if silent > told + _SILENCE:
          logging.info(
            'The coordinator has not answered for %.0f s%s; trying for %.0f s more.',
            silent,
            self._where,
            timeout - silent,
          )
          told = silent
        end = time.monotonic() + _PAUSE
        while time.monotonic() < end:
          # Event.wait can deadlock with a signal handler that sets the event.
          if self._stop.is_set():
            raise Stopping()
          time.sleep(0.05)

    return call
