"""Follows the coordinator's snapshots: KRR and finite-network accuracy on the whole test set, to
log, metrics.jsonl and TensorBoard.

Alone it evaluates a finished set, on all cores:

    python -m nodes.evaluator --dataset=runs/digits/distilled.npz
    python -m nodes.evaluator --dataset=kip/cifar10/ConvNet_ssize100_zca_nol_noaug_ckpt1000.npz
    python -m nodes.evaluator --dataset=FILE.npz --config=FILE --baselines

A `distilled.npz` of ours holds its own settings, and the name of a set that the papers' authors
released (data/released.py) tells them: it is fetched. Another file (`images` [S, H, W, D] in the
preprocessed space, `labels` [S, C]) needs a configuration, of which the data set, the
preprocessing, the kernel, the ridge and the evaluation are used; given to the others, it takes the
place of their settings.

Exit status: 0 done, 1 failed, 2 bad input.
"""

import json
import os
import shlex
import sys
import threading
import time
from typing import Any, Callable, Sequence

import numpy as np
from absl import flags, logging

from artifacts import distilled_set, run_directory
from configs import base, validation
from data import NPZ_ERRORS, DataError, released, store
from distillation import evaluation, krr
from nodes.client import CoordinatorLost, Stopping
from programs import command_line

# Of evaluating, before the coordinator hears that it is no use; seconds between them.
_TRIES, _PAUSE = 3, 2.0
HEARTBEAT_SECONDS = 5.0  # between two heartbeats
_TOLD_EVERY = 60.0  # seconds between two log lines about heartbeats that do not get through


class Evaluator:
  """Writes one row a snapshot. What it missed while it was away it evaluates when it is back; it
  never holds the others up."""

  def __init__(
    self, coordinator: Any, workdir: str, threads: int, cache: str, stop: threading.Event
  ):
    """
    Args:
      coordinator: a `client.Retrying` coordinator.
      workdir: the run directory.
      threads: CPU threads for the kernel.
      cache: this machine's folder of prepared data.
      stop: set when the process is to stop.
    """
    self._coordinator, self._threads, self._cache, self._stop_event = (
      coordinator,
      threads,
      cache,
      stop,
    )
    self._directory = run_directory.RunDirectory(workdir)

  def run(self) -> None:
    """Evaluates until told to stop. Raises CoordinatorLost where the run's coordinator is not there
    any more."""
    over = threading.Event()
    heart = threading.Thread(
      target=self._send_heartbeats,
      name='heartbeats',
      daemon=True,
      args=(self._coordinator.until(over), over),
    )
    heart.start()
    try:
      self._persevere()
    finally:
      over.set()
      heart.join(HEARTBEAT_SECONDS)

  def _send_heartbeats(self, coordinator: Any, over: threading.Event) -> None:
    """Tells the coordinator, until `over`, that there is somebody to wait for.

    In a thread of its own, because one kernel block may take longer than `system.worker_timeout`.
    """
    while not over.is_set():
      try:
        coordinator.heartbeat('evaluator')
      except Stopping:
        return
      except Exception as error:  # whatever it is: the evaluation goes on; its next call meets it
        logging.log_every_n_seconds(
          logging.WARNING,
          'A heartbeat does not get through: %s: %s',
          _TOLD_EVERY,
          type(error).__name__,
          error,
        )
      over.wait(HEARTBEAT_SECONDS)

  def _persevere(self) -> None:
    for attempt in range(_TRIES):
      try:
        self._follow()
        return
      except Stopping:
        return
      except CoordinatorLost:
        raise
      except Exception as error:
        # Whatever it is: the coordinator must not wait for rows that will not come.
        logging.exception('the evaluator failed')
        if self._stop_event.is_set():
          return
        unwritable = isinstance(error, run_directory.RunDirectoryError)  # after a minute's tries
        if unwritable or attempt + 1 == _TRIES:
          reason = str(error) if unwritable else f'{type(error).__name__}: {error}'
          self._coordinator.report_unusable('evaluator', reason)
          raise
      time.sleep(_PAUSE)

  def _check(self) -> None:
    """Raises Stopping where the process is to stop; evaluations call it now and then."""
    if self._stop_event.is_set():
      raise Stopping()

  def _follow(self) -> None:
    description = json.loads(self._coordinator.describe())
    saved = run_directory.Saved.from_dict(description)
    self._run, self._settings = saved.config.run, saved.config.system.evaluation
    self._prepared = store.fetch(saved.data_key, self._cache, self._coordinator.read_data)
    self._evaluation = evaluation.Evaluation(
      self._run, self._settings, self._prepared, self._threads, self._check
    )
    done = [row['step'] for row in self._directory.read_metrics()]
    if done:  # a kill may have come between a row and what is made of it
      self._decorate("TensorBoard's file of an earlier row", self._write_missing_events)
    if self._run.num_steps in done:
      self._finish()
    while not self._stop_event.is_set():
      answer = self._coordinator.next_snapshot(done)
      if answer and 'stop' in answer:
        return
      if answer:
        if answer['run_id'] != description['run_id']:
          raise CoordinatorLost('another run answers in its place.', was_there=True)
        done.append(answer['step'])
        row = self._try_to_evaluate(answer)
        if row:
          self._keep(answer, row)
          self._coordinator.evaluated(json.dumps(row))

  def _try_to_evaluate(self, snapshot: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a snapshot, or None: one that cannot be evaluated must not cost the others theirs.

    Raises Stopping, and of the last snapshot whatever evaluating it raises.
    """
    try:
      return self._evaluate(snapshot)
    except Stopping:
      raise
    except Exception as error:  # whatever a damaged or odd snapshot raises
      if snapshot['final']:
        raise
      logging.exception(
        'the snapshot of step %d cannot be used (%s); it is not evaluated.', snapshot['step'], error
      )
      return None

  def _evaluate(self, snapshot: dict[str, Any]) -> dict[str, Any]:
    step, images, labels = snapshot['step'], snapshot['images'], snapshot['labels']
    if snapshot['final']:
      distilled = distilled_set.load(
        self._directory.distilled
      )  # what the user gets is what is reported
      images, labels = distilled.images, distilled.labels
    row = {'step': step, **self._evaluation.krr(images, labels), **json.loads(snapshot['metrics'])}
    if step == 0 or snapshot['final'] or step in self._settings.nn_snapshots:
      row.update(self._evaluation.finite_network(images, labels))
    logging.info('evaluated %s', evaluation.in_words(row))
    return row

  def _keep(self, snapshot: dict[str, Any], row: dict[str, Any]) -> None:
    """Writes a row, then what is made of it. Raises RunDirectoryError for the row, Stopping."""
    run_directory.persist(
      f'the row of step {row["step"]} in {self._directory.metrics}',
      lambda: self._directory.append_metrics(row),
      self._stop_event,
    )
    self._decorate(
      f"TensorBoard's file of step {row['step']}",
      lambda: self._write_events(row, snapshot['images'], snapshot['labels']),
    )
    if snapshot['final']:
      self._finish()

  def _finish(self) -> None:
    """Makes what follows the last row, unless it is there: baselines, report. Raises Stopping."""
    if self._settings.baselines and self._directory.read_baselines() is None:
      self._decorate('baselines.json', self._write_baselines, 'the same command')
    told = max(map(_modified, (self._directory.metrics, self._directory.baselines)))
    if _modified(self._directory.report) < told:
      self._decorate('report.html', self._write_report)

  def _decorate(self, what: str, write: Callable[[], None], remedy: str = '') -> None:
    """Calls `write`; what fails there is logged in a line, and costs no row. Raises Stopping.

    Args:
      what: what is written, for the message.
      write: writes it.
      remedy: the command that makes it again; '' for the report's.
    """
    try:
      write()
    except Stopping:
      raise
    except Exception as error:  # Matplotlib, fonts, folders, damaged files: the rows are written
      remedy = remedy or f'python -m artifacts.report --workdir={shlex.quote(self._directory.path)}'
      logging.error(
        '%s is not written (%s: %s). The results are whole; to make it again: %s',
        what,
        type(error).__name__,
        ' '.join(str(error).split()),
        remedy,
      )

  def _write_events(self, row: dict[str, Any], images: np.ndarray, labels: np.ndarray) -> None:
    from artifacts import (
      tensorboard,  # here and below: Matplotlib takes seconds, and may not be there
    )

    tensorboard.write(self._directory, row, images, labels, self._prepared)

  def _write_missing_events(self) -> None:
    from artifacts import tensorboard

    tensorboard.write_missing(self._directory, self._directory.read_metrics(), self._prepared)

  def _write_baselines(self) -> None:
    rows = self._evaluation.baselines(self._run.images_per_class * self._prepared.num_classes)
    path, content = self._directory.baselines, run_directory.json_line(rows, indent=2)
    run_directory.persist(
      path, lambda: run_directory.write_atomically(path, content), self._stop_event
    )

  def _write_report(self) -> None:
    from artifacts import report

    report.write(self._directory, self._directory.read_metrics())


def _modified(path: str) -> float:
  """When a file was written last; before all others where there is none."""
  return os.path.getmtime(path) if os.path.exists(path) else 0.0


def main(argv: Sequence[str]) -> int:
  """Evaluates the file of --dataset; returns the exit status."""
  flags.DEFINE_string(
    'dataset',
    None,
    'Distilled set to evaluate: an .npz file with images and labels, or the name of a released one.',
  )
  flags.DEFINE_bool(
    'baselines',
    False,
    'Evaluate as many real images beside it (also: config.system.evaluation.baselines).',
  )
  flags.DEFINE_bool('json', False, 'Print one line of JSON instead of a table.')
  command_line.log_plainly()
  try:
    command_line.parse(argv, '--dataset=FILE --config=FILE --baselines --json')
    rows = _evaluate_file(flags.FLAGS.dataset, flags.FLAGS.baselines)
  except (command_line.BadInput, validation.ConfigError, DataError) as error:
    print(f'error: {error}', file=sys.stderr)
    return run_directory.BAD_INPUT_STATUS
  except krr.NotPositiveDefiniteError as error:
    print(f'The evaluation failed: {error}', file=sys.stderr)
    return 1
  print(
    json.dumps({'dataset': flags.FLAGS.dataset, 'rows': rows})
    if flags.FLAGS.json
    else _table(flags.FLAGS.dataset, rows)
  )
  return 0


def _evaluate_file(path: str | None, baselines: bool) -> list[dict[str, Any]]:
  if not path:
    raise command_line.BadInput(
      '--dataset=FILE is missing: a distilled.npz, or an .npz file with images and labels.'
    )
  config = (command_line.CONFIG.value or base.get_config()).to_dict()
  cache = store.cache_folder(config['system']['cache_dir'])
  images, labels, settings = _load(path, cache, config['run']['data']['dir'])
  if settings and not command_line.CONFIG.value:
    config['run'].update(settings['run'])
    config['system']['evaluation'].update(settings['evaluation'])
  elif not command_line.CONFIG.value:
    raise command_line.BadInput(
      f'{path!r} holds no settings: give --config=FILE for its data set, preprocessing and architecture.'
    )
  validated = validation.validate(config)
  run, system = validated.run, validated.system
  prepared = store.prepare(run.data, cache)
  validation.validate_image_size(validated, prepared.train_images.shape[1:])
  _check_fit(path, images, labels, settings, prepared)
  threads = system.worker_threads or len(os.sched_getaffinity(0))
  evaluate = evaluation.Evaluation(run, system.evaluation, prepared, threads)
  baselines = baselines or system.evaluation.baselines
  try:
    if baselines:
      evaluate.real_images(len(images))
  except ValueError as error:
    raise command_line.BadInput(f'no baselines for {path!r}: {error}') from error
  logging.info(
    'Evaluating %d images on the %d test images of %s.',
    len(images),
    len(prepared.test_images),
    prepared.name,
  )
  rows = [
    {'kind': 'distilled', **evaluate.krr(images, labels), **evaluate.finite_network(images, labels)}
  ]
  if baselines:
    rows += evaluate.baselines(len(images))
  return rows


def _load(
  path: str, cache: str, folder: str
) -> tuple[np.ndarray, np.ndarray, dict[str, Any] | None]:
  """Images, labels and the settings, of a file that has none None; `cache` and `folder` as for
  `distilled_set.load_released`. Raises DataError."""
  if released.is_name(path):
    distilled = distilled_set.load_released(path, cache, folder)
    return distilled.images, distilled.labels, distilled.settings
  try:
    with open(path, 'rb') as stream, np.lib.npyio.NpzFile(stream, allow_pickle=False) as file:
      if 'settings' not in file:
        return file['images'], file['labels'], None
  except KeyError as error:
    raise DataError(
      f'{path!r} holds no array {error.args[0].split()[0]!r}; expected images [S, H, W, D] and labels [S, C].'
    ) from error
  except NPZ_ERRORS as error:
    raise DataError(
      f'{path!r} is not a readable .npz file without pickled objects: {error}'
    ) from error
  distilled = distilled_set.load(path)
  return distilled.images, distilled.labels, distilled.settings


def _check_fit(
  path: str,
  images: np.ndarray,
  labels: np.ndarray,
  settings: dict[str, Any] | None,
  prepared: store.Prepared,
) -> None:
  """Raises DataError where the distilled set is not one of this data set's."""
  if settings and settings['data']['key'] != prepared.key:
    raise DataError(
      f'{path!r} was distilled from {settings["data"]["name"]} with other content or preprocessing than that of the '
      f'{prepared.name} given here (run.data).'
    )
  size, num_classes = prepared.train_images.shape[1:], prepared.num_classes
  if images.ndim != 4 or images.shape[1:] != size or not len(images):
    raise DataError(
      f'{path!r}: images must be [S, {", ".join(map(str, size))}] for {prepared.name}, got {list(images.shape)}.'
    )
  if labels.shape != (len(images), num_classes):
    raise DataError(
      f'{path!r}: labels must be [{len(images)}, {num_classes}] for {prepared.name}, got {list(labels.shape)}.'
    )
  for name, array in (('images', images), ('labels', labels)):
    if array.dtype.kind != 'f' or not np.isfinite(array).all():
      what = 'NaN or infinity' if array.dtype.kind == 'f' else array.dtype
      raise DataError(f'{path!r}: {name} must be finite floating-point numbers, got {what}.')


def _table(path: str, rows: list[dict[str, Any]]) -> str:
  lines = [f'Test accuracy of {path}', f'{"":30}{"KRR":>10}{"MSE":>10}  finite network']
  for row in rows:
    network = evaluation.network_in_words(row) if 'nn_test_accuracy' in row else 'not trained'
    if row.get('nn_seeds', 1) > 1:
      network += f' ({row["nn_seeds"]} seeds)'
    lines.append(
      f'{row["kind"]:30}{100 * row["krr_test_accuracy"]:8.2f} %{row["krr_test_mse"]:10.5f}  {network}'
    )
    if row.get('nn_selected_on'):
      lines.append(
        f'{"":52}learning-rate factor {row["nn_learning_rate_factor"]:g} and L2 {row["nn_l2"]:g} '
        f'selected on {row["nn_selected_on"]}'
      )
  return '\n'.join(lines)


if __name__ == '__main__':
  command_line.exit_with(main)
