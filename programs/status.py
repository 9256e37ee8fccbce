"""The status of a run, from its directory alone: `launch.py --status --workdir=DIR [--json]`."""

import json
import os
import time
from typing import Any

from absl import flags

from artifacts import run_directory, words
from distillation import evaluation
from programs import command_line, start

STATUS = flags.DEFINE_bool(
  'status', False, 'Print the status of the run in --workdir, and start nothing.'
)
JSON = flags.DEFINE_bool('json', False, 'With --status: one line of JSON.')


def show() -> int:
  """Prints the status of the run in --workdir; returns the exit status.

  Raises BadInput if there is no run.
  """
  workdir = start.WORKDIR.value
  if not STATUS.value:
    raise command_line.BadInput('--json is for --status: give both.')
  if not workdir:
    raise command_line.BadInput('--workdir=DIR is missing: the run directory.')
  status = read(run_directory.RunDirectory(workdir))
  print(json.dumps(status) if JSON.value else in_words(status))
  return 0


def read(directory: run_directory.RunDirectory) -> dict[str, Any]:
  """Reads what status.json holds, and adds to it.

  Returns:
    `state` (submitted, starting, running, evaluating, finished, stopped, failed; a run that ended
    without recording why has failed), `step`, `num_steps`, `workdir`, `command` (the last one that
    started or resumed the run; None: not recorded), `workers` {name: {tasks, pairs, seconds,
    pairs_per_second, alive}}, `checkpoint_step` and `checkpoint_age` (seconds; None: there is
    none), `rows` (of metrics.jsonl); while it is `evaluating` also `evaluated` and `to_evaluate`
    (snapshots); once it has made a step also `train_loss`, `kernel_pairs_per_second`,
    `seconds_to_go`.

  Raises:
    BadInput: no run has started there.
  """
  status = directory.read_status()
  if status is None:
    raise command_line.BadInput(f'--workdir={directory.path} holds no run that has started.')
  status.pop('last_row', None)
  if status['state'] in run_directory.LIVE and not directory.is_in_use():
    status.update(
      state=run_directory.FAILED, message='the launcher has exited without recording why'
    )
  live = status['state'] in run_directory.LIVE
  for counts in status['workers'].values():
    counts['pairs_per_second'] = counts['pairs'] / counts['seconds'] if counts['seconds'] else 0.0
    counts['alive'] = live and counts.get('alive', False)
  step = directory.checkpoint_step()
  return {
    **status,
    'workdir': directory.path,
    'command': directory.read_command(),
    'checkpoint_step': step,
    'checkpoint_age': _age(directory, step),
    'rows': directory.read_metrics(),
  }


def _age(directory: run_directory.RunDirectory, step: int | None) -> float | None:
  """Seconds since the checkpoint of `step` was written; None if it is gone."""
  try:
    return time.time() - os.stat(directory.checkpoint(step)).st_mtime if step is not None else None
  except FileNotFoundError:  # newer ones have taken its place
    return None


def in_words(status: dict[str, Any]) -> str:
  """Formats what `read` returns in a few lines."""
  state, message = status['state'], f': {status["message"]}' if 'message' in status else ''
  if state == run_directory.EVALUATING:
    state += f' ({min(status["evaluated"] + 1, status["to_evaluate"])} of {status["to_evaluate"]})'
  computing = words.duration(status['wall_seconds'])
  lines = [
    f'{state}{message}',
    f'  step {status["step"]} of {status["num_steps"]}, {computing} of computing; '
    f'last update {status["updated"]}',
  ]
  if state in (run_directory.STOPPED, run_directory.FAILED) and status['command']:
    lines.append(f'  to go on: {status["command"]}')
  if 'train_loss' in status:
    is_running = state == run_directory.RUNNING
    to_go = f', {words.duration(status["seconds_to_go"])} to go' if is_running else ''
    lines.append(
      f'  loss {status["train_loss"]:.5f}, {status["kernel_pairs_per_second"]:.3g} pairs/s{to_go}'
    )
  for name, counts in status['workers'].items():
    alive = ' (alive)' if counts['alive'] else ''
    tasks = words.count(counts['tasks'], 'task')
    lines.append(f'  {name}{alive}: {tasks}, {counts["pairs_per_second"]:.3g} pairs/s')
  lines += [f'  evaluated {evaluation.in_words(row)}' for row in status['rows'][-3:]]
  if status['checkpoint_age'] is not None:
    age = words.duration(status['checkpoint_age'])
    lines.append(f'  last checkpoint: step {status["checkpoint_step"]}, {age} ago')
  return '\n'.join(lines)
