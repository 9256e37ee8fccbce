"""The relay between hosts: bytes arrive whole, and only from those who have the run's key."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from transport import relay, secret, unix_socket

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Coordinator:
  """A server on a unix socket that greets, then returns what it gets in capitals."""

  def __init__(self, path):
    self.path, self.connections = path, 0
    self._socket = socket.socket(socket.AF_UNIX)
    self._socket.bind(path)
    self._socket.listen(100)
    threading.Thread(target=self._accept, daemon=True).start()

  def stop(self):
    self._socket.shutdown(socket.SHUT_RDWR)
    self._socket.close()
    os.unlink(self.path)

  def _accept(self):
    with contextlib.suppress(OSError):
      while True:
        connection, _ = self._socket.accept()
        self.connections += 1
        threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

  def _serve(self, connection):
    with connection, contextlib.suppress(OSError):
      connection.sendall(b'hello ')
      while data := connection.recv(65536):
        connection.sendall(data.upper())


@pytest.fixture
def folder():
  path = unix_socket.new_folder()
  yield path
  shutil.rmtree(path)


def _key(folder, name='secret'):
  path = os.path.join(folder, name)
  secret.make(path)
  return secret.Secret(path)


@pytest.fixture
def coordinator(folder):
  coordinator = Coordinator(os.path.join(folder, 'coordinator'))
  yield coordinator
  with contextlib.suppress(OSError):
    coordinator.stop()


@pytest.fixture
def listener(folder, coordinator):
  listener = relay.Listener(_key(folder), 0, coordinator.path, relay.Limits(seconds=1, pending=8))
  yield listener
  listener.close()


def _dialed(folder, listener, key='secret'):
  """A connection through a dialer."""
  path = os.path.join(folder, f'dialer-{time.monotonic_ns()}')
  relay.Dialer(_key(folder, key), lambda: f'localhost:{listener.port}', path)
  return _connected(path)


def _connected(path):
  connection = socket.socket(socket.AF_UNIX)
  connection.settimeout(10)
  connection.connect(path)
  return connection


def _exactly(connection, size):
  data = b''
  while len(data) < size:
    more = connection.recv(size - len(data))
    assert more
    data += more
  return data


@pytest.mark.parametrize('size', [1, 16383, 16385, 262144, 262145, 3_000_017])
def test_bytes_arrive_as_they_were_sent(folder, listener, size):
  data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
  with _dialed(folder, listener) as connection:
    assert _exactly(connection, 6) == b'hello '
    threading.Thread(target=connection.sendall, args=(data,)).start()
    assert _exactly(connection, size) == data.upper()


def test_an_end_is_passed_on(folder, listener, coordinator):
  with _dialed(folder, listener) as connection:
    assert _exactly(connection, 6) == b'hello '
    coordinator.stop()
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(1) == b''


def test_a_coordinator_may_go_and_come_back(folder, listener, coordinator):
  path = os.path.join(folder, 'dialer')
  relay.Dialer(_key(folder), lambda: f'localhost:{listener.port}', path)
  assert unix_socket.answers(path, 5)
  coordinator.stop()
  assert not unix_socket.answers(path, 5)
  again = Coordinator(coordinator.path)
  assert unix_socket.answers(path, 5)
  again.stop()


def test_the_address_is_looked_up_for_each_connection(folder, listener):
  path, places = os.path.join(folder, 'dialer'), [None, 'localhost:1', f'localhost:{listener.port}']
  relay.Dialer(_key(folder), lambda: places.pop(0), path)
  assert [unix_socket.answers(path, 5) for _ in range(3)] == [False, False, True]


def _tls(context, listener):
  """What a peer reads that connects by itself; raises OSError where the handshake fails."""
  with (
    socket.create_connection(('localhost', listener.port), 5) as connection,
    context.wrap_socket(connection) as tls,
  ):
    tls.sendall(b'let me in')
    return tls.recv(6)


def _without_certificate(folder):
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
  context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
  return context


def _foreign(folder):
  context = _without_certificate(folder)
  _key(folder, 'foreign')
  context.load_cert_chain(os.path.join(folder, 'foreign'))
  return context


def _old_protocol(folder):
  context = _without_certificate(folder)
  context.load_cert_chain(os.path.join(folder, 'secret'))
  context.maximum_version = ssl.TLSVersion.TLSv1_2
  return context


@pytest.mark.parametrize('peer', [_without_certificate, _foreign, _old_protocol])
def test_peers_without_the_key_are_refused(folder, listener, coordinator, peer):
  with pytest.raises(OSError):
    _tls(peer(folder), listener)
  assert coordinator.connections == 0


def test_the_key_lets_in(folder, listener, coordinator):
  assert _tls(secret.Secret(os.path.join(folder, 'secret')).client_context(), listener) == b'hello '
  assert coordinator.connections == 1


def test_a_dialer_sends_nothing_to_a_process_with_another_key(folder, coordinator, caplog):
  impostor = relay.Listener(_key(folder, 'foreign'), 0, coordinator.path)
  dialer = relay.Dialer(
    _key(folder), lambda: f'localhost:{impostor.port}', os.path.join(folder, 'dialer')
  )
  with pytest.raises(relay.AnotherKey, match=f'localhost:{impostor.port} does not have this run'):
    dialer.connect()
  assert not unix_socket.answers(os.path.join(folder, 'dialer'), 5)
  assert coordinator.connections == 0
  impostor.close()


class Canary:
  """Leaves a folder behind where it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def test_what_a_courier_client_sends_is_never_unpickled(folder, tmp_path):
  """Neither through the port, nor for a peer with a foreign key."""
  courier = pytest.importorskip('courier')

  class Node:
    def take(self, value):
      del value

  path = os.path.join(folder, 'courier')
  with unix_socket.serving(Node(), path):
    listener = relay.Listener(_key(folder), 0, path)
    foreign = os.path.join(folder, 'foreign-dialer')
    relay.Dialer(_key(folder, 'foreign'), lambda: f'localhost:{listener.port}', foreign)
    for address in (f'localhost:{listener.port}', f'unix:{foreign}'):
      client = courier.Client(address, call_timeout=5, wait_for_ready=False)
      with pytest.raises(Exception, match='(?i)connect|unavailable|closed|socket|handshake|reset'):
        client.take(Canary(str(tmp_path / 'canary')))
    assert not (tmp_path / 'canary').exists()
    courier.Client(f'unix:{path}', call_timeout=5).take(Canary(str(tmp_path / 'canary')))
    assert (tmp_path / 'canary').exists()  # what is kept out
    listener.close()


def test_silent_peers_do_not_keep_others_out(folder, listener):
  """Far more than may be pending; each is closed in the end."""
  silent = [socket.create_connection(('localhost', listener.port)) for _ in range(200)]
  with _dialed(folder, listener) as connection:
    assert _exactly(connection, 6) == b'hello '
  for peer in silent:
    with peer:
      peer.settimeout(10)
      with contextlib.suppress(ConnectionResetError):
        assert peer.recv(1) == b''


def test_a_handshake_byte_by_byte_ends_in_time(listener):
  with socket.create_connection(('localhost', listener.port)) as peer:
    begin = time.monotonic()
    with pytest.raises(OSError):
      for byte in b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc' * 100:
        peer.sendall(bytes([byte]))
        time.sleep(0.05)
    assert time.monotonic() - begin < 20  # 45 s of bytes


def test_it_survives_running_out_of_descriptors(folder):
  """In a process of its own, which may have few of them."""
  program = f"""
import resource, socket, sys, time
sys.path.insert(0, {ROOT!r})
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
from transport import relay, secret, unix_socket
key = secret.Secret({folder + '/secret'!r})
listener = relay.Listener(key, 0, {folder + '/coordinator'!r})
print(listener.port, flush=True)
time.sleep(60)
"""
  _key(folder)
  coordinator = Coordinator(os.path.join(folder, 'coordinator'))
  with subprocess.Popen([sys.executable, '-c', program], stdout=subprocess.PIPE) as process:
    assert process.stdout is not None
    port = int(process.stdout.readline())
    silent = [socket.create_connection(('localhost', port)) for _ in range(100)]
    path = os.path.join(folder, 'dialer')
    relay.Dialer(_key(folder), lambda: f'localhost:{port}', path)
    assert any(unix_socket.answers(path, 5) for _ in range(20))
    for peer in silent:
      peer.close()
    process.kill()
  coordinator.stop()


def test_a_port_that_is_taken(folder):
  with socket.create_server(('', 0)) as taken, pytest.raises(OSError, match='already in use'):
    relay.Listener(_key(folder), taken.getsockname()[1], os.path.join(folder, 'coordinator'))
