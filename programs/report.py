"""Writes `report.html` of a run again, and those of TensorBoard's files that are missing.

    python -m programs.report --workdir=DIR [--step=N]

--step=N shows the snapshot of step N instead of the distilled set.

Exit status: 0 done, 2 bad input or a directory that cannot be written.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from artifacts import report, run_directory
from data import store
from programs import command_line

_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of a run that has come to its end.')
_STEP = flags.DEFINE_integer(
  'step', None, 'Show the snapshot of this step instead of the distilled set.', lower_bound=0
)


def main(argv: Sequence[str]) -> int:
  """Writes the report of --workdir again; returns the exit status."""
  command_line.log_plainly()
  command_line.parse(argv, '--workdir=DIR --step=N')
  if not _WORKDIR.value:
    raise command_line.BadInput('--workdir=DIR is missing: the run directory.')
  directory = run_directory.RunDirectory(_WORKDIR.value)
  rows, saved = directory.read_metrics(), directory.read_config()
  if saved is None or not rows:
    raise command_line.BadInput(f'--workdir={_WORKDIR.value} holds no run that has been evaluated.')
  try:
    report.write(directory, rows, _STEP.value)
    _write_missing_events(directory, rows, saved)
  except (OSError, ImportError) as error:
    raise command_line.BadInput(
      f'the report of {directory.path} cannot be written: {error}'
    ) from error
  print(directory.report)
  return 0


def _write_missing_events(
  directory: run_directory.RunDirectory, rows: Sequence[dict[str, Any]], saved: run_directory.Saved
) -> None:
  """Writes TensorBoard's files that are missing, if the data are prepared. Raises OSError."""
  from artifacts import tensorboard  # here, so that the report is written without TensorBoard

  cache = store.cache_folder(saved.config.system.cache_dir)
  prepared = store.open_prepared(saved.data_key, cache)
  if prepared:
    tensorboard.write_missing(directory, rows, prepared)
  else:
    logging.info("TensorBoard's files stay as they are: the prepared data are not in %s.", cache)


if __name__ == '__main__':
  command_line.exit_with(main)
