"""Calls the coordinator, again where a call is lost, up to a time limit."""

import threading
import time
from collections.abc import Callable
from typing import Any

from absl import logging

from artifacts.waiting import pause

_SILENCE = 15.0  # seconds before a line is logged


class CoordinatorLost(ConnectionError):
  """The coordinator has not answered for too long."""


class Stopping(Exception):
  """This process was asked to stop while it waited for an answer."""


class Retrying:
  """A coordinator whose lost calls are repeated until `timeout` seconds have passed.

  Each of its methods may safely be called twice, and raises CoordinatorLost, Stopping, and what the
  coordinator raised.
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
    pause_seconds: float = 0.5,
  ):
    """
    Args:
      coordinator: the coordinator, or a client of it.
      timeout: seconds.
      stop: set when the process is to stop.
      unreachable: whether an error is the connection's, not one that the coordinator raised.
      listening: whether the coordinator can be reached; while it cannot, no try is made: gRPC backs
        off further with every failed try, up to two minutes.
      answered: called with the method's name after each answer.
      address: of the coordinator, for messages.
      pause_seconds: between two tries.
    """
    self._coordinator, self._timeout, self._stop = coordinator, timeout, stop
    self._unreachable, self._listening, self._answered = unreachable, listening, answered
    self._where = f' at {address}' if address else ''
    self._pause = pause_seconds

  def until(self, stop: threading.Event) -> 'Retrying':
    """Copies this, with another event that makes calls raise Stopping."""
    other = Retrying.__new__(Retrying)
    vars(other).update(vars(self), _stop=stop)
    return other

  def __getattr__(self, method: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
      start, logged, lost = time.monotonic(), 0.0, None
      while True:
        if lost is None or self._listening():
          try:
            result = getattr(self._coordinator, method)(*args)
            self._answered(method)
            return result
          except Exception as error:
            # Any type: that of lost connections is the transport's own.
            if not self._unreachable(error):
              raise
            lost = error
        silent = time.monotonic() - start
        if silent > self._timeout:
          raise CoordinatorLost(
            f'the coordinator has not answered for {silent:.0f} s{self._where}: {lost}'
          ) from lost
        if silent > logged + _SILENCE:
          logging.info(
            'The coordinator has not answered for %.0f s%s; trying for %.0f s more.',
            silent,
            self._where,
            self._timeout - silent,
          )
          logged = silent
        pause(self._pause, self._stop)
        if self._stop.is_set():
          raise Stopping()

    return call
