"""Courier on a unix socket. No TCP port is opened: Courier executes what it is sent, so nobody but
the user may reach it.

The server of Launchpad's Courier knows ports only: it listens at the constant '[::]:' and a number.
In this process that constant is made 'unix:', of the same length, by which gRPC takes the number as
the name of a socket in the current folder. packages/courier, which is in its place where Launchpad
has no wheel, can be told a path.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import mmap
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

import psutil

# The server of dm-launchpad 0.5.2 for CPython 3.10; the constant stands there once.
_SHA256 = '35f32978e09c054b64ffac114bddd1cf78524e3834c3cd1a6867fb8f432be0c1'
_TCP, _UNIX = b'[::]:', b'unix:'
_PROT_READ, _PROT_WRITE, _PROT_EXEC = 1, 2, 4
_LONGEST = 100  # bytes of a socket's path; the system allows 107
SCHEME = 'unix:'  # of an address


class CannotListen(RuntimeError):
  """Courier cannot be told to listen on a unix socket."""


def new_folder() -> str:
  """Makes a folder for sockets, which only this user can enter.

  It is short enough for a socket's path, wherever the user keeps temporary files.
  """
  folder = tempfile.mkdtemp(prefix='kip-')
  if len(os.fsencode(folder)) + len('/courier.new/1') > _LONGEST:
    shutil.rmtree(folder)
    folder = tempfile.mkdtemp(prefix='kip-', dir='/tmp')
  return folder


@contextlib.contextmanager
def serving(instance: Any, path: str) -> Iterator[None]:
  """Serves the public methods of an object inside.

  Args:
    instance: whose methods become RPCs.
    path: of the socket, in a folder that only this user can enter; a socket there is replaced.

  Raises:
    CannotListen: see `check`; or Courier has opened a TCP port.
  """
  from launchpad.nodes.courier import courier_utils  # here: it takes half a second

  if _takes_paths():
    with running(courier_utils.make_courier_server(instance, path=path)):
      yield
    return
  check()
  server, before = courier_utils.make_courier_server(instance, port=1), _listening()
  # Under another name until it listens: clients see the old socket or the new one.
  folder = f'{path}.new'
  shutil.rmtree(folder, ignore_errors=True)
  os.mkdir(folder, 0o700)
  with _working_in(folder):
    server.Start()
  try:
    if opened := _listening() - before:
      raise CannotListen(f'Courier has opened the TCP port {sorted(opened)}; it was stopped.')
    os.replace(os.path.join(folder, '1'), path)
    os.rmdir(folder)
    yield
  finally:
    server.Stop()
    server.Join()


@contextlib.contextmanager
def running(server: Any) -> Iterator[None]:
  """Starts a `courier.Server` that knows its path, and stops it in the end."""
  server.Start()
  try:
    yield
  finally:
    server.Stop()
    server.Join()


def answers(path: str, seconds: float) -> bool:
  """Tells whether a Courier server is at the other end of a unix socket, be it behind a relay."""
  with socket.socket(socket.AF_UNIX) as probe:
    probe.settimeout(seconds)
    try:
      probe.connect(path)
      return bool(probe.recv(1))  # such a server speaks first
    except OSError:
      return False


def check() -> None:
  """Makes Courier's servers listen on unix sockets, in this process.

  Raises CannotListen if this Courier is not the one that is known, or this system forbids it.
  """
  if _takes_paths():
    return
  from courier.python import server

  file = os.path.realpath(str(server.__file__))
  with open(file, 'rb') as stream:
    content = stream.read()
  if hashlib.sha256(content).hexdigest() != _SHA256:
    raise CannotListen(
      f'{file} is not the Courier of dm-launchpad 0.5.2, so it is not known how to keep it off the '
      'network. Install the pinned packages: remove .venv, then `make setup`.'
    )
  address = _address_in_memory(file, content.index(_TCP))
  now = ctypes.string_at(address, len(_TCP))
  if now == _UNIX:
    return
  page = address - address % mmap.PAGESIZE
  size = address + len(_TCP) - page
  protect = ctypes.CDLL(None, use_errno=True).mprotect
  protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
  read = _PROT_READ | _PROT_EXEC  # as the linker has mapped it
  if now == _TCP and protect(page, size, read | _PROT_WRITE) == 0:
    ctypes.memmove(address, _UNIX, len(_UNIX))
    protect(page, size, read)
  if ctypes.string_at(address, len(_TCP)) != _UNIX:
    reason = os.strerror(ctypes.get_errno())
    raise CannotListen(
      f'this system does not let Courier be told to listen on a unix socket ({reason}): '
      'python -m programs.local runs on this machine without Courier.'
    )


def _takes_paths() -> bool:
  """Whether packages/courier is installed, not Launchpad's Courier."""
  return importlib.util.find_spec('courier.python') is None


def _address_in_memory(file: str, offset: int) -> int:
  """Where a byte of a loaded library is in this process. Raises CannotListen."""
  with open('/proc/self/maps', encoding='utf-8') as maps:
    for line in maps:
      span, _, start, _, _, *path = line.split(maxsplit=5)
      begin, end = (int(number, 16) for number in span.split('-'))
      place = begin + offset - int(start, 16)
      if path and path[0].rstrip('\n') == file and begin <= place < end:
        return place
  raise CannotListen(f'{file} is not in the memory of this process.')


def _listening() -> set[int]:
  """TCP ports at which this process listens."""
  connections = psutil.Process().net_connections('tcp')
  return {it.laddr.port for it in connections if it.status == psutil.CONN_LISTEN}


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
  before = os.getcwd()
  os.chdir(folder)
  try:
    yield
  finally:
    os.chdir(before)
