"""A private network for a local run: Courier executes what anybody sends it, so no other host may
reach its port.

Imports nothing but the standard library: it must run while the process has one thread.
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys

_MARK = 'KIP_PRIVATE_NETWORK'
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def restart_isolated() -> None:
  """Starts this very command again, once, to run in a private network.

  Call it when everything that needs the real network is done.
  """
  if _MARK not in os.environ:
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, {**os.environ, _MARK: 'wanted'})


def enter_if_restarted() -> None:
  """Enters a private network if `restart_isolated` has started this process.

  Call it first of all, before there are threads. Without permission everything stays as it is.
  """
  if os.environ.get(_MARK) == 'wanted':
    os.environ[_MARK] = 'entered' if _enter() else 'refused'


def is_isolated() -> bool:
  """Tells whether this process has a private network."""
  return os.environ.get(_MARK) == 'entered'


def _enter() -> bool:
  """Moves this process to a new network with a loopback interface; returns whether it may."""
  unshare = ctypes.CDLL(None, use_errno=True).unshare
  uid, gid = os.geteuid(), os.getegid()
  if unshare(_CLONE_NEWNET) != 0:
    # Root may do so as it is, and keeps its rights to files; others need a user namespace.
    if unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
      return False
    maps = {'setgroups': 'deny', 'uid_map': f'{uid} {uid} 1', 'gid_map': f'{gid} {gid} 1'}
    try:
      for name, content in maps.items():
        with open(f'/proc/self/{name}', 'w', encoding='ascii') as file:
          file.write(content)
    except OSError:
      return False
  try:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
      request = struct.pack('16sh14x', b'lo', 0)
      flags = struct.unpack('16sh14x', fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
      fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack('16sh14x', b'lo', flags | _IFF_UP))
  except OSError as error:
    sys.exit(
      f'error: the loopback interface of a private network cannot be brought up ({error.strerror}).'
    )
  return True
