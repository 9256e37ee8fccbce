"""Serves functions to clients."""

import contextlib
import os
import socket
import stat
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from absl import logging

from . import messages, wire

_GRACE = 60.0  # seconds that `Stop` waits for calls
# What Courier makes of exceptions.
_CODES = {
  (TypeError, ValueError): 'INVALID_ARGUMENT',
  (LookupError,): 'NOT_FOUND',
  (MemoryError,): 'RESOURCE_EXHAUSTED',
  (NotImplementedError,): 'UNIMPLEMENTED',
}
_BACKLOG = 1024  # connections that wait to be accepted


class Server:
  """Calls functions for clients. Each connection has a thread, and no call waits for another.

  A server is started and stopped once.
  """

  def __init__(
    self,
    name: str | None = None,
    port: int | None = None,
    thread_pool_size: int = 16,
    path: str | None = None,
  ):
    """
    Args:
      name: has no effect.
      port: to listen on, for this machine alone.
      thread_pool_size: has no effect.
      path: of a Unix socket to listen on instead, for this user alone; one that is there is
        replaced, and it stays there when the server has stopped.
    """
    if (port is None) == (path is None):
      raise ValueError('a server needs a port or a path')
    self._port, self._path = port, path
    self._functions: dict[str, Callable[..., Any]] = {}
    self._listener: socket.socket | None = None
    self._threads: dict[threading.Thread, wire.Connection] = {}
    self._lock, self._stopping, self._stopped = threading.Lock(), False, threading.Event()

  @property
  def port(self) -> int | None:
    """That it listens on, if any."""
    return self._port

  @property
  def address(self) -> str:
    """For clients on this machine."""
    return f'localhost:{self._port}' if self._path is None else wire.address_of(self._path)

  @property
  def has_started(self) -> bool:
    """Whether `Start` was called."""
    return self._listener is not None

  def Bind(self, method_name: str, py_func: Callable[..., Any]) -> None:
    """Serves a function by a name; allowed while the server runs."""
    self._functions[method_name] = py_func

  def BindHandler(self, method_name: str, handler: Callable[..., Any]) -> None:
    """Serves what `BuildPyCallHandler` made of a function."""
    self.Bind(method_name, handler)

  def Unbind(self, method_name: str) -> None:
    """Serves a function no longer."""
    del self._functions[method_name]

  def Start(self) -> None:
    """Starts to listen. Raises OSError where that is not possible."""
    if self._listener:
      raise ValueError('Server already started')
    if self._path is not None:
      self._listener = _listen_at(self._path)
    else:
      self._listener = socket.create_server(('localhost', self._port or 0), backlog=_BACKLOG)
    threading.Thread(target=self._accept, name='courier', daemon=True).start()

  def Join(self) -> None:
    """Waits until the server has stopped."""
    if not self._listener:
      raise ValueError('Server not started')
    self._stopped.wait()

  def Stop(self) -> None:
    """Ends the server: calls that are going on are answered, if they take less than a minute."""
    if not self._listener:
      raise ValueError('Server not started yet')
    with self._lock:
      first, self._stopping = not self._stopping, True
      threads = dict(self._threads)
    if first:
      with contextlib.suppress(OSError):
        self._listener.shutdown(socket.SHUT_RDWR)  # ends a waiting `accept`
      self._listener.close()
      for connection in threads.values():
        connection.end_input()
      end = time.monotonic() + _GRACE
      for thread, connection in threads.items():
        thread.join(max(end - time.monotonic(), 0.0))
        connection.close()
      self._stopped.set()
    self._stopped.wait()

  def _accept(self) -> None:
    assert self._listener
    while True:
      try:
        connected, _ = self._listener.accept()
      except OSError as error:
        if self._stopping:
          return
        logging.warning('A connection was lost: %s', error)  # no file or memory left for it
        time.sleep(0.1)
        continue
      connection = wire.Connection(connected)
      thread = threading.Thread(
        target=self._serve, args=(connection,), name='courier call', daemon=True
      )
      with self._lock:
        if self._stopping:
          connection.close()
          return
        self._threads[thread] = connection
      thread.start()

  def _serve(self, connection: wire.Connection) -> None:
    """Answers the calls of a connection, one after the other, until its end."""
    try:
      connection.send(wire.GREETING)
      while (request := connection.receive()) is not None:
        answer = self._answer(request)
        request.release()
        try:
          connection.send(answer)
        except wire.TooLong as error:
          connection.send(_error('RESOURCE_EXHAUSTED', str(error)))
    except (OSError, wire.TooLong) as error:
      logging.debug('A connection has ended: %s', error)  # its client has gone, or is none
    finally:
      connection.close()
      with self._lock:
        self._threads.pop(threading.current_thread(), None)

  def _answer(self, request: memoryview) -> bytes:
    """Calls a function: [name, positional arguments, named ones] -> [code or None, result]."""
    try:
      method, args, kwargs = messages.unpack(request)
      if method is None:
        return messages.pack([None, sorted(self._functions)])
      function = self._functions.get(method)
    except (TypeError, ValueError) as error:
      return _error('INVALID_ARGUMENT', str(error))
    if function is None:
      return _error('NOT_FOUND', f'method {method} not found')
    try:
      result = function(*args, **kwargs)
    except BaseException as error:  # SystemExit too: the client waits for an answer
      assert error.__traceback__
      lines = traceback.format_exception(type(error), error, error.__traceback__.tb_next)
      message = f'Python exception was raised on the server:\n{"".join(lines)}'
      logging.error('%s', message)
      codes = [code for kinds, code in _CODES.items() if isinstance(error, kinds)]
      return _error(codes[0] if codes else 'UNKNOWN', message)
    try:
      return messages.pack([None, result])
    except (OverflowError, TypeError, ValueError) as error:
      return _error('INVALID_ARGUMENT', f'the result of {method}: {error}')


def _error(code: str, message: str) -> bytes:
  return messages.pack([code, message])


def _listen_at(path: str) -> socket.socket:
  """Listens at a Unix socket, which takes the place of what is there once it listens."""
  listener, new = socket.socket(socket.AF_UNIX), f'{path}.next'
  try:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(new)
    listener.bind(new)
    os.chmod(new, stat.S_IRUSR | stat.S_IWUSR)  # before anybody can connect
    listener.listen(_BACKLOG)
    os.replace(new, path)
  except OSError:
    listener.close()
    raise
  return listener
