"""Runs that are stopped, killed and resumed: real processes, real terminals, real signals."""

import os
import pty
import re
import select
import signal
import subprocess
import threading
import time

import psutil
import pytest
from launching import (
  IN_ONE_PROCESS,
  LOCAL_MP,
  ROOT,
  SMALL,
  assert_as_in_one_process,
  change_num_steps,
  command,
  listening,
  run,
  started,
  status,
  step,
  wait,
)

from programs import supervisor

ENDLESS = '--config.run.num_steps=100000'


class Terminal:
  """A process on a terminal of its own, and what it writes there; it does not outlive the
  context."""

  def __init__(self, command):
    self.output = b''
    self._terminal, slave = pty.openpty()
    self.process = subprocess.Popen(
      # Not by Python, which would fork this process with all its threads.
      ['env', '--default-signal=HUP', 'setsid', '--ctty', *command],
      cwd=ROOT,
      stdin=slave,
      stdout=slave,
      stderr=slave,
      env={**os.environ, 'TERM': 'xterm', 'COLUMNS': '200'},
    )
    os.close(slave)
    self._is_closing = False
    self._reader = threading.Thread(target=self._read)
    self._reader.start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self.process.poll() is None:
      os.killpg(self.process.pid, signal.SIGKILL)
    self._reader.join(10)  # it ends with the last writer
    self.close()

  def press_ctrl_c(self):
    os.write(self._terminal, b'\x03')

  def close(self):
    """Ends the terminal: its processes get SIGHUP."""
    if not self._is_closing:
      self._is_closing = True
      self._reader.join()
      os.close(self._terminal)

  def _read(self):
    while not self._is_closing:
      if select.select([self._terminal], [], [], 0.05)[0]:
        try:
          self.output += os.read(self._terminal, 65536)
        except OSError:  # its last writer is gone
          break


def _assert_stopped(workdir, process, everyone, output):
  """The run has ended with a checkpoint of its last step, and no process is left."""
  assert process.returncode == 75, output
  assert not psutil.wait_procs(everyone, timeout=20)[1]
  stopped = status(workdir)
  assert stopped['state'] == 'stopped' and 3 <= stopped['step'] < 100000
  assert max(os.listdir(workdir / 'checkpoints')) == f'{stopped["step"]:08d}'


def _descendants(process):
  return psutil.Process(process.pid).children(recursive=True)


def test_ctrl_c_stops_with_a_checkpoint_and_the_same_command_resumes(
  tmp_path, npz, make_run, cache
):
  """With one worker more the second time. No process listens on the network meanwhile."""
  workdir, flags = tmp_path / 'run', SMALL
  with Terminal(command(workdir, *flags, ENDLESS, npz=npz, cache=cache)) as terminal:
    wait(lambda: step(workdir) >= 3)
    everyone = _descendants(terminal.process)
    assert len(everyone) >= 4
    assert not any(listening(process) for process in (terminal.process, *everyone))
    length = len(terminal.output)
    terminal.press_ctrl_c()  # all processes on the terminal get SIGINT
    terminal.process.wait(60)
  _assert_stopped(workdir, terminal.process, everyone, terminal.output.decode())
  stopped = status(workdir)['step']
  output = re.sub(r'\x1b\[[\d;?]*[A-Za-z]|\^C', '', terminal.output[length:].decode())
  lines = [line.strip() for line in re.split(r'[\r\n]+', output)]
  bar = re.compile(r'|loss .* workers: \d|step \d+/.* to go|stopped|starting|running')
  lines = [line for line in lines if not bar.fullmatch(line)]
  assert lines[0] == 'Stopping with a checkpoint; Ctrl-C again ends at once.'
  assert lines[-2] == f'Stopped at step {stopped} of 100000. To go on from there:'
  assert lines[-1].startswith('python') and lines[-1].endswith(f'cache_dir={cache}')
  assert len(lines) <= 4 and 'checkpointed.' in lines[-3], '\n'.join(lines)

  num_steps = stopped + 3
  change_num_steps(workdir, num_steps)
  flags += (f'--config.run.num_steps={num_steps}', '--config.system.num_workers=3')
  done = run(command(workdir, *flags, npz=npz, cache=cache))
  assert done.returncode == 0, done.stdout + done.stderr
  assert_as_in_one_process(workdir, make_run, num_steps)


@pytest.mark.parametrize('program', [LOCAL_MP, IN_ONE_PROCESS])
def test_a_closed_terminal_stops_it_with_a_checkpoint(tmp_path, npz, cache, program):
  workdir = tmp_path / 'run'
  arguments = command(workdir, *SMALL, ENDLESS, program=program, npz=npz, cache=cache)
  with Terminal(arguments) as terminal:
    wait(lambda: step(workdir) >= 3)
    everyone = _descendants(terminal.process)
    terminal.close()
    terminal.process.wait(60)
  _assert_stopped(workdir, terminal.process, everyone, terminal.output.decode())


def test_a_run_that_ignores_the_end_of_its_terminal_goes_on(tmp_path, npz, cache):
  workdir = tmp_path / 'run'
  arguments = command(workdir, *SMALL, ENDLESS, program=IN_ONE_PROCESS, npz=npz, cache=cache)
  with started(['nohup', *arguments], tmp_path / 'log') as process:
    wait(lambda: step(workdir) >= 1)
    process.send_signal(signal.SIGHUP)
    before = step(workdir)
    wait(lambda: step(workdir) >= before + 3)
    process.terminate()
    assert process.wait(60) == 75


def _node(launcher, node):
  """Process id of the child that does a node's work; None while there is none."""
  for process in _descendants(launcher):
    try:
      parent, grandparent = process.parents()[:2]
      is_child = process.environ().get(supervisor.PARENT) == str(parent.pid)
      if is_child and f'{node}/0' in grandparent.cmdline():
        return process.pid
    except (psutil.Error, ValueError):  # it has just ended
      continue
  return None


def test_killed_nodes_come_back_and_the_launcher_takes_all_with_it(tmp_path, npz, make_run, cache):
  """Worker and evaluator killed, then the coordinator; then the launcher; then Ctrl-C twice. The
  run goes on each time, to the same bits."""
  workdir, log = tmp_path / 'run', tmp_path / 'log'
  flags = (*SMALL, '--config.system.checkpoint_seconds=0.5')
  endless = command(workdir, *flags, ENDLESS, npz=npz, cache=cache)
  with started(endless, log) as launcher:
    wait(lambda: step(workdir) >= 3)
    for generation, nodes in ((1, ('kernel_worker_0', 'evaluator')), (2, ('coordinator',))):
      _kill_and_await(launcher, nodes, workdir, generation)
    everyone = _descendants(launcher)
    launcher.kill()
    assert not psutil.wait_procs(everyone, timeout=30)[1]
    assert status(workdir)['state'] == 'stopped'
  assert 'kernel_worker_0 was killed by SIGKILL; it is started again' in log.read_text()

  with started(endless, log) as launcher:
    wait(lambda: step(workdir, 3) >= 3)
    everyone = _descendants(launcher)
    os.killpg(launcher.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.wait(20)
    assert not psutil.wait_procs(everyone, timeout=20)[1]

  num_steps = status(workdir)['step'] + 20
  change_num_steps(workdir, num_steps)
  done = run(command(workdir, *flags, f'--config.run.num_steps={num_steps}', npz=npz, cache=cache))
  assert done.returncode == 0, done.stdout + done.stderr
  assert_as_in_one_process(workdir, make_run, num_steps)


def _kill_and_await(launcher, nodes, workdir, generation):
  """Kills the processes of nodes, and waits until others have taken their places and the run goes
  on, with the coordinator in its life `generation`."""
  reached = max(step(workdir, generation), 3)
  killed = {node: _node(launcher, node) for node in nodes}
  for pid in killed.values():
    assert pid
    os.kill(pid, signal.SIGKILL)
  wait(lambda: all(_node(launcher, node) not in (None, pid) for node, pid in killed.items()))
  wait(lambda: step(workdir, generation) > reached)
