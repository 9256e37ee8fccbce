"""The output of a launch on a terminal and elsewhere."""

import os
import pty
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROGRAM = """
import os, sys, time
from artifacts import run_directory
from programs import terminal
directory = run_directory.RunDirectory(sys.argv[1])
with terminal.show_output(directory):
  time.sleep(0.8)
  workers = {'a': {'alive': True}, 'b': {'alive': True}, 'c': {'alive': False}}
  directory.write_status('running', step=30, num_steps=120, train_loss=0.25, seconds_to_go=61.2,
                         kernel_pairs_per_second=5000.0, workers=workers)
  directory.append_metrics({'step': 10, 'krr_test_accuracy': 0.5})
  print("from here")
  sys.stdout.flush()
  os.system("echo '\\033[1;36mfrom a child\\033[0;0m'")
  os.system("echo '[coordinator/0] 10:00:00 step 30/120: loss 0.2'")
  waiting = 'Waiting for workers to stop for 9s.'
  os.system(f"printf '[a/0] {waiting}\\r\\033[34m{waiting}\\033[0m\\n[b/0] {waiting}\\rend\\n\\n'")
  time.sleep(1.2)
  if sys.argv[2:]:
    os._exit(130)
print('after')
"""


def _on_terminal(*arguments):
  master, slave = pty.openpty()
  process = subprocess.Popen(
    [sys.executable, '-c', PROGRAM, *arguments],
    cwd=ROOT,
    stdin=slave,
    stdout=slave,
    stderr=slave,
    env={**os.environ, 'TERM': 'xterm', 'COLUMNS': '80'},
  )
  os.close(slave)
  output = b''
  while True:
    try:
      data = os.read(master, 65536)
    except OSError:
      data = b''
    if not data:
      break
    output += data
  os.close(master)
  return process.wait(30), output.decode()


def test_a_bar_below_the_lines(tmp_path):
  code, output = _on_terminal(str(tmp_path))
  assert code == 0
  for expected in (
    'starting',
    'step 30/120',
    '0:01:01 to go',
    'loss 0.25000',
    'test 50.00 % at step 10',
    '5e+03 pairs/s',
    'workers: 2',
  ):
    assert expected in output
  assert (
    output.index('starting')
    < output.index('from here')
    < output.index('from a child')
    < output.rindex('after')
  )
  assert 'step 30/120: loss' not in output  # the bar says so
  assert output.rindex('\x1b[?25h') > output.rindex('\x1b[?25l')  # the cursor is back


def test_the_cursor_is_there_whoever_ends_it(tmp_path):
  code, output = _on_terminal(str(tmp_path), 'by force')
  assert code == 130 and 'workers: 2' in output
  assert output.rindex('\x1b[?25h') > output.rindex('\x1b[?25l')


def test_nobody_waits_for_a_reader_that_is_gone(tmp_path):
  program = PROGRAM.replace('time.sleep(1.2)', 'os.system("seq 100000"); os._exit(0)')
  process = subprocess.Popen(
    [sys.executable, '-c', program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
  )
  assert process.stdout
  assert process.stdout.readline() == b'from here\n'
  process.stdout.close()
  assert process.wait(60) == 0


@pytest.mark.parametrize('stderr', [subprocess.STDOUT, subprocess.PIPE])
def test_plain_lines_elsewhere(tmp_path, stderr):
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, str(tmp_path)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=stderr,
    text=True,
    timeout=60,
    check=True,
  )
  assert done.stdout.splitlines() == [
    'from here',
    'from a child',
    '[coordinator/0] 10:00:00 step 30/120: loss 0.2',
    '[b/0] end',
    '',
    'after',
  ]
  assert done.stdout.endswith('after\n')
  assert not done.stderr
