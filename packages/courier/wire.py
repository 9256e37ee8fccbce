"""Addresses, and messages over a socket: 8 bytes of length, then the content.

A server sends GREETING first, so that a client knows whom it has reached, be it behind a relay.
"""

import contextlib
import socket
import struct
import time

GREETING = b'courier1'
LONGEST = 2**30  # bytes of a message
_LENGTH = struct.Struct('<Q')
_SHORT = 2**16  # bytes that are copied to be sent at once
_KEPT = 2**23  # bytes of a buffer that is kept for the next message
_SENT_AT_ONCE = 2**22  # bytes that may be on their way; the kernel may allow less
_UNIX = 'unix:'


class TooLong(ValueError):
  """A message is longer than LONGEST."""


def address_of(path: str) -> str:
  """The address of a Unix socket."""
  return _UNIX + path


def connect(address: str, deadline: float | None) -> 'Connection':
  """Connects to a server at 'unix:PATH' or 'HOST:PORT'. Raises OSError (TimeoutError at `deadline`,
  by time.monotonic)."""
  left = None if deadline is None else deadline - time.monotonic()
  if left is not None and left <= 0:
    raise TimeoutError
  connection = Connection(_connected(address, left))
  try:
    if connection.receive(deadline) != GREETING:
      raise ConnectionError('no server answers')
  except BaseException:
    connection.close()
    raise
  return connection


def _connected(address: str, timeout: float | None) -> socket.socket:
  if address.startswith(_UNIX):
    connected = socket.socket(socket.AF_UNIX)
    try:
      connected.settimeout(timeout)
      connected.connect(address.removeprefix(_UNIX))
    except BaseException:
      connected.close()
      raise
    return connected
  host, _, port = address.rpartition(':')
  if not port.isdecimal():
    raise OSError('an address is unix:PATH or HOST:PORT')
  return socket.create_connection((host.strip('[]'), int(port)), timeout)


class Connection:
  """Sends and receives messages over a socket, one at a time."""

  def __init__(self, connected: socket.socket):
    self._socket, self._buffer = connected, bytearray()
    if connected.family == socket.AF_UNIX:
      connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SENT_AT_ONCE)
    else:
      connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def send(self, message: bytes, deadline: float | None = None) -> None:
    """Sends a message. Raises OSError (TimeoutError at `deadline`, by time.monotonic) and
    TooLong."""
    if len(message) > LONGEST:
      raise TooLong(f'a message of {len(message)} bytes; at most {LONGEST} can be sent')
    self._limit(deadline)
    length = _LENGTH.pack(len(message))
    if len(message) > _SHORT:
      self._socket.sendall(length)
      self._socket.sendall(message)
    else:
      self._socket.sendall(length + message)

  def receive(self, deadline: float | None = None) -> memoryview | None:
    """Receives a message, to be read before the next one is; None at the connection's end.

    Raises OSError, TimeoutError at `deadline`, and TooLong.
    """
    header = memoryview(bytearray(_LENGTH.size))
    if not self._fill(header, deadline, may_end=True):
      return None
    [length] = _LENGTH.unpack(header)
    if length > LONGEST:
      raise TooLong(f'a message of {length} bytes; at most {LONGEST} are received')
    if not length <= len(self._buffer) <= _KEPT:
      self._buffer = bytearray(length)
    message = memoryview(self._buffer)[:length]
    self._fill(message, deadline)
    return message

  def has_ended(self) -> bool:
    """Whether the other side has closed the connection, on which no answer is due."""
    self._socket.settimeout(0)
    try:
      self._socket.recv(1)
    except BlockingIOError:
      return False
    except OSError:
      pass
    return True

  def end_input(self) -> None:
    """Makes `receive`, also one that is waiting, find the connection's end."""
    with contextlib.suppress(OSError):
      self._socket.shutdown(socket.SHUT_RD)

  def close(self) -> None:
    """Closes the connection, also while another thread waits for it."""
    with contextlib.suppress(OSError):
      self._socket.shutdown(socket.SHUT_RDWR)
    self._socket.close()

  def _fill(self, view: memoryview, deadline: float | None, may_end: bool = False) -> bool:
    filled = 0
    while filled < len(view):
      self._limit(deadline)
      count = self._socket.recv_into(view[filled:])
      if not count and may_end and not filled:
        return False
      if not count:
        raise ConnectionError('the connection was closed in the middle of a message')
      filled += count
    return True

  def _limit(self, deadline: float | None) -> None:
    """Makes the socket's next operation raise TimeoutError at `deadline`."""
    if deadline is None:
      self._socket.settimeout(None)
      return
    left = deadline - time.monotonic()
    if left <= 0:
      raise TimeoutError
    self._socket.settimeout(left)
