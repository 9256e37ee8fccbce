"""How a run is doing, or what became of it, from its directory alone: `launch.py --status --workdir=DIR [--json]`."""

import datetime
import json
import os
import sys
import time
from typing import Any, Sequence

from absl import flags

from nodes import command_line
from nodes import evaluation
from nodes import run_directory

_STATUS = flags.DEFINE_bool('status', False, 'Tell how the run in --workdir is doing, and start nothing.')
_JSON = flags.DEFINE_bool('json', False, 'With --status: one line of JSON.')


def main(argv: Sequence[str]) -> int:
  """Prints the status of the run in --workdir; returns the exit status: 0, or 2 where there is no run."""
  try:
    command_line.parse(argv, '--status --workdir=DIR --json')
    workdir = flags.FLAGS.workdir
    if not workdir:
      raise command_line.BadInput('--workdir=DIR is missing: the run directory.')
    found = read(run_directory.RunDirectory(workdir))
  except (command_line.BadInput, run_directory.RunDirectoryError) as error:
    print(f'error: {error}', file=sys.stderr)
    return run_directory.BAD_INPUT_STATUS
  print(json.dumps(found) if _JSON.value else _in_words(found))
  return 0


def read(directory: run_directory.RunDirectory) -> dict[str, Any]:
  """What status.json holds, and more.

  Returns:
    `state` (running, finished, stopped, failed; a run that ended without a word has failed), `step`, `num_steps`, `workdir`,
    `workers` {name: {tasks, pairs, seconds, pairs_per_second, alive}}, `checkpoint_step` and `checkpoint_age` (seconds; None: there is
    none), `rows` (of metrics.jsonl); of a run that has made a step also `train_loss`, `kernel_pairs_per_second`, `seconds_to_go`.

  Raises:
    BadInput: there is no run.
  """
  status = directory.read_status()
  if status is None:
    raise command_line.BadInput(f'--workdir={directory.path} holds no run that has started.')
  status.pop('last_row', None)
  if status['state'] == run_directory.RUNNING and not directory.is_in_use():
    status.update(state=run_directory.FAILED, message='nobody runs it any more; the same command goes on from the last checkpoint')
  alive = status.pop('workers_alive', []) if status['state'] == run_directory.RUNNING else []
  for name, counts in status['workers'].items():
    counts['pairs_per_second'] = counts['pairs'] / counts['seconds'] if counts['seconds'] else 0.0
    counts['alive'] = name in alive
  steps = [name for name in os.listdir(directory.checkpoints) if name.isdigit()] if os.path.isdir(directory.checkpoints) else []
  last = max(steps, key=int, default=None)
  age = time.time() - os.stat(os.path.join(directory.checkpoints, last)).st_mtime if last else None
  return {**status, 'workdir': directory.path, 'checkpoint_step': last and int(last), 'checkpoint_age': age,
          'rows': directory.read_metrics()}


def _in_words(status: dict[str, Any]) -> str:
  message = f': {status["message"]}' if 'message' in status else ''
  lines = [f'{status["state"]}{message}',
           f'  step {status["step"]} of {status["num_steps"]}, {_duration(status["wall_seconds"])} of computing; '
           f'last heard of at {status["updated"]}']
  if 'train_loss' in status:
    to_go = f', {_duration(status["seconds_to_go"])} to go' if status['state'] == run_directory.RUNNING else ''
    lines.append(f'  loss {status["train_loss"]:.5f}, {status["kernel_pairs_per_second"]:.3g} pairs/s{to_go}')
  for name, counts in status['workers'].items():
    here = ' (alive)' if counts['alive'] else ''
    lines.append(f'  {name}{here}: {counts["tasks"]} tasks, {counts["pairs_per_second"]:.3g} pairs/s')
  lines += [f'  evaluated {evaluation.in_words(row)}' for row in status['rows'][-3:]]
  if status['checkpoint_age'] is not None:
    lines.append(f'  last checkpoint: step {status["checkpoint_step"]}, {_duration(status["checkpoint_age"])} ago')
  return '\n'.join(lines)


def _duration(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(seconds)))
