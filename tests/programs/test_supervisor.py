"""The parent that keeps a node alive, on children that take a moment instead of a node."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
NODE = """
import os, signal, sys, threading, time
from programs import supervisor
policy = supervisor.Policy(
  max_useless=3, max_in_vain=8, first_pause=0.01, longest_pause=0.01, notice=1.0)
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
if not supervisor.is_child():
  assert 'jax' not in sys.modules and 'launchpad' not in sys.modules
  sys.exit(supervisor.supervise('node', stop, policy))
with open(sys.argv[1], 'a') as file:
  life = file.tell()
  file.write('.')
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
"""


class Node:
  """A supervisor whose child counts its life, then does some work."""

  def __init__(self, folder: pathlib.Path, work: str, **environment: str):
    self._lives = folder / 'lives'
    (folder / 'node.py').write_text(NODE + work)
    self.process = subprocess.Popen(
      [sys.executable, str(folder / 'node.py'), str(self._lives)],
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, 'PYTHONPATH': ROOT, **environment},
    )

  def lives(self) -> int:
    return self._lives.stat().st_size if self._lives.exists() else 0

  def child(self) -> psutil.Process:
    _wait(self.lives)
    return psutil.Process(self.process.pid).children()[0]

  def end(self) -> tuple[int, int, str]:
    """Waits for the supervisor; returns its exit status, the child's lives and the log."""
    _, log = self.process.communicate(timeout=60)
    return self.process.returncode, self.lives(), log


@pytest.fixture
def node(tmp_path):
  """A function (work of the child, **environment) -> Node."""
  started = []

  def start(work, **environment):
    started.append(Node(tmp_path, work, **environment))
    return started[-1]

  yield start
  for node in started:
    node.process.kill()


def _wait(condition):
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)


def test_it_is_started_again_until_it_ends_by_itself(node):
  status, lives, log = node('supervisor.progressed()\nif life < 5: die()\n').end()
  assert (status, lives) == (0, 6)
  assert log.count('node was killed by SIGKILL; it is started again in 0.0 s') == 5


def test_an_error_of_its_own_is_final(node):
  status, lives, _ = node('raise ValueError("bad news")\n').end()
  assert (status, lives) == (1, 1)


@pytest.mark.parametrize(
  'work, lives, reason',
  [
    ('die()', 3, '3 times without making progress'),
    ('if life == 1: supervisor.progressed()\ndie()', 5, '3 times without making progress'),
    ('if life == 1: supervisor.progressed(False)\ndie()', 5, '3 times without making progress'),
    ('supervisor.progressed(False)\ndie()', 8, '8 times without a checkpoint'),
    (
      'supervisor.progressed(life == 3)\nsupervisor.progressed(False)\ndie()',
      12,
      '8 times without a checkpoint',
    ),
    (
      'supervisor.progressed(False)\nif life == 3: supervisor.progressed()\ndie()',
      12,
      '8 times without a checkpoint',
    ),
  ],
  ids=[
    'none',
    'a life that lasts',
    'a life that does not last',
    'never any that lasts',
    'once',
    'first one, then the other',
  ],
)
def test_lives_without_progress_are_limited(node, work, lives, reason):
  *ended, log = node(work + '\n').end()
  assert ended == [1, lives]
  assert f'exited {reason}; giving up' in log


def test_progress_that_is_lost_again_and_again_is_remarked_on_before_it_is_the_end(node):
  _, lives, log = node('supervisor.progressed(False)\ndie()\n').end()
  assert lives == 8 and [
    f'ended {n} times in a row without a checkpoint' in log for n in range(1, 9)
  ] == [False, False, True, True, True, True, True, False]
  assert 'After 8 times it is given up.' in log


@pytest.mark.parametrize('obeys', [True, False])
def test_it_stops_when_asked_and_is_killed_if_it_does_not(node, obeys):
  parent = node(f'while {obeys} and not stop.is_set() or not {obeys}: time.sleep(0.05)\n')
  child = parent.child()
  parent.process.send_signal(signal.SIGTERM)
  assert parent.end()[1] == 1 and not child.is_running()


def test_it_dies_with_its_parent(node):
  parent = node('time.sleep(600)\n')
  child = parent.child()
  parent.process.kill()
  psutil.wait_procs([child], timeout=20)
  assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_it_ends_with_its_launcher(node):
  launcher = subprocess.Popen(['sleep', '600'])
  parent = node('while not stop.is_set(): time.sleep(0.05)\n', KIP_LAUNCHER=str(launcher.pid))
  parent.child()
  launcher.kill()
  launcher.wait()
  assert parent.end()[:2] == (0, 1)
