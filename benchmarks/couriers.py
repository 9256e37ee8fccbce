"""Compares Launchpad's Courier with packages/courier: over a unix socket, as on one host, and with
TLS between two such sockets, as between hosts.

    python -m benchmarks.couriers

Of each that is there, in turns: calls a second, and MB/s of large arguments and of large results.
One thread of one client calls; the server is a process of its own, and so is each end of the relay,
whose CPU time for a byte is that of the large ones. The best of the rounds counts.
"""

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import courier
import psutil

from artifacts import hardware
from transport import relay, secret, unix_socket

OURS, THEIRS = 'packages/courier', "Launchpad's Courier"
SMALL, LARGE = 100, 2**22  # bytes
_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), OURS)
_TIMEOUT = 60.0  # seconds of a call


class Row(NamedTuple):
  """Calls a second, MB/s, and the CPU time of each end of the relay, ns a byte (0 without)."""

  calls: float
  arguments: float
  results: float
  relay: float


class Node:
  """What is called."""

  def echo(self, data: bytes) -> bytes:
    return data

  def length(self, data: bytes) -> int:
    return len(data)

  def make(self, length: int) -> bytes:
    return bytes(length)


def names() -> list[str]:
  """The Couriers that are there."""
  theirs = [THEIRS] if importlib.util.find_spec('courier.python') else []
  return [*theirs, OURS]


def load(name: str) -> ModuleType:
  """The module of a Courier. Ours has another name, so that there can be both in a process."""
  if name == THEIRS:
    return courier
  alias = 'packages_courier'
  if alias not in sys.modules:
    init = os.path.join(_FOLDER, '__init__.py')
    spec = importlib.util.spec_from_file_location(alias, init, submodule_search_locations=[_FOLDER])
    assert spec and spec.loader
    sys.modules[alias] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[alias])
  return sys.modules[alias]


@contextlib.contextmanager
def serving(name: str, instance: Any, path: str) -> Iterator[None]:
  """Serves the public methods of an object by a Courier, at a unix socket, inside."""
  if name == THEIRS:
    with unix_socket.serving(instance, path):
      yield
    return
  server = load(name).Server(path=path)
  for method in dir(instance):
    function = getattr(instance, method)
    if callable(function) and (not method.startswith('_') or method == '__call__'):
      server.Bind(method, function)
  with unix_socket.running(server):
    yield


def measure(name: str, seconds: float, tls: bool) -> Row:
  """Measures a Courier for about `seconds`, by way of the relay if `tls`."""
  with contextlib.ExitStack() as stack:
    folder = unix_socket.new_folder()
    stack.callback(shutil.rmtree, folder)
    path, far = os.path.join(folder, 'courier'), os.path.join(folder, 'far')
    stack.enter_context(_process(_serve, name, path))
    relays = []
    if tls:
      secret.make(os.path.join(folder, 'secret'))
      near, port = stack.enter_context(_process(_listen, folder, path))
      relays = [near, stack.enter_context(_process(_dial, folder, port, far))[0]]
    client = load(name).Client(f'unix:{far if tls else path}', call_timeout=_TIMEOUT)
    small, large = bytes(SMALL), bytes(LARGE)
    assert client.echo(small) == small and client.echo(large) == large
    calls = _rate(lambda: client.echo(small), seconds / 3)
    before = sum(map(_cpu, relays))
    arguments = _rate(lambda: client.length(large), seconds / 3) * LARGE
    results = _rate(lambda: client.make(LARGE), seconds / 3) * LARGE
    cpu = sum(map(_cpu, relays)) - before
    moved = 2 * (arguments + results) * seconds / 3  # by both ends
    return Row(calls, arguments / 1e6, results / 1e6, 1e9 * cpu / moved)


def _cpu(process: Any) -> float:
  times = psutil.Process(process.pid).cpu_times()
  return times.user + times.system


@contextlib.contextmanager
def _process(work: Callable[..., None], *arguments: Any) -> Iterator[tuple[Any, Any]]:
  """A process that works inside; with what it says when it is ready."""
  spawn = multiprocessing.get_context('spawn')
  ready, over = spawn.Queue(), spawn.Event()
  process = spawn.Process(target=work, args=(*arguments, ready, over), daemon=True)
  process.start()
  try:
    yield process, ready.get(timeout=_TIMEOUT)
  finally:
    over.set()
    process.join()


def _listen(folder: str, path: str, ready: Any, over: Any) -> None:
  key = secret.Secret(os.path.join(folder, 'secret'))
  ready.put(relay.Listener(key, 0, path).port)
  over.wait()


def _dial(folder: str, port: int, path: str, ready: Any, over: Any) -> None:
  key = secret.Secret(os.path.join(folder, 'secret'))
  relay.Dialer(key, lambda: f'localhost:{port}', path)
  ready.put(None)
  over.wait()


def _serve(name: str, path: str, ready: Any, over: Any) -> None:
  with serving(name, Node(), path):
    ready.put(None)
    over.wait()


def _rate(call: Callable[[], object], seconds: float) -> float:
  """Calls a second."""
  count, start = 0, time.perf_counter()
  while time.perf_counter() < start + seconds:
    call()
    count += 1
  return count / (time.perf_counter() - start)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--seconds', type=float, default=3.0, help='of each round of each')
  arguments = parser.parse_args()
  rows: dict[tuple[str, bool], list[Row]] = {
    (name, tls): [] for name in names() for tls in (False, True)
  }
  for _ in range(arguments.rounds):
    for (name, tls), measured in rows.items():
      measured.append(measure(name, arguments.seconds, tls))
  print(f'{hardware.cpu_model()}; Python {sys.version.split()[0]}')
  print(f'{"":28}{f"{SMALL} B: calls/s":>18}{"4 MiB in: MB/s":>18}{"4 MiB out: MB/s":>18}', end='')
  print(f'{"relay: ns a byte":>18}')
  for (name, tls), measured in rows.items():
    calls, large_in, large_out, relays = zip(*measured, strict=True)
    print(f'{name + ", TLS" * tls:28}{max(calls):18.0f}{max(large_in):18.0f}', end='')
    print(f'{max(large_out):18.0f}{min(relays):18.2f}')


if __name__ == '__main__':
  main()
