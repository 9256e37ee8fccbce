"""Courier on a unix socket: it serves there, for this user alone, and nowhere else."""

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile

import numpy as np
import psutil
import pytest

from transport import unix_socket

courier = pytest.importorskip('courier')


class Node:
  def add(self, a, b):
    return a + b

  def array(self):
    return np.arange(7, dtype=np.float32)

  def fail(self):
    raise ValueError('no such thing')


@pytest.fixture
def path():
  folder = unix_socket.new_folder()
  yield os.path.join(folder, 'courier')
  shutil.rmtree(folder)


def _client(path):
  return courier.Client(unix_socket.SCHEME + path, call_timeout=10, wait_for_ready=False)


def _ports():
  connections = psutil.Process().net_connections('tcp')
  return {it.laddr.port for it in connections if it.status == psutil.CONN_LISTEN}


def test_it_serves_on_the_socket_and_nowhere_else(path):
  here, before = os.getcwd(), _ports()
  with unix_socket.serving(Node(), path):
    assert _client(path).add(2, 3) == 5
    assert _client(path).array().tolist() == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(Exception, match='no such thing'):
      _client(path).fail()
    assert _ports() == before and os.getcwd() == here
    assert os.listdir(os.path.dirname(path)) == ['courier']
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
  assert not unix_socket.answers(path, 1)


def test_a_socket_that_a_killed_server_has_left_is_replaced(path):
  with socket.socket(socket.AF_UNIX) as left:
    left.bind(path)
  os.mkdir(f'{path}.new')  # killed while it started
  with unix_socket.serving(Node(), path):
    assert _client(path).add(2, 3) == 5


def test_another_user_cannot_connect(path):
  if os.geteuid() != 0:
    pytest.skip('only root can become another user')
  program = f"""
import os, socket
os.setgroups([]); os.setgid(65534); os.setuid(65534)
socket.socket(socket.AF_UNIX).connect({path!r})
"""
  with unix_socket.serving(Node(), path):
    done = subprocess.run(
      [sys.executable, '-c', program], capture_output=True, text=True, check=False
    )
  assert 'PermissionError' in done.stderr


def test_another_courier_is_not_started(path, tmp_path, monkeypatch):
  """One whose bytes differ, though it has the same constant."""
  from courier.python import server

  changed = tmp_path / 'server.so'
  with open(str(server.__file__), 'rb') as file:
    changed.write_bytes(file.read() + b'\0')
  monkeypatch.setattr(server, '__file__', str(changed))
  with (
    pytest.raises(unix_socket.CannotListen, match='is not the Courier of dm-launchpad 0.5.2'),
    unix_socket.serving(Node(), path),
  ):
    pytest.fail('it serves')
  assert not os.path.exists(path)


def test_a_port_that_is_open_afterwards_stops_it(path, monkeypatch):
  opened = []
  start = courier.Server.Start

  def start_on_the_network_too(self):
    opened.append(socket.create_server(('', 0)))
    start(self)

  monkeypatch.setattr(courier.Server, 'Start', start_on_the_network_too)
  with (
    pytest.raises(unix_socket.CannotListen, match=r'has opened the TCP port \[\d+\]'),
    unix_socket.serving(Node(), path),
  ):
    pytest.fail('it serves')
  assert not os.path.exists(path)
  opened[0].close()


def test_folders_are_short_enough_for_a_socket(tmp_path, monkeypatch):
  long = tmp_path / ('x' * 90)
  long.mkdir()
  monkeypatch.setattr(tempfile, 'tempdir', str(long))
  folder = unix_socket.new_folder()
  with socket.socket(socket.AF_UNIX) as it:
    it.bind(os.path.join(folder, 'coordinator'))
  shutil.rmtree(folder)
  assert os.listdir(long) == []
