"""From the outcome of a run to its last words and an exit status, the same for every launcher."""

import os
import sys
from typing import Any

from artifacts import run_directory, words
from distillation import evaluation

STOPPED_STATUS = 75  # exit status of what the same command goes on with
_EXIT_STATUS = {
  run_directory.FINISHED: 0,
  run_directory.FAILED: 1,
  run_directory.STOPPED: STOPPED_STATUS,
}
_BEGINNINGS = {'real': 'real images', 'noise': 'noise'}  # by run.initial_images


def conclude(directory: run_directory.RunDirectory) -> int:
  """Prints how the launch that opened `directory` ended; returns its exit status."""
  status = directory.read_status()
  if status is None or not directory.has_ended(status):
    status = {
      **(status or {}),
      'state': run_directory.FAILED,
      'message': 'the coordinator is gone (its output may say why); '
      'the same command resumes from the last checkpoint.',
    }
    directory.write_status(**status)
  state = status['state']
  message = f': {status["message"]}' if 'message' in status else ''
  if state == run_directory.FINISHED:
    print(summary(directory, status))
  elif state == run_directory.STOPPED:
    print(
      f'Stopped at step {status["step"]} of {status["num_steps"]}{message}. '
      f'To go on from there:\n  {directory.read_command()}'
    )
  else:
    print(f'The run failed{message}', file=sys.stderr)
  return _EXIT_STATUS.get(state, 1)


def summary(directory: run_directory.RunDirectory, status: dict[str, Any]) -> str:
  """Summarises a finished run: accuracies before and after, kernel pairs by worker, its files."""
  rows = {row['step']: row for row in directory.read_metrics()}
  first, last = rows.get(0, {}), rows.get(status['num_steps'])
  initial_images = directory.read_saved().config.run.initial_images
  beginning = _BEGINNINGS.get(initial_images, 'images')
  steps = words.count(status['num_steps'], 'step')
  lines = [f'Finished {steps} after {status["wall_seconds"]:.0f} s.']
  if last:
    network = f'finite network ({evaluation.networks_in_words([last])})'
    for key, name in (('krr_test_accuracy', 'KRR'), ('nn_test_accuracy', network)):
      if key in last:
        line = f'  test accuracy, {name}: {100 * last[key]:.2f} %'
        if key in first:
          line += f' ({100 * first[key]:.2f} % with the {beginning} it started from)'
        lines.append(line)
  else:
    lines.append('  the last evaluation is missing: the evaluator did not finish in time')
  pairs = ', '.join(f'{name} {counts["pairs"]}' for name, counts in status['workers'].items())
  lines.append(f'  kernel pairs: {status["pairs"]} needed; computed by {pairs}')
  files = (directory.distilled, directory.metrics, directory.picture, directory.report)
  lines += [f'  {path}' for path in files if os.path.exists(path)]
  return '\n'.join(lines)
