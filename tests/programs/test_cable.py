"""A network that is cut: a worker on another host goes on when it is back. `make test-cable` (some
minutes, root): KIP_TEST_CABLE gives the seconds of the cut."""

import contextlib
import os
import shutil
import subprocess
import sys
import time

import pytest
from launching import SMALL, assert_as_in_one_process, command, started, status, step, wait

SECONDS = float(os.environ.get('KIP_TEST_CABLE', '0'))
pytestmark = pytest.mark.skipif(
  not SECONDS or os.geteuid() != 0 or not shutil.which('ip'),
  reason='takes minutes: make test-cable, as root, with iproute2',
)
COORDINATOR, WORKER = '10.77.0.1', '10.77.0.2'


def _ip(*arguments):
  subprocess.run(['ip', *arguments], check=True)


@pytest.fixture
def hosts():
  """Two network namespaces with a cable between them, instead of two hosts."""
  names = [f'kip{i}-{os.getpid()}' for i in range(2)]
  with contextlib.ExitStack() as stack:
    for name in names:
      _ip('netns', 'add', name)
      stack.callback(_ip, 'netns', 'delete', name)
    cable = ('link', 'add', 'cable', 'netns', names[0], 'type', 'veth')
    _ip(*cable, 'peer', 'name', 'cable', 'netns', names[1])
    for name, address in zip(names, (COORDINATOR, WORKER), strict=True):
      _ip('-n', name, 'address', 'add', f'{address}/24', 'dev', 'cable')
      for device in ('lo', 'cable'):
        _ip('-n', name, 'link', 'set', device, 'up')
    yield names


def test_a_cable_that_is_cut(tmp_path, npz, make_run, cache, hosts):
  workdir, num_steps = tmp_path / 'run', 3000
  here, there = (('ip', 'netns', 'exec', name) for name in hosts)
  coordinator = command(
    workdir,
    *SMALL,
    f'--host={COORDINATOR}',
    f'--config.run.num_steps={num_steps}',
    program=('launch.py', '--role=coordinator'),
    npz=npz,
    cache=cache,
  )
  worker = (sys.executable, 'launch.py', '--role=worker', '--name=there')
  evaluator = (sys.executable, 'launch.py', '--role=evaluator', f'--workdir={workdir}')
  with contextlib.ExitStack() as stack:

    def start(name, *arguments):
      return stack.enter_context(started(arguments, tmp_path / name))

    processes = [start('coordinator', *here, *coordinator), start('evaluator', *here, *evaluator)]
    wait(lambda: (workdir / 'address').exists())
    address = (workdir / 'address').read_text().strip()
    far = (f'--coordinator={address}', f'--secret={workdir}/secret')
    processes.append(start('worker', *there, *worker, *far))
    wait(lambda: step(workdir) >= 10)
    _ip('-n', hosts[0], 'link', 'set', 'cable', 'down')  # the worker's side finds no way, or waits
    time.sleep(SECONDS / 2)
    reached = status(workdir)['step']
    time.sleep(SECONDS / 2)
    assert status(workdir)['step'] == reached < num_steps
    _ip('-n', hosts[0], 'link', 'set', 'cable', 'up')
    begin = time.monotonic()
    wait(lambda: step(workdir) > reached + 1, 300)
    print(f'It went on {time.monotonic() - begin:.0f} s after a cut of {SECONDS:.0f} s.')
    assert [process.wait(300) for process in processes] == [0, 0, 0], (
      tmp_path / 'worker'
    ).read_text() + (tmp_path / 'coordinator').read_text()
  assert status(workdir)['generation'] == 1
  assert_as_in_one_process(workdir, make_run, num_steps)
