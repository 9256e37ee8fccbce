"""The parent that keeps a node alive, on children that take a moment instead of a node."""

import os
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
supervisor._FIRST_PAUSE = supervisor._LONGEST_PAUSE = 0.01
supervisor._MAX_USELESS, supervisor._MAX_IN_VAIN, supervisor.NOTICE = 3, 8, 1.0
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
if not supervisor.is_child():
  assert 'jax' not in sys.modules and 'launchpad' not in sys.modules
  sys.exit(supervisor.supervise('node', stop))
with open(sys.argv[1], 'a') as file:
  life = file.tell()
  file.write('.')
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def node(tmp_path):
  """A function (what a child does after counting its life, **environment) -> the parent's Popen;
  its `lives()` so far."""
  started = []

  def start(work, **environment):
    (tmp_path / 'node.py').write_text(NODE + work)
    process = subprocess.Popen(
      [sys.executable, str(tmp_path / 'node.py'), str(tmp_path / 'lives')],
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, 'PYTHONPATH': ROOT, **environment},
    )
    process.lives = lambda: (
      (tmp_path / 'lives').stat().st_size if (tmp_path / 'lives').exists() else 0
    )
    started.append(process)
    return process

  yield start
  for process in started:
    process.kill()


def _wait(condition):
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)


def test_it_is_started_again_until_it_ends_by_itself(node):
  process = node('supervisor.progressed()\nif life < 5: die()\n')
  assert process.wait(60) == 0 and process.lives() == 6
  assert (
    process.stderr.read().count('node was killed by SIGKILL; it is started again in 0.0 s') == 5
  )


def test_it_is_started_afresh_if_it_asks(node):
  process = node('sys.exit(supervisor.RESTART_STATUS if life < 2 else 0)\n')
  assert process.wait(60) == 0 and process.lives() == 3


def test_an_error_of_its_own_is_final(node):
  process = node('raise ValueError("bad news")\n')
  assert process.wait(60) == 1 and process.lives() == 1


@pytest.mark.parametrize(
  'work, lives, said',
  [
    ('die()', 3, 3),
    ('if life == 1: supervisor.progressed()\ndie()', 5, 3),
    ('if life == 1: supervisor.progressed(lasting=False)\ndie()', 5, 3),
    ('supervisor.progressed(lasting=False)\ndie()', 8, 8),
    ('supervisor.progressed(life == 3)\nsupervisor.progressed(False)\ndie()', 12, 8),
    ('supervisor.progressed(False)\nif life == 3: supervisor.progressed()\ndie()', 12, 8),
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
def test_lives_without_progress_are_limited(node, work, lives, said):
  process = node(work + '\n')
  assert process.wait(60) == 1 and process.lives() == lives
  assert f'exited {said} times without making progress; giving up' in process.stderr.read()


@pytest.mark.parametrize('obeys', [True, False])
def test_it_stops_when_asked_and_is_killed_if_it_does_not(node, obeys):
  process = node(f'while {obeys} and not stop.is_set() or not {obeys}: time.sleep(0.05)\n')
  _wait(process.lives)
  child = psutil.Process(process.pid).children()[0]
  process.send_signal(signal.SIGTERM)
  process.wait(60)
  assert not child.is_running() and process.lives() == 1


def test_it_dies_with_its_parent(node):
  process = node('time.sleep(600)\n')
  _wait(process.lives)
  child = psutil.Process(process.pid).children()[0]
  process.kill()
  psutil.wait_procs([child], timeout=20)
  assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_it_ends_with_its_launcher(node):
  launcher = subprocess.Popen(['sleep', '600'])
  process = node('while not stop.is_set(): time.sleep(0.05)\n', KIP_LAUNCHER=str(launcher.pid))
  _wait(process.lives)
  launcher.kill()
  launcher.wait()
  assert process.wait(60) == 0 and process.lives() == 1
