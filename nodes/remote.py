"""Calls to the coordinator that neither hang nor give up at the first lost packet."""

import threading
import time
from typing import Any, Callable

from absl import logging

_PAUSE = 0.5  # seconds between tries
_SILENCE = 15.0  # seconds before it is worth a word


class CoordinatorLost(ConnectionError):
  """The coordinator has not answered for too long."""


class Stopping(Exception):
  """This process was asked to stop while it waited for an answer."""


class Retrying:
  """Wraps a coordinator, local or remote: a call that does not get through is repeated until `timeout` seconds have passed.

  Every call of the coordinator's may safely be made twice.
  """

  def __init__(self, coordinator: Any, timeout: float, stop: threading.Event,
               unreachable: Callable[[Exception], bool] = lambda error: False):
    """`unreachable` tells an error of the connection from one that the coordinator raised."""
    self._coordinator, self._timeout, self._stop, self._unreachable = coordinator, timeout, stop, unreachable

  def __getattr__(self, method: str) -> Callable[..., Any]:
    def call(*args):
      end = warn = None
      while True:
        try:
          return getattr(self._coordinator, method)(*args)
        except Exception as error:  # the transport's own type is not known here; all but lost connections go on up
          if not self._unreachable(error):
            raise
          now = time.monotonic()
          if end is None:
            end, warn = now + self._timeout, now + _SILENCE
          if now > warn:
            logging.info('The coordinator does not answer; trying again for %.0f s.', end - now)
            warn = end
          if now > end:
            raise CoordinatorLost(f'the coordinator has not answered for {self._timeout:.0f} s: {error}') from error
        if self._stop.wait(_PAUSE):
          raise Stopping()
    return call
