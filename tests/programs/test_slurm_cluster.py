"""--cluster=slurm without a Slurm; tests/slurm has one."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import psutil
import pytest

from artifacts import run_directory
from programs import slurm_cluster, status

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.mark.parametrize(
  'given, passed_on',
  [
    (['--cluster=slurm', '--config=a.py', '--host=b'], ['--config=a.py', '--host=b']),
    (
      ['--cluster', 'slurm', '-slurm_options', '--time=1 --mem=2', '--workdir', 'c'],
      ['--workdir', 'c'],
    ),
    (
      ['--slurm_worker_options=--time=1', '--config.system.num_workers=3'],
      ['--config.system.num_workers=3'],
    ),
  ],
)
def test_the_coordinator_gets_the_other_flags(given, passed_on):
  assert slurm_cluster.passed_on(['launch.py', *given]) == passed_on


def _submit(tmp_path, npz, cache, path):
  return subprocess.run(
    [
      sys.executable,
      'launch.py',
      '--cluster=slurm',
      '--config=configs/base.py',
      f'--workdir={tmp_path}/run',
      f'--config.run.data.name={npz}',
      f'--config.system.cache_dir={cache}',
      '--config.run.targets_per_step=33',
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    env={**os.environ, 'PATH': path},
  )


def test_no_slurm_gets_one_line_and_status_2(tmp_path, npz, cache):
  done = _submit(tmp_path, npz, cache, path=str(tmp_path))
  assert done.returncode == 2 and 'Traceback' not in done.stderr
  assert 'error: sbatch cannot be run (No such file or directory)' in done.stderr


def test_what_sbatch_says_is_passed_on(tmp_path, npz, cache):
  (tmp_path / 'sbatch').write_text(
    '#!/bin/sh\necho "sbatch: error: invalid partition" >&2\nexit 1\n'
  )
  (tmp_path / 'sbatch').chmod(0o755)
  done = _submit(tmp_path, npz, cache, path=f'{tmp_path}:{os.environ["PATH"]}')
  assert (
    done.returncode == 2
    and 'error: sbatch refuses: sbatch: error: invalid partition' in done.stderr
  )
  assert re.search(
    r'Memory: about \d+\.\d GiB for the coordinator, \d+\.\d GiB for each worker, '
    r'\d+\.\d GiB for the evaluator',
    done.stderr,
  )


def test_a_submitted_run_says_so_until_it_starts(tmp_path, npz, cache):
  """Also where an earlier one has finished there; one that is refused leaves what it finds."""
  directory = run_directory.RunDirectory(str(tmp_path / 'run'))
  (tmp_path / 'sbatch').write_text('#!/bin/sh\necho 7\n')
  (tmp_path / 'sbatch').chmod(0o755)
  path = f'{tmp_path}:{os.environ["PATH"]}'
  done = _submit(tmp_path, npz, cache, path)
  assert done.returncode == 0 and 'Submitted: coordinator 7, evaluator 7' in done.stdout
  assert not directory.is_in_use()  # the coordinator's job may open it
  assert status.read(directory)['state'] == 'submitted'
  assert status.in_words(status.read(directory)).startswith('submitted\n  step 0 of 1000')
  directory.write_status(run_directory.FINISHED, step=1000, num_steps=1000, generation=1)
  (tmp_path / 'sbatch').write_text('#!/bin/sh\nexit 1\n')
  assert _submit(tmp_path, npz, cache, path).returncode == 2
  assert (directory.read_status() or {})['state'] == 'finished'


ODD = """a%j 'b' "c", $HOME *"""
# Stand in for Slurm's commands: they read options as Slurm does, and run what they are given.
SLURM = f"""#!{sys.executable}
import os, re, shutil, subprocess, sys
fields = {{'%': '%', 'j': '7', 'A': '7', 'a': '1', 's': '0', 't': '0'}}
options, rest, environment, output = [], sys.argv[1:], dict(os.environ), None
while rest and rest[0].startswith('-'):
  options.append(rest.pop(0))
  name, _, value = options[-1].partition('=')
  if name == '--output':
    output = re.sub('%(.)', lambda found: fields[found[1]], value)
  if name == '--export':
    environment.update(pair.split('=', 1) for pair in value.split(',') if '=' in pair)
with open(os.environ['CALLS'], 'a') as file:
  file.write(repr(options) + '\\n')
if os.path.basename(sys.argv[0]) == 'sbatch':
  print(7)
  rest[0] = shutil.copy(rest[0], os.path.join(os.path.dirname(os.environ['CALLS']), 'spooled'))
environment.update(SLURM_JOB_ID='7', SLURM_STEP_ID='0', SLURM_PROCID='0')
stream = open(output, 'a') if output else None
sys.exit(subprocess.run(rest, env=environment, stdout=stream, stderr=stream).returncode)
"""
ROLE = """import json, sys
if any(argument.startswith('--role') for argument in sys.argv):
  print(json.dumps(sys.argv))
  sys.exit()
"""


def _script(path, content):
  path.write_text(content)
  path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path):
  """A folder with stand-ins for Slurm's commands, and one for sleep that waits for nothing."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  for name in ('sbatch', 'srun'):
    _script(folder / name, SLURM)
  for name in ('squeue', 'scancel', 'scontrol', 'sleep'):
    _script(folder / name, f'#!/bin/sh\necho {name} "$@" >> "$CALLS"\n')
  return folder


@pytest.fixture
def odd(tmp_path):
  """A project at an odd path, whose launch.py prints its arguments where it has a role."""
  folder = tmp_path / f'project {ODD}'
  folder.mkdir()
  for path in pathlib.Path(ROOT).iterdir():
    if path.name != 'launch.py':
      (folder / path.name).symlink_to(path)
  launch = pathlib.Path(ROOT, 'launch.py').read_text(encoding='utf-8')
  docstring, quotes, rest = launch.partition('"""\n\n')
  (folder / 'launch.py').write_text(docstring + quotes + ROLE + rest)
  return folder


def _launch(odd, slurm, npz, cache, *flags, **environment):
  workdir = odd.parent / f'run {ODD}'
  done = subprocess.run(
    [
      sys.executable,
      odd / 'launch.py',
      '--cluster=slurm',
      f'--config={ROOT}/configs/base.py',
      f'--workdir={workdir}',
      f'--config.run.data.name={npz}',
      f'--config.system.cache_dir={cache}',
      '--config.system.num_workers=2',
      '--config.run.targets_per_step=33',
      *flags,
    ],
    cwd=odd.parent,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    env={**_environment(slurm), **environment},
  )
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


def _environment(slurm):
  path = f'{slurm}:{os.environ["PATH"]}'
  return {**os.environ, 'PATH': path, 'CALLS': str(slurm / 'calls')}


def _started(log):
  """The arguments of launch.py, which a job's log begins with."""
  return json.loads(log.read_text().splitlines()[0])


def test_odd_names_and_quoted_options_reach_the_jobs_as_they_are(odd, slurm, npz, cache):
  flags = ["""--slurm_options=--comment='two "words", 5%' --constraint=[ab]*"""]
  (odd.parent / '--constraint=b1').touch()
  workdir, output = _launch(odd, slurm, npz, cache, *flags)
  logs = workdir / 'logs'
  wanted = [str(odd / 'launch.py'), f'--workdir={workdir}']
  for log, role in (('coordinator', 'coordinator'), ('evaluator', 'evaluator')):
    started = _started(logs / f'{log}.log')
    assert set(wanted) <= set(started) and f'--role={role}' in started
  assert sorted(path.name for path in logs.iterdir()) == [
    'coordinator.log',
    'evaluator.log',
    'worker_7_1.log',
  ]
  calls = (slurm / 'calls').read_text()
  assert calls.count(repr(['--comment=two "words", 5%', '--constraint=[ab]*'])[1:-1]) == 3
  commands = dict(re.findall(r'^  (\w[\w ]*\w): +(.*)$', output, re.MULTILINE))
  assert shlex.split(commands['follow']) == ['tail', '-F', str(logs / 'coordinator.log')]
  (logs / 'worker_7_1.log').unlink()
  environment = _environment(slurm)
  subprocess.run(commands['add workers'], shell=True, env=environment, check=True, cwd='/')
  assert {*wanted, '--role=worker'} <= set(_started(logs / 'worker_7_1.log'))
  [name] = re.findall('--name=(.*)$', commands['stop'])
  assert re.fullmatch(r'kip-run_[\w.-]+', name) and f'--job-name={name}' in calls


def test_odd_names_and_quoted_options_in_an_allocation(odd, slurm, npz, cache):
  (odd.parent / '--constraint=b1').touch()
  workdir, output = _launch(
    odd,
    slurm,
    npz,
    cache,
    "--slurm_options=--comment='two words' --constraint=[ab]*",
    '--slurm_worker_options=--gres="gpu:1"',
    SLURM_JOB_ID='7',
  )
  logs = workdir / 'logs'
  wanted = {str(odd / 'launch.py'), f'--workdir={workdir}'}
  assert {*wanted, '--role=coordinator', '--config.system.num_workers=2'} <= set(
    json.loads(next(line for line in output.splitlines() if line.startswith('[')))
  )
  assert {*wanted, '--role=evaluator'} <= set(_started(logs / 'evaluator.log'))
  assert {*wanted, '--role=worker', '--name=7_0_0'} <= set(_started(logs / 'worker_7_0_0.log'))
  calls = (slurm / 'calls').read_text()
  assert calls.count("'--comment=two words', '--constraint=[ab]*'") == 3
  assert calls.count("'--gres=gpu:1'") == 1 and calls.count("'--ntasks=2'") == 1


@pytest.mark.parametrize(
  'flag, message',
  [
    ("--slurm_options=--comment='a", "--slurm_options=--comment='a: No closing quotation."),
    ('--slurm_worker_options=--a -- b', "--slurm_worker_options=--a -- b: '--' is no option."),
  ],
)
def test_options_that_no_shell_would_take_are_refused(tmp_path, slurm, flag, message):
  done = subprocess.run(
    [sys.executable, 'launch.py', '--cluster=slurm', flag, f'--workdir={tmp_path}/run'],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    env=_environment(slurm),
  )
  assert done.returncode == 2 and done.stderr.strip() == f'error: {message}'
  assert not (tmp_path / 'run').exists()


class Job:
  """programs/slurm/client.sh, with a Python that ends with one status after the other."""

  def __init__(self, slurm, statuses, restarts=0, action=''):
    self._folder, self._slurm = slurm.parent, slurm
    (self._folder / 'statuses').write_text('\n'.join(map(str, statuses)) + '\n')
    _script(
      self._folder / 'python',
      f"""#!/bin/bash
cd {shlex.quote(str(self._folder))}
echo "$@" >> lives
status=$(head -n 1 statuses)
[ $(wc -l < statuses) = 1 ] || sed -i 1d statuses
{action}
exit $status
""",
    )
    self.process = subprocess.Popen(
      [f'{ROOT}/programs/slurm/client.sh', ROOT, self._folder / 'python', '--role=worker'],
      env={**_environment(slurm), 'SLURM_JOB_ID': '7', 'SLURM_RESTART_COUNT': str(restarts)},
      stdout=subprocess.PIPE,
      text=True,
    )

  def lives(self):
    path = self._folder / 'lives'
    return path.read_text().splitlines() if path.exists() else []

  def end(self):
    """Exit status, number of lives, calls of sleep and scontrol."""
    self.process.communicate(timeout=60)
    calls = self._slurm / 'calls'
    return (
      self.process.returncode,
      len(self.lives()),
      calls.read_text().splitlines() if calls.exists() else [],
    )


@pytest.mark.parametrize(
  'statuses, restarts, status, lives, calls',
  [
    ([0], 0, 0, 1, []),
    ([2], 0, 2, 1, []),
    ([1, 137, 0], 0, 0, 3, ['sleep 10', 'sleep 20']),
    ([1, 2], 0, 2, 2, ['sleep 10']),
    (
      [1],
      19,
      0,
      10,
      [f'sleep {s}' for s in (10, 20, 40, 80, 160, *[300] * 4)] + ['scontrol requeue 7'],
    ),
    ([1], 20, 1, 10, [f'sleep {s}' for s in (10, 20, 40, 80, 160, *[300] * 4)]),
  ],
)
def test_a_worker_that_fails_is_started_again_after_a_pause_not_for_ever(
  slurm, statuses, restarts, status, lives, calls
):
  job = Job(slurm, statuses, restarts)
  assert job.end() == (status, lives, calls)
  assert set(job.lives()) == {
    f'{ROOT}/launch.py --role=worker --name=7_0_life{restarts} --threads=0'
  }


@pytest.mark.parametrize(
  'number, status, calls', [(signal.SIGTERM, 143, []), (signal.SIGUSR1, 0, ['scontrol requeue 7'])]
)
def test_a_worker_that_is_to_stop_is_not_started_again(slurm, number, status, calls):
  """By scancel it stays away; where its time is over, it comes back."""
  job = Job(slurm, [1], action='touch ready; exec /bin/sleep 60')
  end = time.monotonic() + 60
  while not (slurm.parent / 'ready').exists() and time.monotonic() < end:
    time.sleep(0.01)
  [child] = psutil.Process(job.process.pid).children()
  job.process.send_signal(number)
  if number == signal.SIGTERM:  # Slurm sends it to every process of the job
    child.send_signal(number)
  assert job.end() == (status, 1, calls)
