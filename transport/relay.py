"""Relays between a unix socket and TLS: the coordinator's host has a `Listener`, every process on
another host a `Dialer`.

They run in the supervising parents, a thread for each connection. So the coordinator keeps its port
over the lives of its process, and the nodes know of nothing but unix sockets.
"""

import contextlib
import resource
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging

from transport.secret import Secret

_CHUNK = 2**18  # bytes read before they are passed on
_BACKLOG = 1024
_LOOK = 0.5  # seconds between two looks for handshakes that take too long
_NO_DESCRIPTORS = 0.05  # seconds to wait for one
_LOG_SECONDS = 30.0  # between two lines of a kind
# A peer that has gone without a word is noticed after a minute; seconds, the last milliseconds.
_KEEPALIVE = {'TCP_KEEPIDLE': 30, 'TCP_KEEPINTVL': 10, 'TCP_KEEPCNT': 3, 'TCP_USER_TIMEOUT': 60_000}


class Limits(NamedTuple):
  """Limits on peers that have not proved yet that they have the key.

  Attributes:
    seconds: that they may take.
    pending: how many there may be; the oldest makes room for another.
  """

  seconds: float = 10.0
  pending: int = 128


LIMITS = Limits()


class AnotherKey(ConnectionError):
  """The process at the coordinator's address does not have the run's key."""


class Listener:
  """The coordinator's port: it passes on the connections of those who have the run's key, and no
  byte of anybody else.

  Attributes:
    port: at which it listens, on all interfaces.
  """

  def __init__(self, secret: Secret, port: int, path: str, limits: Limits = LIMITS):
    """Starts to listen.

    Args:
      secret: the run's.
      port: 0 for any free one.
      path: of the unix socket to which connections are passed on; it may come and go.
      limits: for the handshakes.

    Raises OSError if the port cannot be used.
    """
    self._secret, self._context, self._path = secret, secret.server_context(), path
    self._limits, self._lock = limits, threading.Lock()
    self._pending: dict[ssl.SSLSocket, float] = {}  # until when each may take; the oldest first
    _allow_many_descriptors()
    both = socket.has_dualstack_ipv6()
    self._socket = socket.create_server(
      ('', port),
      family=socket.AF_INET6 if both else socket.AF_INET,
      backlog=_BACKLOG,
      dualstack_ipv6=both,
    )
    self._socket.settimeout(_LOOK)
    self.port: int = self._socket.getsockname()[1]
    threading.Thread(target=self._accept, daemon=True).start()

  def close(self) -> None:
    """Stops listening."""
    self._socket.close()

  def _accept(self) -> None:
    while self._socket.fileno() >= 0:
      self._end_pending(self._limits.pending)
      try:
        connection, address = self._socket.accept()
      except TimeoutError:
        continue
      except OSError:  # there is no descriptor left, the peer has gone, or this was closed
        self._end_pending(len(self._pending) // 2)
        time.sleep(_NO_DESCRIPTORS)
        continue
      self._end_pending(self._limits.pending - 1)
      try:
        _prepare(connection)
        tls = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with self._lock:
          self._pending[tls] = time.monotonic() + self._limits.seconds
        threading.Thread(target=self._serve, args=(tls, address[0]), daemon=True).start()
      except (OSError, RuntimeError):  # the peer has gone; there can be no more threads
        connection.close()

  def _end_pending(self, keep: int) -> None:
    """Ends the handshakes that are out of time, and the oldest of more than `keep`."""
    now = time.monotonic()
    with self._lock:
      surplus = len(self._pending) - keep
      doomed = [
        tls for i, (tls, end) in enumerate(self._pending.items()) if i < surplus or end < now
      ]
      for tls in doomed:
        del self._pending[tls]
    for tls in doomed:
      with contextlib.suppress(OSError):  # not SSLSocket's: that one's thread is using it
        socket.socket.shutdown(tls, socket.SHUT_RDWR)

  def _serve(self, tls: ssl.SSLSocket, host: str) -> None:
    with tls, contextlib.suppress(OSError):  # whichever end has gone, the client asks again
      try:
        tls.settimeout(self._limits.seconds)
        tls.do_handshake()
        known = tls.getpeercert(binary_form=True) == self._secret.certificate
      except OSError:
        known = False
      finally:
        with self._lock:
          self._pending.pop(tls, None)
      if not known:
        logging.log_every_n_seconds(
          logging.WARNING,
          "Refused a connection from %s, which does not have the run's key.",
          _LOG_SECONDS,
          host,
        )
        return
      with socket.socket(socket.AF_UNIX) as plain:
        plain.connect(self._path)
        relay(tls, plain)


class Dialer:
  """A unix socket behind which the coordinator is, wherever that is on the network."""

  def __init__(self, secret: Secret, where: Callable[[], str | None], path: str):
    """Starts to listen.

    Args:
      secret: the run's.
      where: gives the coordinator's HOST:PORT, None while it is not known; called for every
        connection, since it may change.
      path: of the unix socket.
    """
    self._secret, self._context, self._where = secret, secret.client_context(), where
    self._socket = socket.socket(socket.AF_UNIX)
    self._socket.bind(path)
    self._socket.listen(_BACKLOG)
    threading.Thread(target=self._accept, daemon=True).start()

  def connect(self) -> ssl.SSLSocket:
    """Connects to the coordinator.

    Raises AnotherKey, and OSError if it cannot be reached.
    """
    address = self._where()
    if address is None:
      raise ConnectionError('its address is not known')
    host, _, port = address.rpartition(':')
    connection = socket.create_connection((host.strip('[]'), int(port)), LIMITS.seconds)
    try:
      _prepare(connection)
      tls = self._context.wrap_socket(connection)
    except ssl.SSLError as error:
      raise AnotherKey(f"the process at {address} does not have this run's key") from error
    finally:
      connection.close()  # what `wrap_socket` has taken over stays open
    if tls.getpeercert(binary_form=True) != self._secret.certificate:
      tls.close()
      raise AnotherKey(f"the process at {address} does not have this run's key")
    return tls

  def _accept(self) -> None:
    while True:
      try:
        plain, _ = self._socket.accept()
      except OSError:  # there is no descriptor left
        time.sleep(_NO_DESCRIPTORS)
        continue
      threading.Thread(target=self._serve, args=(plain,), daemon=True).start()

  def _serve(self, plain: socket.socket) -> None:
    with plain:
      try:
        tls = self.connect()
      except OSError as error:
        logging.log_every_n_seconds(
          logging.WARNING, 'The coordinator cannot be reached: %s.', _LOG_SECONDS, error
        )
        return
      with tls, contextlib.suppress(OSError):
        relay(tls, plain)


class _Flow:
  """One direction of a relay: what is read from one socket is written to the other."""

  def __init__(self, source: Any, target: Any):
    self._source, self._target = source, target
    self._buffer = memoryview(bytearray(_CHUNK))
    self._begin = self._end = 0  # of what is to be written
    self.ended = False
    self.waits: dict[Any, int] = {}  # events of sockets without which nothing moves

  def move(self) -> bool:
    """Reads and writes what it can; returns whether that was anything."""
    moved, self.waits = False, {}
    if not self.ended and self._begin == self._end:
      self._begin = self._end = 0
      while self._end < _CHUNK and not self.ended:  # a TLS record has 16 kB
        count = self._try(self._source, select.POLLIN, self._read)
        if count is None:
          break
        self._end += count
        self.ended = count == 0
        moved = True
    if self._begin < self._end:
      count = self._try(self._target, select.POLLOUT, self._write)
      self._begin += count or 0
      moved = moved or bool(count)
    return moved

  def is_over(self) -> bool:
    """Whether the source has ended and all of it is written."""
    return self.ended and self._begin == self._end

  def _read(self) -> int:
    return self._source.recv_into(self._buffer[self._end :])

  def _write(self) -> int:
    return self._target.send(self._buffer[self._begin : self._end])

  def _try(self, file: Any, event: int, function: Callable[[], int]) -> int | None:
    """Calls a function that reads or writes; None where it would have to wait for `file`."""
    try:
      return function()
    except ssl.SSLWantReadError:
      event = select.POLLIN
    except ssl.SSLWantWriteError:
      event = select.POLLOUT
    except BlockingIOError:
      pass
    self.waits[file] = self.waits.get(file, 0) | event
    return None


def relay(one: socket.socket, other: socket.socket) -> None:
  """Passes bytes on in both directions until either side ends. Raises OSError."""
  for file in (one, other):
    file.setblocking(False)
  flows = _Flow(one, other), _Flow(other, one)
  poll = select.poll()
  for file in (one, other):
    poll.register(file, 0)
  while True:
    moved = [flow.move() for flow in flows]
    if any(flow.is_over() for flow in flows):
      return
    if not any(moved):
      for file in (one, other):
        poll.modify(file, flows[0].waits.get(file, 0) | flows[1].waits.get(file, 0))
      poll.poll()


def _prepare(connection: socket.socket) -> None:
  """Sets the options of a connection over the network."""
  connection.settimeout(LIMITS.seconds)
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  for name, value in _KEEPALIVE.items():
    if hasattr(socket, name):  # not on every system
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _allow_many_descriptors() -> None:
  """Raises this process's limit of open files as far as it may: each connection takes two."""
  hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
