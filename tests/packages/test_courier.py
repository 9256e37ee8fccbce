"""packages/courier beside Launchpad's Courier: what a node's functions and their callers see."""

import builtins
import concurrent.futures
import contextlib
import datetime
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from benchmarks import couriers
from transport import unix_socket

pytest.importorskip('msgpack')
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ours = couriers.load(couriers.OURS)
ARRAYS = [
  np.arange(6, dtype=np.float32).reshape(2, 3),
  np.zeros((0, 3), np.float64),
  np.array(3, np.int64),
  np.array([True, False]),
  np.arange(7, dtype=np.uint8)[::2],
  np.asfortranarray(np.arange(6.0).reshape(2, 3)),
  np.array([1 + 2j], np.complex64),
  np.array([0.1], np.float16),
]


class Node:
  """Functions of every kind; `gate` lets `wait` go on."""

  def __init__(self):
    self.gate, self.waiting = threading.Event(), threading.Semaphore(0)

  def echo(self, value):
    return value

  def count(self, data):
    return len(data)

  def both(self, a, b=2):
    return [a, b]

  def array(self, i):
    return ARRAYS[i]

  def number(self):
    return np.float32(1.5)

  def wait(self, seconds):
    self.waiting.release()
    return self.gate.wait(seconds)

  def fail(self, kind):
    raise getattr(builtins, kind)('two\nlines, é')

  def leave(self):
    sys.exit(3)

  def make_lock(self):
    return threading.Lock()

  def _private(self):
    return 'secret'

  def __call__(self, value):
    return value + 1


@pytest.fixture(params=couriers.names())
def name(request):
  return request.param


@pytest.fixture
def path():
  folder = unix_socket.new_folder()
  yield os.path.join(folder, 'courier')
  shutil.rmtree(folder)


@pytest.fixture
def served(name, path):
  """A node, a function that makes clients of it, and the exception that their calls raise."""
  node, module = Node(), couriers.load(name)

  def client(**options):
    return module.Client(f'unix:{path}', **{'call_timeout': 20, 'wait_for_ready': False, **options})

  with couriers.serving(name, node, path):
    yield node, client
    node.gate.set()


def failure(call, *args, **kwargs):
  """The code and the message of a call that fails."""
  with pytest.raises(Exception) as caught:
    call(*args, **kwargs)
  assert type(caught.value).__name__ == 'StatusNotOk', caught.value
  error: Any = caught.value
  return str(error.code), str(error)


@pytest.mark.parametrize(
  'value',
  [None, True, False, 0, -1, 2**63 - 1, -(2**63), 1.5, float('inf'), 5e-324, 'é\0', '', b'\x00\xff']
  + [b'', [], [1, [2, b'x']], (), (1, (2, [3])), {}, {'a': [1, None]}, {1: 'x', None: (2,)}]
  + [{'life': ('run', 3), 'tasks': [((1, 'targets', 0, 250), 7, [0, 1])], 'inputs': [b'a', b'b']}],
  ids=repr,
)
def test_values_come_back_as_they_were(served, value):
  result = served[1]().echo(value)
  assert result == value and repr(result) == repr(value)


@pytest.mark.parametrize('length', [2**16 - 9, 2**16 + 1, 3 * 2**20 + 1])
def test_long_bytes_come_back_as_they_were(served, length):
  client = served[1]()
  data = os.urandom(1000) * (length // 1000) + bytes(length % 1000)
  assert client.echo(data) == data
  assert client.echo(b'short') == b'short'  # the connection is used again


@pytest.mark.parametrize('i', range(len(ARRAYS)))
def test_arrays_come_back_as_they_were(served, i):
  array = served[1]().array(i)
  assert (array.dtype, array.shape, array.tobytes()) == (
    ARRAYS[i].dtype,
    ARRAYS[i].shape,
    ARRAYS[i].tobytes(),
  )
  assert array.flags.c_contiguous


def test_numbers_of_numpy_keep_their_type(served):
  number = served[1]().number()
  assert type(number) is np.float32 and number == 1.5


def test_arguments_by_position_and_by_name(served):
  client = served[1]()
  assert client.both(1) == [1, 2]
  assert client.both(1, b=3) == client.both(b=3, a=1) == client.both(1, 3) == [1, 3]
  assert client(4) == 5


def test_public_functions_are_listed(served):
  client = served[1]()
  module = sys.modules[type(client).__module__.partition('.')[0]]
  assert sorted(module.list_methods(client)) == [
    *('__call__', 'array', 'both', 'count', 'echo', 'fail', 'leave', 'make_lock', 'number', 'wait')
  ]


@pytest.mark.parametrize('method', ['nothing', '_private', 'gate'])
def test_what_is_no_public_function_is_not_found(served, method):
  call = getattr(served[1](), method)
  assert failure(call) == ('StatusCode.NOT_FOUND', f'method {method} not found')


@pytest.mark.parametrize(
  'kind, code',
  [
    ('ValueError', 'INVALID_ARGUMENT'),
    ('TypeError', 'INVALID_ARGUMENT'),
    ('IndexError', 'NOT_FOUND'),
    ('MemoryError', 'RESOURCE_EXHAUSTED'),
    ('NotImplementedError', 'UNIMPLEMENTED'),
    ('TimeoutError', 'UNKNOWN'),
    ('ConnectionError', 'UNKNOWN'),
  ],
)
def test_what_a_function_raises_is_told(served, kind, code):
  found, message = failure(served[1]().fail, kind)
  assert found == f'StatusCode.{code}'
  assert message.startswith('Python exception was raised on the server:\nTraceback (most recent')
  assert message.endswith(f'{kind}: two\nlines, é\n')
  assert ', in fail\n' in message and ', in _answer' not in message


def test_wrong_arguments_are_told(served):
  code, message = failure(served[1]().both)
  assert code == 'StatusCode.INVALID_ARGUMENT'
  assert message == (
    'Python exception was raised on the server:\n'
    "TypeError: Node.both() missing 1 required positional argument: 'a'\n"
  )


def test_what_cannot_be_sent_raises(served):
  client = served[1]()
  with pytest.raises(TypeError):
    client.echo(threading.Lock())
  with pytest.raises(OverflowError):
    client.echo(2**64)
  assert failure(client.make_lock)[0] == 'StatusCode.INVALID_ARGUMENT'
  assert client.echo(1) == 1


def test_calls_do_not_wait_for_each_other(served):
  node, make = served
  client = make()
  waiting = [client.futures.wait(20) for _ in range(40)]  # far more than a pool's threads
  for _ in waiting:
    assert node.waiting.acquire(timeout=20)
  assert client.echo(1) == 1
  node.gate.set()
  assert [future.result(20) for future in waiting] == [True] * 40


def test_futures_have_results_and_errors(served):
  client = served[1]()
  assert client.futures.both(1, b=3).result(20) == [1, 3]
  assert client.futures(4).result(20) == 5
  assert failure(client.futures.nothing().result, 20)[0] == 'StatusCode.NOT_FOUND'
  waiting = client.futures.wait(20)
  assert waiting.cancel()
  with pytest.raises(concurrent.futures.CancelledError):
    waiting.result()


@pytest.mark.parametrize('timeout', [0.2, datetime.timedelta(seconds=0.2)])
def test_a_call_ends_at_its_timeout(served, timeout):
  client = served[1](call_timeout=timeout)
  late = 'StatusCode.DEADLINE_EXCEEDED', 'Deadline Exceeded'
  assert failure(client.wait, 20) == failure(client.futures.wait(20).result, 20) == late
  assert client.echo(1) == 1


def test_clients_can_be_sent_to_processes(served):
  client = pickle.loads(pickle.dumps(served[1]()))
  assert client.echo(1) == 1
  assert client.address == served[1]().address


def test_without_a_server_a_call_fails_at_once_or_waits(name, path):
  module = couriers.load(name)
  fails = module.Client(f'unix:{path}', call_timeout=20, wait_for_ready=False)
  assert failure(fails.echo, 1)[0] == 'StatusCode.UNAVAILABLE'
  late = module.Client(f'unix:{path}', call_timeout=0.3)
  assert failure(late.echo, 1)[0] == 'StatusCode.DEADLINE_EXCEEDED'
  patient = module.Client(f'unix:{path}', call_timeout=20)
  waiting = patient.futures.echo(1)
  with couriers.serving(name, Node(), path):
    assert waiting.result(20) == 1


def test_a_client_finds_the_next_server(name, path):
  client = couriers.load(name).Client(f'unix:{path}', call_timeout=20, wait_for_ready=False)
  for _ in range(2):
    with couriers.serving(name, Node(), path):
      end = time.monotonic() + 20
      while not unix_socket.answers(path, 1) and time.monotonic() < end:
        time.sleep(0.01)
      assert call_until_reached(client) == 1
    assert failure(client.echo, 1)[0] == 'StatusCode.UNAVAILABLE'


def call_until_reached(client):
  """Calls as nodes do: gRPC takes a while to notice a server that is back."""
  end = time.monotonic() + 20
  while True:
    try:
      return client.echo(1)
    except Exception as error:
      if type(error).__name__ != 'StatusNotOk' or time.monotonic() > end:
        raise
      time.sleep(0.05)


def test_stopping_waits_for_calls(name, path):
  node = Node()
  with couriers.serving(name, node, path):
    client = couriers.load(name).Client(f'unix:{path}', call_timeout=20)
    waiting = client.futures.wait(20)
    assert node.waiting.acquire(timeout=20)
    threading.Timer(0.2, node.gate.set).start()
  assert waiting.result(20) is True


# Ours alone.


@pytest.fixture
def server(path):
  server = ours.Server(path=path)
  server.Bind('echo', lambda value: value)
  server.Start()
  yield server
  server.Stop()


def test_a_server_that_exits_in_a_function_answers(server):
  server.Bind('leave', Node().leave)
  client = ours.Client(server.address, call_timeout=20)
  assert failure(client.leave)[1].endswith('SystemExit: 3\n')
  assert client.echo(1) == 1


def test_functions_come_and_go(server):
  client = ours.Client(server.address, call_timeout=20)
  server.Bind('rebind', lambda: 1)
  assert client.rebind() == 1
  server.Bind('rebind', lambda: 2)
  assert client.rebind() == 2
  server.Unbind('rebind')
  assert failure(client.rebind)[1] == 'method rebind not found'


def test_the_life_of_a_server(path):
  server = ours.Server(path=path)
  assert (server.address, server.port, server.has_started) == (f'unix:{path}', None, False)
  for method, message in (('Join', 'not started'), ('Stop', 'not started yet')):
    with pytest.raises(ValueError, match=message):
      getattr(server, method)()
  server.Start()
  assert server.has_started
  with pytest.raises(ValueError, match='already started'):
    server.Start()
  server.Stop()
  server.Stop()
  server.Join()
  for arguments in ({}, {'port': 1, 'path': path}):
    with pytest.raises(ValueError, match='needs a port or a path'):
      ours.Server(**arguments)
  with pytest.raises(OSError):
    ours.Server(path=os.path.join(path, 'no', 'such', 'folder')).Start()


def test_a_port_is_open_to_this_machine_alone():
  with socket.create_server(('localhost', 0)) as probe:
    port = probe.getsockname()[1]
  server = ours.Server(port=port)
  server.Bind('echo', lambda value: value)
  server.Start()
  assert server.address == f'localhost:{port}'
  assert ours.Client(server.address, call_timeout=20).echo([1]) == [1]
  with socket.socket() as same:  # would fail if the server had taken all addresses
    same.bind(('127.0.0.2', port))
  server.Stop()


def test_a_socket_is_its_users_alone_and_takes_the_place_of_another(path):
  with socket.socket(socket.AF_UNIX) as left:
    left.bind(path)
  server = ours.Server(path=path)
  server.Start()
  assert os.stat(path).st_mode & 0o777 == 0o600
  assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
  server.Stop()


@pytest.mark.parametrize('address', ['nowhere', 'unix:', 'localhost:x'])
def test_addresses_that_are_none(address):
  client = ours.Client(address, call_timeout=20, wait_for_ready=False)
  assert failure(client.echo, 1)[0] == 'StatusCode.UNAVAILABLE'


@pytest.mark.parametrize(
  'sent',
  [
    b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n',  # a gRPC client
    (2**30 + 1).to_bytes(8, 'little'),
    (5).to_bytes(8, 'little') + b'\xc1' * 5,  # no msgpack
    (1).to_bytes(8, 'little') + b'\x01',  # no call
    (3).to_bytes(8, 'little') + b'\x01',  # cut off
  ],
  ids=['grpc', 'too long', 'no msgpack', 'no call', 'cut off'],
)
def test_strange_bytes_do_no_harm(server, path, sent):
  with socket.socket(socket.AF_UNIX) as stranger:
    stranger.settimeout(20)
    stranger.connect(path)
    stranger.sendall(sent)
    stranger.shutdown(socket.SHUT_WR)
    with contextlib.suppress(ConnectionResetError):
      while stranger.recv(1000):
        pass
  assert ours.Client(server.address, call_timeout=20).echo(1) == 1


@pytest.mark.parametrize('greeting', [b'', b'\x08\0\0\0\0\0\0\0courier0', b'SSH-2.0-OpenSSH_9\r\n'])
def test_a_client_knows_its_servers(path, greeting):
  with socket.socket(socket.AF_UNIX) as other:
    other.bind(path)
    other.listen()

    def answer():
      connected, _ = other.accept()
      with connected:
        connected.sendall(greeting)

    threading.Thread(target=answer, daemon=True).start()
    client = ours.Client(f'unix:{path}', call_timeout=20, wait_for_ready=False)
    assert failure(client.echo, 1)[0] in ('StatusCode.UNAVAILABLE', 'StatusCode.RESOURCE_EXHAUSTED')


def test_messages_that_are_too_long_are_refused(server, monkeypatch):
  client = ours.Client(server.address, call_timeout=20)
  server.Bind('make', bytes)
  monkeypatch.setattr(sys.modules[f'{ours.__name__}.wire'], 'LONGEST', 1000)
  assert failure(client.echo, bytes(1000))[0] == 'StatusCode.RESOURCE_EXHAUSTED'
  assert failure(client.make, 1000)[0] == 'StatusCode.RESOURCE_EXHAUSTED'
  assert client.make(900) == bytes(900)


@pytest.mark.parametrize(
  'value', [object(), {1, 2}, np.array(['x']), np.array([object()]), np.datetime64(0, 's'), 2**64]
)
def test_other_types_cannot_be_packed(value):
  with pytest.raises((TypeError, OverflowError)):
    sys.modules[f'{ours.__name__}.messages'].pack([value])


def extension(kind, header, data=b''):
  import msgpack

  packer = msgpack.Packer()
  packed = packer.pack(header)
  return packer.pack(msgpack.ExtType(kind, bytes([len(packed)]) + packed + data))


@pytest.mark.parametrize(
  'data',
  [
    extension(2, ['<f4', [2]], b'1234567'),
    extension(2, ['<f4', [-1]], b''),
    extension(2, ['<f4', [2**62, 4]], b''),
    extension(2, ['|O', [1]], b'12345678'),
    extension(2, ['<f4,<f4', [1]], b'12345678'),
    extension(2, ['no type', [1]], b'1'),
    extension(2, 3, b''),
    extension(2, ['<f4', 'x'], b'1234'),
    extension(9, []),
    b'\xc7\x00\x02',
    b'\x91',
    b'',
    b'\x01\x01',
    b'\x81\x90\x01',
    b'\x91' * 5000,
  ],
)
def test_damaged_messages_raise_value_error(data):
  with pytest.raises(ValueError):
    sys.modules[f'{ours.__name__}.messages'].unpack(data)


def test_launchpad_runs_a_program_over_it(tmp_path):
  """Launchpad's own nodes and handles, in a process where the module `courier` is ours."""
  pytest.importorskip('launchpad')
  program = tmp_path / 'program.py'
  program.write_text("""
import courier, launchpad as lp
assert hasattr(courier, 'StatusCode')

class Server:
  def double(self, x):
    return 2 * x

class Caller:
  def __init__(self, server):
    self._server = server
  def run(self):
    print('result', self._server.double(21), flush=True)
    lp.stop()

def main(argv):
  program = lp.Program('p')
  server = program.add_node(lp.CourierNode(Server), label='server')
  program.add_node(lp.CourierNode(Caller, server), label='caller')
  lp.launch(program, launch_type='local_mt').wait()

from absl import app
app.run(main)
""")
  done = subprocess.run(
    [sys.executable, program],
    env={**os.environ, 'PYTHONPATH': os.path.join(ROOT, 'packages')},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert 'result 42' in done.stdout, done.stderr
