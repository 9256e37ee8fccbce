"""Calls the functions of a server."""

import contextlib
import datetime
import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from . import messages, wire
from .errors import StatusCode, StatusNotOk

_RETRY = 0.05  # seconds between two tries to reach a server


class Client:
  """Has a method for each function of a server; calling it calls the function there.

  Thread safe: each call that is going on has a connection of its own, which later calls use again.
  """

  def __init__(
    self,
    server_address: str,
    compress: bool = False,
    call_timeout: float | datetime.timedelta | None = None,
    wait_for_ready: bool = True,
    chunk_tensors: bool = False,
  ):
    """
    Args:
      server_address: 'unix:PATH' or 'HOST:PORT'.
      compress: has no effect.
      call_timeout: seconds, after which a call raises DEADLINE_EXCEEDED; None or 0: no limit.
      wait_for_ready: whether calls wait for a server to come; else they raise UNAVAILABLE.
      chunk_tensors: has no effect.
    """
    self._init_args = server_address, compress, call_timeout, wait_for_ready, chunk_tensors
    self._address, self._wait_for_ready = str(server_address), wait_for_ready
    if isinstance(call_timeout, datetime.timedelta):
      call_timeout = call_timeout.total_seconds()
    self._timeout = call_timeout or None
    self._idle: list[wire.Connection] = []  # list's own methods are atomic

  def __del__(self):
    for connection in vars(self).get('_idle', ()):
      connection.close()

  def __reduce__(self):
    return type(self), self._init_args

  @property
  def address(self) -> str:
    """Of the server."""
    return self._address

  @property
  def futures(self) -> '_AsyncClient':
    """A client whose methods return futures at once."""
    return _AsyncClient(self._call)

  def __getattr__(self, method: str) -> Callable[..., Any]:
    if method.startswith('__'):  # Python's own questions, such as copy's
      raise AttributeError(method)
    call = functools.partial(self._call, method)
    setattr(self, method, call)
    return call

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._call('__call__', *args, **kwargs)

  def _call(self, method: str | None, /, *args: Any, **kwargs: Any) -> Any:
    """Calls a function by name; None lists all."""
    request = messages.pack([method, list(args), kwargs])
    deadline = None if self._timeout is None else time.monotonic() + self._timeout
    with self._connection(deadline) as connection:
      connection.send(request, deadline)
      answer = connection.receive(deadline)
      if answer is None:
        raise ConnectionError('the connection was closed')
      code, value = messages.unpack(answer)
    if code is not None:
      raise StatusNotOk(value, StatusCode[code])
    return value

  @contextlib.contextmanager
  def _connection(self, deadline: float | None) -> Iterator[wire.Connection]:
    """A connection for a call. What is raised inside closes it, and becomes StatusNotOk."""
    connection = None
    try:
      connection = self._reused() or self._connect(deadline)
      yield connection
    except BaseException as error:
      if connection is not None:
        connection.close()
      if isinstance(error, TimeoutError):
        raise StatusNotOk('Deadline Exceeded', StatusCode.DEADLINE_EXCEEDED) from error
      if isinstance(error, wire.TooLong):
        raise StatusNotOk(str(error), StatusCode.RESOURCE_EXHAUSTED) from error
      if isinstance(error, OSError):
        message = f'no connection to {self._address}: {error}'
        raise StatusNotOk(message, StatusCode.UNAVAILABLE) from error
      raise
    self._idle.append(connection)

  def _reused(self) -> wire.Connection | None:
    while True:
      try:
        connection = self._idle.pop()
      except IndexError:
        return None
      if not connection.has_ended():
        return connection
      connection.close()

  def _connect(self, deadline: float | None) -> wire.Connection:
    while True:
      try:
        return wire.connect(self._address, deadline)
      except (OSError, wire.TooLong) as error:  # too long: the greeting of some other server
        if not self._wait_for_ready or isinstance(error, TimeoutError):
          raise
      time.sleep(_RETRY)


class _AsyncClient:
  """Its methods start calls and return futures."""

  def __init__(self, call: Callable[..., Any]):
    self._call = call

  def __getattr__(self, method: str) -> Callable[..., futures.Future]:
    return functools.partial(self._start, method)

  def __call__(self, *args: Any, **kwargs: Any) -> futures.Future:
    return self._start('__call__', *args, **kwargs)

  def _start(self, method: str, /, *args: Any, **kwargs: Any) -> futures.Future:
    """Starts to call a function by name. A future that is cancelled forgets the answer."""
    future: futures.Future = futures.Future()

    def run() -> None:
      result, error = None, None
      try:
        result = self._call(method, *args, **kwargs)
      except Exception as raised:  # it belongs to whoever waits for the result
        error = raised
      if not future.set_running_or_notify_cancel():
        return
      if error is None:
        future.set_result(result)
      else:
        future.set_exception(error)

    threading.Thread(target=run, name=f'courier {method}', daemon=True).start()
    return future


def list_methods(client: Client) -> list[str]:
  """Lists the names of a server's functions. Raises StatusNotOk."""
  return client._call(None)
