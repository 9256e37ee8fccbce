"""launch.py as a user runs it: real processes, real RPCs, exit status and files."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import psutil
import pytest

from programs import distill, local

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _command(workdir, *flags, config='configs/base.py', program=('launch.py',), cache=None):
  command = [sys.executable, *program, f'--config={config}', f'--workdir={workdir}', *flags]
  return command + ([f'--config.system.cache_dir={cache}'] if cache else [])


def _run(command, timeout=400, env=None):
  return subprocess.run(
    command,
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=timeout,
    env={**os.environ, **(env or {})},
    check=False,
  )


def _json(workdir, name):
  with open(os.path.join(workdir, name), encoding='utf-8') as file:
    return json.load(file)


def _rows(workdir):
  with open(os.path.join(workdir, 'metrics.jsonl'), encoding='utf-8') as file:
    return {row['step']: row for row in map(json.loads, file)}


def _free_port():
  with socket.socket() as probe:
    probe.bind(('', 0))
    return probe.getsockname()[1]


def _assert_not_reachable(pid, port):
  """From here, outside the run's network, nobody listens on its port."""
  if os.readlink(f'/proc/{pid}/ns/net') == os.readlink('/proc/self/ns/net'):
    pytest.fail('the run has no network of its own') if _may_unshare() else None
    return
  with pytest.raises(ConnectionRefusedError):
    socket.create_connection(('localhost', port), timeout=5).close()


def _may_unshare():
  return (
    subprocess.run(
      ['unshare', '--user', '--net', 'true'], capture_output=True, check=False
    ).returncode
    == 0
  )


SMALL = (
  '--config.run.architecture=fc1',
  '--config.run.images_per_class=2',
  '--config.run.targets_per_step=33',
  '--config.run.plan.support_tile=4',
  '--config.run.plan.target_tile=5',
  '--config.run.plan.target_tiles_per_task=2',
  '--config.system.evaluation.nn_steps=0',
  '--lp_launch_type=local_mp',
)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_the_demo_beats_its_real_images_by_ten_points(tmp_path, cache, seed):
  """The whole of `make demo`, computed by worker processes alone (shorter, and without the finite
  network, for all seeds but the first)."""
  flags = [f'--config.run.seed={seed}', '--lp_launch_type=local_mp']
  if seed:
    flags += ['--config.run.num_steps=60', '--config.system.evaluation.nn_steps=0']
  done = _run(_command(tmp_path, *flags, config='configs/digits.py', cache=cache))
  assert done.returncode == 0, done.stdout + done.stderr
  status, rows = _json(tmp_path, 'status.json'), _rows(tmp_path)
  assert status['state'] == 'finished' and status['step'] == status['num_steps']
  first, last = rows[0], rows[status['num_steps']]
  assert last['krr_test_accuracy'] >= first['krr_test_accuracy'] + 0.1
  if not seed:
    assert last['nn_test_accuracy'] > 0.3  # ten classes: chance is 0.1
  assert {
    'step',
    'krr_test_accuracy',
    'krr_test_mse',
    'train_loss',
    'train_accuracy',
    'wall_seconds',
    'kernel_pairs_per_second',
  } <= set(last)
  assert last['train_loss'] < first['train_loss']

  assert set(status['workers']) == {'kernel_worker_0', 'kernel_worker_1'}
  assert all(counts['pairs'] > 0 for counts in status['workers'].values())
  run = _json(tmp_path, 'config.json')['run']
  pairs_a_step = 10 * run.targets_per_step + 100
  assert sum(counts['pairs'] for counts in status['workers'].values()) == status['pairs']
  assert status['pairs'] == (run.num_steps + 1) * pairs_a_step + run.num_steps * 100

  with np.load(tmp_path / 'distilled.npz', allow_pickle=False) as file:
    assert file['images'].shape == (10, 8, 8, 1) and file['images'].dtype == np.float32
    assert file['labels'].shape == (10, 10) and file['labels'].dtype == np.float32
    assert json.loads(str(file['settings']))['run']['seed'] == seed
  for name in ('distilled.npz', 'metrics.jsonl', 'images.png'):
    assert str(tmp_path / name) in done.stdout
  assert (tmp_path / 'images.png').read_bytes().startswith(b'\x89PNG')
  assert f'{100 * first["krr_test_accuracy"]:.2f} % with the real images' in done.stdout


def test_ctrl_c_checkpoints_and_the_same_command_goes_on_to_the_same_bits(
  tmp_path, npz, make_run, cache
):
  port = _free_port()
  command = _command(
    tmp_path / 'mp',
    *SMALL,
    f'--config.system.port={port}',
    f'--config.run.data.name={npz}',
    '--config.run.num_steps=2000',
    '--config.system.log_seconds=0.1',
    '--config.system.snapshot_steps=0,1',
    cache=cache,
  )
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )
  try:
    end = time.monotonic() + 120
    while time.monotonic() < end and (
      not (tmp_path / 'mp' / 'status.json').exists()
      or _json(tmp_path / 'mp', 'status.json')['step'] < 3
    ):
      time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 4
    _assert_not_reachable(process.pid, port)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
  assert process.returncode == 75, output
  status = _json(tmp_path / 'mp', 'status.json')
  assert status['state'] == 'stopped' and 3 <= status['step'] < 2000
  assert f'Stopped at step {status["step"]} of 2000' in output
  assert not [child for child in psutil.wait_procs(children, timeout=15)[1]]

  num_steps = status['step'] + 3
  (tmp_path / 'mp' / 'config.json').write_text(
    json.dumps(
      {
        **_json(tmp_path / 'mp', 'config.json'),
        'run': {
          # As if it had been told so from the start.
          **_json(tmp_path / 'mp', 'config.json')['run'],
          'num_steps': num_steps,
        },
      }
    )
  )
  done = _run(
    [c for c in command if 'num_steps' not in c]
    + [f'--config.run.num_steps={num_steps}', '--config.system.num_workers=3']
  )
  assert done.returncode == 0, done.stdout + done.stderr

  run = make_run(tmp_path / 'local', {'run.architecture': 'fc1', 'run.num_steps': num_steps})
  local.distil(run, threading.Event())
  with (
    np.load(tmp_path / 'mp' / 'distilled.npz') as there,
    np.load(tmp_path / 'local' / 'distilled.npz') as here,
  ):
    for name in ('images', 'labels'):
      assert there[name].tobytes() == here[name].tobytes()
  rows = [json.loads(line) for line in (tmp_path / 'mp' / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == [0, 1, num_steps]


@pytest.mark.parametrize(
  'number, program',
  [
    (signal.SIGINT, ('launch.py', '--lp_launch_type=local_mp')),
    (signal.SIGHUP, ('launch.py', '--lp_launch_type=local_mp')),
    (signal.SIGHUP, ('-m', 'programs.local')),
  ],
)
def test_ctrl_c_and_a_closed_terminal_stop_it_with_a_checkpoint(
  tmp_path, npz, cache, number, program
):
  small = [flag for flag in SMALL if not flag.startswith('--lp')]
  command = _command(
    tmp_path / 'run',
    *small,
    f'--config.run.data.name={npz}',
    '--config.run.num_steps=100000',
    '--config.system.log_seconds=0.1',
    program=program,
    cache=cache,
  )
  terminal, slave = pty.openpty()
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    stdin=slave,
    stdout=slave,
    stderr=slave,
    start_new_session=True,
    preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    env={**os.environ, 'TERM': 'xterm', 'COLUMNS': '200'},
  )
  os.close(slave)
  reader = _Reader(terminal)
  try:
    _wait(lambda: _step(tmp_path / 'run') >= 3)
    everyone = psutil.Process(process.pid).children(recursive=True)
    said = len(reader.output)
    if number == signal.SIGINT:
      os.write(terminal, b'\x03')  # Ctrl-C: the terminal tells all processes on it
    else:
      reader.close()
    process.wait(60)
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
    reader.close()
  assert process.returncode == 75, reader.output.decode()
  assert not psutil.wait_procs(everyone, timeout=20)[1]
  stopped = _json(tmp_path / 'run', 'status.json')
  assert stopped['state'] == 'stopped' and stopped['step'] >= 3
  assert max(os.listdir(tmp_path / 'run' / 'checkpoints')) == f'{stopped["step"]:08d}'
  if number == signal.SIGINT:
    output = re.sub(r'\x1b\[[\d;?]*[A-Za-z]|\^C', '', reader.output[said:].decode())
    lines = [line.strip() for line in re.split(r'[\r\n]+', output)]
    bar = re.compile(r'|loss .* workers: \d|step \d+/.* to go|stopped|starting|running')
    words = [line for line in lines if not bar.fullmatch(line)]
    assert words[0] == 'Stopping with a checkpoint; Ctrl-C again ends at once.'
    assert words[-2] == f'Stopped at step {stopped["step"]} of 100000. To go on from there:'
    assert words[-1].startswith('python') and words[-1].endswith(f'cache_dir={cache}')
    assert len(words) <= 4 and 'checkpointed.' in words[-3], words


def test_a_run_that_ignores_the_end_of_its_terminal_goes_on(tmp_path, npz, cache):
  command = _command(
    tmp_path / 'run',
    *SMALL[:-1],
    f'--config.run.data.name={npz}',
    '--config.run.num_steps=100000',
    '--config.system.log_seconds=0.1',
    program=('-m', 'programs.local'),
    cache=cache,
  )
  process = subprocess.Popen(
    ['nohup', *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  try:
    _wait(lambda: _step(tmp_path / 'run') >= 1)
    process.send_signal(signal.SIGHUP)
    before = _step(tmp_path / 'run')
    _wait(lambda: _step(tmp_path / 'run') >= before + 3)
    process.terminate()
    assert process.wait(60) == 75
  finally:
    process.kill()


class _Reader:
  """Reads what a program writes to a terminal until it is closed."""

  def __init__(self, terminal):
    self.output, self._terminal = b'', terminal
    self._thread = threading.Thread(target=self._read)
    self._closing = False
    self._thread.start()

  def _read(self):
    while not self._closing:
      if select.select([self._terminal], [], [], 0.05)[0]:
        try:
          self.output += os.read(self._terminal, 65536)
        except OSError:  # its last writer is gone
          break

  def close(self):
    if not self._closing:
      self._closing = True
      self._thread.join()
      os.close(self._terminal)


def _child(launcher, node):
  """The process that does a node's work."""
  for process in psutil.Process(launcher).children(recursive=True):
    try:
      parent = process.parent()
      if (
        process.environ().get('KIP_SUPERVISOR') == str(parent.pid)
        and f'{node}/0' in parent.parent().cmdline()
      ):
        return process
    except (psutil.Error, AttributeError):  # it has just ended
      continue
  return None


def _wait(condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


def _step(workdir, generation=1):
  try:
    status = _json(workdir, 'status.json')
  except FileNotFoundError:
    return -1
  return (
    status['step'] if status['state'] == 'running' and status['generation'] == generation else -1
  )


def test_killed_nodes_come_back_and_the_launcher_takes_all_with_it(tmp_path, npz, make_run, cache):
  """Worker, coordinator and evaluator killed; then the launcher; then Ctrl-C twice. The run goes on
  each time, to the same bits."""
  workdir = tmp_path / 'mp'
  command = _command(
    workdir,
    *SMALL,
    f'--config.run.data.name={npz}',
    '--config.system.log_seconds=0.1',
    '--config.system.snapshot_steps=0,1',
    '--config.system.checkpoint_seconds=0.5',
    cache=cache,
  )
  launchers = []

  def start(*flags):
    launchers.append(
      subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
      )
    )
    return launchers[-1]

  try:
    process = start('--config.run.num_steps=100000')
    _wait(lambda: _step(workdir) >= 3)
    for generation, node in ((1, 'kernel_worker_0'), (2, 'coordinator'), (2, 'evaluator')):
      child, step = _child(process.pid, node), _step(workdir, generation)
      child.kill()
      _wait(
        lambda: (
          (_child(process.pid, node) or child).pid != child.pid
          and _step(workdir, generation) > max(step, 3)
        )
      )
    everyone = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert not psutil.wait_procs(everyone, timeout=30)[1]
    assert _json(workdir, 'status.json')['state'] == 'stopped'
    assert 'kernel_worker_0 was killed by SIGKILL; it is started again' in process.stdout.read()

    process = start('--config.run.num_steps=100000')
    _wait(lambda: _step(workdir, 3) >= 3)
    everyone = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(20)
    assert not psutil.wait_procs(everyone, timeout=20)[1]
  finally:
    for process in launchers:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)

  num_steps = _json(workdir, 'status.json')['step'] + 60
  config = _json(workdir, 'config.json')
  config['run']['num_steps'] = num_steps  # as if it had been told so from the start
  (workdir / 'config.json').write_text(json.dumps(config))
  done = _run(command + [f'--config.run.num_steps={num_steps}'])
  assert done.returncode == 0, done.stdout + done.stderr
  run = make_run(
    tmp_path / 'local',
    {'run.architecture': 'fc1', 'run.num_steps': num_steps, 'system.snapshot_steps': (0, 1)},
  )
  local.distil(run, threading.Event())
  with (
    np.load(workdir / 'distilled.npz') as there,
    np.load(tmp_path / 'local' / 'distilled.npz') as here,
  ):
    for name in ('images', 'labels'):
      assert there[name].tobytes() == here[name].tobytes()
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == [0, 1, num_steps]


def test_a_worker_that_raises_stops_the_run_with_its_message(tmp_path, npz, cache):
  (tmp_path / 'sitecustomize.py').write_text("""
try:
  from nodes import kernel_worker
except ImportError:
  pass
else:
  def compute(self, task, inputs):
    raise ValueError('the dog ate task %d' % task.index)
  kernel_worker.KernelWorker._compute = compute
""")
  done = _run(
    _command(tmp_path / 'run', *SMALL, f'--config.run.data.name={npz}', cache=cache),
    env={'PYTHONPATH': str(tmp_path)},
  )
  assert done.returncode == 1
  assert (
    'The run failed: step 0: the support_blocks task' in done.stderr
    and 'ValueError: the dog ate task' in done.stderr
  )
  status = _json(tmp_path / 'run', 'status.json')
  assert status['state'] == 'failed' and 'the dog ate task' in status['message']


def test_a_worker_that_cannot_start_stops_the_run_with_its_message(tmp_path, npz, cache):
  (tmp_path / 'sitecustomize.py').write_text("""
try:
  from kernels import registry
except ImportError:
  pass
else:
  def make_kernel(*args, **kwargs):
    raise RuntimeError('no kernel today')
  registry.make_kernel = make_kernel
""")
  done = _run(
    _command(tmp_path / 'run', *SMALL, f'--config.run.data.name={npz}', cache=cache),
    env={'PYTHONPATH': str(tmp_path)},
  )
  assert done.returncode == 1
  assert 'no worker can start; the last one said: RuntimeError: no kernel today' in done.stderr


def test_a_proxy_in_the_environment_is_not_for_the_nodes(tmp_path, npz, cache):
  proxies = {
    name: 'http://127.0.0.1:9'
    for lower in ('http_proxy', 'https_proxy', 'grpc_proxy', 'all_proxy')
    for name in (lower, lower.upper())
  }
  done = _run(
    _command(
      tmp_path,
      *SMALL,
      f'--config.run.data.name={npz}',
      '--config.run.num_steps=2',
      '--config.system.coordinator_timeout=20',
      cache=cache,
    ),
    timeout=120,
    env=proxies,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert _json(tmp_path, 'status.json')['state'] == 'finished'


def test_threads_instead_of_processes(tmp_path, npz, cache):
  flags = [flag.replace('local_mp', 'local_mt') for flag in SMALL]
  done = _run(
    _command(
      tmp_path, *flags, f'--config.run.data.name={npz}', '--config.run.num_steps=2', cache=cache
    )
  )
  assert done.returncode == 0, done.stdout + done.stderr
  assert _json(tmp_path, 'status.json')['state'] == 'finished' and sorted(_rows(tmp_path)) == [
    0,
    1,
    2,
  ]


def _refused(command, message):
  done = _run(command, timeout=60)
  assert done.returncode == 2, done.stdout + done.stderr
  lines = [line for line in done.stderr.splitlines() if line.startswith('error:')]
  assert len(lines) == 1 and 'Traceback' not in done.stderr
  assert message in lines[0], lines[0]


@pytest.mark.parametrize(
  'flags, message',
  [
    (('--config=configs/nothing.py',), '--config=configs/nothing.py: there is no such file.'),
    (('--config.run.sed=3',), 'unknown field run.sed; did you mean run.seed'),
    (('--config.run.seed=three',), "--config.run.seed=three: expected a whole number, got 'three'"),
    (('--config.run.learning_rate=-1',), 'run.learning_rate must be above 0'),
    (('--config.run.architecture=resnet',), "run.architecture: unknown name 'resnet'; known: fc1"),
    (('--config.run.images_per_class=1000',), 'run.images_per_class must be at most'),
    (('--config.run.targets_per_step=7',), 'run.targets_per_step must be a multiple of 10'),
    (('--config.run.data.name=mnits',), "run.data.name: no data set 'mnits'; known: digits, mnist"),
    (('--config.run.data.dir=/nowhere',), "run.data.dir: no folder '/nowhere'"),
    (
      (
        '--config.run.architecture=fc1',
        '--config.run.targets_per_step=1000',
        '--config.system.num_workers=100000',
      ),
      'GiB of memory',
    ),
    (('--wrokdir=x',), "Unknown command line flag 'wrokdir'"),
    (('stray',), "unknown argument 'stray'"),
  ],
)
def test_bad_input_gets_one_line_and_status_2(tmp_path, cache, flags, message):
  _refused(
    _command(
      tmp_path / 'run',
      '--config.run.targets_per_step=200',
      *flags,
      program=('-m', 'programs.local'),
      cache=cache,
    ),
    message,
  )
  assert not (tmp_path / 'run').exists() or not os.listdir(tmp_path / 'run')


def test_missing_flags(tmp_path):
  _refused([sys.executable, 'launch.py', f'--workdir={tmp_path}'], '--config=FILE is missing')
  _refused([sys.executable, 'launch.py', '--config=configs/base.py'], '--workdir=DIR is missing')


def test_a_config_file_with_a_bug(tmp_path):
  (tmp_path / 'mine.py').write_text('import nothing_like_it\n')
  _refused(
    _command(tmp_path / 'run', config=tmp_path / 'mine.py'),
    "ModuleNotFoundError: No module named 'nothing_like_it'",
  )


def test_a_workdir_that_cannot_be_written(tmp_path, npz, cache):
  (tmp_path / 'file').write_text('')
  _refused(
    _command(tmp_path / 'file' / 'run', *SMALL, f'--config.run.data.name={npz}', cache=cache),
    'cannot be written: Not a directory',
  )


def test_a_port_that_is_taken(tmp_path, npz, cache):
  with socket.socket() as taken:
    taken.bind(('', 0))
    taken.listen()
    port = taken.getsockname()[1]
    _refused(
      _command(
        tmp_path / 'run',
        *SMALL,
        f'--config.run.data.name={npz}',
        f'--config.system.port={port}',
        cache=cache,
      ),
      f'system.port={port} cannot be used (Address already in use)',
    )


def test_a_directory_of_another_run(tmp_path, npz, cache, make_run):
  run = make_run(tmp_path / 'run', {'run.architecture': 'fc1'})
  _refused(
    _command(
      tmp_path / 'run',
      *SMALL,
      f'--config.run.data.name={npz}',
      '--config.run.num_steps=3',
      cache=cache,
    ),
    'is in use by a run',
  )
  run.directory._lock.close()
  _refused(
    _command(
      tmp_path / 'run',
      *SMALL,
      f'--config.run.data.name={npz}',
      '--config.run.num_steps=3',
      '--config.run.seed=4',
      cache=cache,
    ),
    'holds another run: run.seed (0 there, 4 here)',
  )


def test_a_fixed_port(tmp_path, npz, cache):
  done = _run(
    _command(
      tmp_path / 'run',
      *SMALL,
      f'--config.run.data.name={npz}',
      '--config.run.num_steps=1',
      f'--config.system.port={_free_port()}',
      cache=cache,
    )
  )
  assert done.returncode == 0, done.stdout + done.stderr


def test_launchpad_may_trip_over_ended_processes_while_it_stops(monkeypatch):
  """Its alarm, which looks at them every second, raises where one has just ended."""
  monkeypatch.setattr(psutil.Process, 'children', lambda self, recursive=False: [])
  calls = []

  def trip(number, frame):
    raise psutil.NoSuchProcess(1)

  class Manager:
    def wait(self, labels=None, raise_error=True):
      calls.append(labels)
      if labels:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        raise psutil.NoSuchProcess(1)
      time.sleep(0.5)

  before = signal.signal(signal.SIGALRM, trip)
  try:
    distill.wait(Manager())
  finally:
    signal.signal(signal.SIGALRM, before)
  assert calls == [['coordinator', 'coordinator/0'], None]
