"""`--cluster=slurm`: submits a run's coordinator, evaluator and workers as jobs of their own, or,
inside an allocation, runs them there as steps; programs/slurm/ holds the scripts.

    python launch.py --cluster=slurm --config=FILE --workdir=SHARED_DIR \\
      --config.system.num_workers=64 --slurm_worker_options='--cpus-per-task=8' \\
      --slurm_options='--partition=cpu --account=mine --time=24:00:00'
"""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import flags, logging

from artifacts import run_directory
from programs import command_line, memory, start

CLUSTER = flags.DEFINE_enum(
  'cluster',
  None,
  ['slurm', 'kubernetes'],
  'slurm: submit the run, or run it in the allocation that this is started in. kubernetes: print '
  'its manifest.',
)
_OPTIONS = flags.DEFINE_string(
  'slurm_options',
  '',
  "sbatch's (in an allocation srun's) options for all, such as '--partition=cpu --time=24:00:00'.",
)
_WORKER_OPTIONS = flags.DEFINE_string(
  'slurm_worker_options', '', "Options for the workers beside these, such as '--gpus=1'."
)

_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SCRIPTS = os.path.join(_ROOT, 'programs', 'slurm')
_OWN_FLAGS = ('cluster', 'slurm_options', 'slurm_worker_options')
_PATIENT = '--config.system.worker_timeout=1000000'  # workers may wait in the queue for days


def submit(argv: Sequence[str]) -> int:
  """Submits the jobs, and prints their ids and how to follow, extend and stop the run; inside an
  allocation becomes the script that runs it there.

  Returns the exit status. Raises BadInput, and what `start.ready` raises.
  """
  # The data are prepared on this host: others may have no way to them. Mistakes show at once, too.
  options = _split(_OPTIONS)
  worker_options = _split(_WORKER_OPTIONS)
  run = start.ready(None, memory.Here.NOTHING)
  for remark in run.remarks:
    logging.info(remark)
  workdir, where = run.directory.path, f'--workdir={run.directory.path}'
  logs = os.path.join(workdir, 'logs')
  if not logs.isprintable() or '\\' in logs:
    raise command_line.BadInput(
      f'--workdir={workdir!r} holds a backslash or a control character, with which Slurm cannot '
      'name the files of logs; choose another.'
    )
  os.makedirs(logs, exist_ok=True)
  num_workers = run.config.system.num_workers
  arguments = passed_on(argv)
  if 'SLURM_JOB_ID' in os.environ:
    _run_in_allocation(run, [*options, '--', *worker_options, '--', *arguments], logs)
  # No characters that mean something to squeue or scancel, such as commas.
  base = re.sub(r'[^A-Za-z0-9._-]', '_', os.path.basename(workdir))
  name = f'kip-{base}-{hashlib.sha256(workdir.encode()).hexdigest()[:8]}'

  def command(script: str, log: str, *more: str) -> list[str]:
    return [
      'sbatch',
      '--parsable',
      f'--job-name={name}',
      f'--output={logs.replace("%", "%%")}/{log}.log',
      '--export=ALL',
      *options,
      *more,
      os.path.join(_SCRIPTS, script),
      _ROOT,
      sys.executable,
    ]

  def workers(*more: str) -> list[str]:
    more = (f'--array=1-{num_workers}', *worker_options, *more)
    return [*command('client.sh', 'worker_%A_%a', *more), '--role=worker', where]

  arguments = unless_given(_PATIENT, arguments)
  coordinator = _run([*command('coordinator.sh', 'coordinator'), *arguments, where])
  run.directory.begin(run_directory.SUBMITTED)
  run.directory.close()
  after = f'--dependency=after:{coordinator}'  # once it has started for the first time
  evaluator = _run([*command('client.sh', 'evaluator', after), '--role=evaluator', where])
  array = _run(workers(after))
  print(
    f'Submitted: coordinator {coordinator}, evaluator {evaluator}, {num_workers} workers {array}.\n'
    f'  follow:      {shlex.join(["tail", "-F", f"{logs}/coordinator.log"])}\n'
    f'  see jobs:    squeue --name={name}\n'
    f'  add workers: {shlex.join(workers())}\n'
    f'  stop:        scancel --name={name}\n'
    'The same command goes on from the last checkpoint.\n'
    f"Whoever has the run's key, {run.directory.secret}, can take part in it: see docs/security.md."
  )
  return 0


def _run_in_allocation(run: start.Run, arguments: list[str], logs: str) -> NoReturn:
  print(
    f'Runs in allocation {os.environ["SLURM_JOB_ID"]}; logs of evaluator and workers: {logs}.',
    flush=True,
  )
  os.environ.update(
    KIP_ROOT=_ROOT,
    KIP_PYTHON=sys.executable,
    KIP_WORKDIR=run.directory.path,
    KIP_WORKERS=str(run.config.system.num_workers),
  )
  run.directory.close()
  script = os.path.join(_SCRIPTS, 'allocation.sh')
  os.execv(script, [script, *arguments, f'--workdir={run.directory.path}'])


def _split(flag: flags.FlagHolder) -> list[str]:
  """Splits a flag's value into options, as a shell does. Raises BadInput."""
  try:
    options = shlex.split(flag.value)
  except ValueError as error:
    raise command_line.BadInput(f'--{flag.name}={flag.value}: {error}.') from error
  if '--' in options:
    raise command_line.BadInput(f"--{flag.name}={flag.value}: '--' is no option.")
  return options


def unless_given(flag: str, arguments: list[str]) -> list[str]:
  """Adds `--NAME=VALUE` to arguments, unless they give that flag."""
  name = flag.partition('=')[0]
  is_given = any(argument.startswith(name) for argument in arguments)
  return arguments if is_given else [*arguments, flag]


def passed_on(argv: Sequence[str], own_flags: Sequence[str] = _OWN_FLAGS) -> list[str]:
  """Returns the arguments of a command line without the flags that the submission itself reads."""
  rest, skip = [], False
  for argument in argv[1:]:
    flag, equals, _ = argument.lstrip('-').partition('=')
    if skip:
      skip = False
    elif argument.startswith('-') and flag in own_flags:
      skip = not equals
    else:
      rest.append(argument)
  return rest


def _run(command: list[str]) -> str:
  """Runs an sbatch command; returns the job's id. Raises BadInput."""
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError as error:
    raise command_line.BadInput(
      f'sbatch cannot be run ({error.strerror}): --cluster=slurm is for a host that '
      'submits to Slurm.'
    ) from error
  if done.returncode:
    raise command_line.BadInput(f'sbatch refuses: {" ".join(done.stderr.split())}')
  return done.stdout.strip().partition(';')[0]
