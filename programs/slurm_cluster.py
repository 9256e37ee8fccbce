"""`--cluster=slurm`: submits a run's coordinator, evaluator and workers as jobs of their own, or,
inside an allocation, runs them there as steps; programs/slurm/ holds the scripts.

    python launch.py --cluster=slurm --config=FILE --workdir=SHARED_DIR --config.system.num_workers=64 \\
      --slurm_options='--partition=cpu --account=mine --time=24:00:00' --slurm_worker_options='--cpus-per-task=8'
"""

import hashlib
import os
import shlex
import subprocess
import sys
from typing import Sequence

from absl import flags, logging

from artifacts import run_directory
from programs import start

CLUSTER = flags.DEFINE_enum(
  'cluster',
  None,
  ['slurm'],
  'Submit the run to this scheduler, or run it in the allocation that this is started in.',
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
_OWN_FLAGS = ('cluster', 'slurm_options', 'slurm_worker_options')
_PATIENT = '--config.system.worker_timeout=1000000'  # workers may wait in the queue for days


def submit(argv: Sequence[str]) -> int:
  """Submits the jobs, and prints their ids and how to follow, extend and stop the run. Inside an
  allocation: runs it to its end there, and gives its exit status. Raises BadInput."""
  # On this host: others may have no way to the data, and mistakes are told at once.
  run = start.ready(None, start.Here.NOTHING)
  for remark in run.remarks:
    logging.info(remark)
  workdir = run.directory.path
  logs = os.path.join(workdir, 'logs')
  os.makedirs(logs, exist_ok=True)
  num_workers = run.config.system.num_workers
  passed_on = _passed_on(argv)
  if 'SLURM_JOB_ID' in os.environ:
    print(
      f'Runs in allocation {os.environ["SLURM_JOB_ID"]}; logs of evaluator and workers: {logs}.',
      flush=True,
    )
    os.environ.update(
      KIP_ROOT=_ROOT,
      KIP_PYTHON=sys.executable,
      KIP_WORKDIR=workdir,
      KIP_WORKERS=str(num_workers),
      KIP_OPTIONS=_OPTIONS.value,
      KIP_WORKER_OPTIONS=_WORKER_OPTIONS.value,
    )
    run.directory.close()
    script = os.path.join(_ROOT, 'programs', 'slurm', 'allocation.sh')
    os.execv(script, [script, *passed_on, f'--workdir={workdir}'])
  name = f'kip-{os.path.basename(workdir)}-{hashlib.sha256(workdir.encode()).hexdigest()[:8]}'

  def command(script: str, log: str, *options: str) -> list[str]:
    return [
      'sbatch',
      '--parsable',
      f'--job-name={name}',
      f'--output={logs}/{log}.log',
      f'--export=ALL,KIP_ROOT={_ROOT},KIP_PYTHON={sys.executable}',
      *shlex.split(_OPTIONS.value),
      *options,
      os.path.join(_ROOT, 'programs', 'slurm', script),
    ]

  if not any(argument.startswith(_PATIENT.partition('=')[0]) for argument in passed_on):
    passed_on.append(_PATIENT)
  coordinator = _run(
    [*command('coordinator.sh', 'coordinator'), *passed_on, f'--workdir={workdir}']
  )
  run.directory.begin(run_directory.SUBMITTED)
  run.directory.close()
  after = f'--dependency=after:{coordinator}'  # once it runs, be it for the first time
  evaluator = _run(
    [*command('client.sh', 'evaluator', after), '--role=evaluator', f'--workdir={workdir}']
  )
  workers = lambda *options: [
    *command(
      'client.sh',
      'worker_%A_%a',
      f'--array=1-{num_workers}',
      *shlex.split(_WORKER_OPTIONS.value),
      *options,
    ),
    '--role=worker',
    f'--workdir={workdir}',
  ]
  array = _run(workers(after))
  print(
    f'Submitted: coordinator {coordinator}, evaluator {evaluator}, {num_workers} workers {array}.\n'
    f'  follow:      tail -F {logs}/coordinator.log\n'
    f'  see jobs:    squeue --name={name}\n'
    f'  add workers: {shlex.join(workers())}\n'
    f'  stop:        scancel --name={name}\n'
    'The same command goes on from the last checkpoint.\n'
    "Whoever can connect to the coordinator's port can run code as you: see BUILD.md."
  )
  return 0


def _passed_on(argv: Sequence[str]) -> list[str]:
  """The command line less what this module reads."""
  rest, skip = [], False
  for argument in argv[1:]:
    flag, equals, _ = argument.lstrip('-').partition('=')
    if skip:
      skip = False
    elif argument.startswith('-') and flag in _OWN_FLAGS:
      skip = not equals
    else:
      rest.append(argument)
  return rest


def _run(command: list[str]) -> str:
  """Submits; gives the job's id."""
  try:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
  except OSError as error:
    raise start.BadInput(
      f'sbatch cannot be run ({error.strerror}): --cluster=slurm is for a host that submits to Slurm.'
    ) from error
  if done.returncode:
    raise start.BadInput(f'sbatch refuses: {" ".join(done.stderr.split())}')
  return done.stdout.strip().partition(';')[0]
