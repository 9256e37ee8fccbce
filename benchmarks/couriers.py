"""Compares Launchpad's Courier with packages/courier, over a unix socket.

    python -m benchmarks.couriers

Of each that is there, in turns: calls a second, and MB/s of large arguments and of large results.
One thread of one client calls; the server is a process of its own. The best of the rounds counts.
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

from artifacts import hardware
from transport import unix_socket

OURS, THEIRS = 'packages/courier', "Launchpad's Courier"
SMALL, LARGE = 100, 2**22  # bytes
_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), OURS)
_TIMEOUT = 60.0  # seconds of a call


class Row(NamedTuple):
  """What a Courier does: calls a second, and MB/s."""

  calls: float
  arguments: float
  results: float


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
  server.Start()
  try:
    yield
  finally:
    server.Stop()
    server.Join()


def measure(name: str, seconds: float) -> Row:
  """Measures a Courier for about `seconds`."""
  folder = unix_socket.new_folder()
  path = os.path.join(folder, 'courier')
  spawn = multiprocessing.get_context('spawn')
  there, over = spawn.Event(), spawn.Event()
  server = spawn.Process(target=_serve, args=(name, path, there, over), daemon=True)
  server.start()
  try:
    if not there.wait(_TIMEOUT):
      raise RuntimeError('the server has not started; see above.')
    client = load(name).Client(f'unix:{path}', call_timeout=_TIMEOUT)
    small, large = bytes(SMALL), bytes(LARGE)
    assert client.echo(small) == small and client.echo(large) == large
    return Row(
      _rate(lambda: client.echo(small), seconds / 3),
      _rate(lambda: client.length(large), seconds / 3) * LARGE / 1e6,
      _rate(lambda: client.make(LARGE), seconds / 3) * LARGE / 1e6,
    )
  finally:
    over.set()
    server.join()
    shutil.rmtree(folder)


def _serve(name: str, path: str, there: Any, over: Any) -> None:
  with serving(name, Node(), path):
    there.set()
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
  rows: dict[str, list[Row]] = {name: [] for name in names()}
  for _ in range(arguments.rounds):
    for name, measured in rows.items():
      measured.append(measure(name, arguments.seconds))
  print(f'{hardware.cpu_model()}; Python {sys.version.split()[0]}')
  print(f'{"":20} {f"{SMALL} B: calls/s":>18} {"4 MiB in: MB/s":>18} {"4 MiB out: MB/s":>18}')
  for name, measured in rows.items():
    print(f'{name:20}', *(f'{max(column):18.0f}' for column in zip(*measured)))


if __name__ == '__main__':
  main()
