"""The evaluator: KRR and finite-network accuracy of each snapshot on the whole test set.

It asks the coordinator for snapshots, and writes a row of metrics.jsonl for each, then what is made
of the rows: TensorBoard's files, baselines, report.
"""

import json
import os
import shlex
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging

from artifacts import RunDirectoryError, distilled_set, files, run_directory, waiting
from data import store
from distillation import evaluation
from nodes.client import CoordinatorLost, Stopping

_NAME = 'evaluator'
_TRIES = 3  # before the coordinator is told that there will be no evaluation
_WARNING_SECONDS = 60.0  # between two warnings of heartbeats that do not get through


class Evaluator:
  """Writes one row a snapshot, also of those that were made while it was away.

  It never holds the other nodes up.
  """

  def __init__(
    self,
    coordinator: Any,
    workdir: str,
    threads: int,
    cache: str,
    stop: threading.Event,
    pause: float = 2.0,
    heartbeat_seconds: float = 5.0,
    patience: files.Patience = files.PATIENCE,
  ):
    """
    Args:
      coordinator: a `client.Retrying` coordinator.
      workdir: the run directory.
      threads: CPU threads for the kernel.
      cache: this machine's folder of prepared data.
      stop: set when the process is to stop.
      pause: seconds between a failure and the next try.
      heartbeat_seconds: seconds between two heartbeats.
      patience: with disks that are full.
    """
    self._coordinator, self._stop = coordinator, stop
    self._threads, self._cache = threads, cache
    self._pause, self._heartbeat_seconds = pause, heartbeat_seconds
    self._directory, self._patience = run_directory.RunDirectory(workdir), patience

  def run(self) -> None:
    """Evaluates until the run is over or the process is to stop.

    Raises CoordinatorLost where the run's coordinator does not answer any more.
    """
    over = threading.Event()
    heartbeats = threading.Thread(
      target=self._send_heartbeats,
      name='heartbeats',
      daemon=True,
      args=(self._coordinator.until(over), over),
    )
    heartbeats.start()
    try:
      self._try_to_follow()
    finally:
      over.set()
      heartbeats.join(self._heartbeat_seconds)

  def _send_heartbeats(self, coordinator: Any, over: threading.Event) -> None:
    """Tells the coordinator that the evaluator is alive, until `over`.

    In a thread of its own, because one kernel block may take longer than `system.worker_timeout`.
    """
    while not over.is_set():
      try:
        coordinator.heartbeat(_NAME)
      except Stopping:
        return
      except Exception as error:  # the evaluation goes on; its own next call will meet the error
        logging.log_every_n_seconds(
          logging.WARNING,
          'A heartbeat does not get through: %s: %s',
          _WARNING_SECONDS,
          type(error).__name__,
          error,
        )
      over.wait(self._heartbeat_seconds)

  def _try_to_follow(self) -> None:
    """Follows the coordinator, and starts over after errors; reports the last one and raises it."""
    for attempt in range(_TRIES):
      try:
        self._follow()
        return
      except Stopping:
        return
      except CoordinatorLost:
        raise
      except Exception as error:  # else the coordinator would wait for rows that never come
        logging.exception('the evaluator failed')
        if self._stop.is_set():
          return
        unwritable = isinstance(error, RunDirectoryError)  # after many tries
        if unwritable or attempt + 1 == _TRIES:
          reason = str(error) if unwritable else f'{type(error).__name__}: {error}'
          self._coordinator.report_unusable(_NAME, reason)
          raise
      waiting.pause(self._pause, self._stop)

  def _follow(self) -> None:
    """Evaluates snapshots until the run is over or the process is to stop."""
    description = json.loads(self._coordinator.describe())
    saved = run_directory.Saved.from_dict(description)
    prepared = store.fetch(saved.data_key, self._cache, self._coordinator.read_data)
    run, settings = saved.config.run, saved.config.system.evaluation
    evaluate = evaluation.Evaluation(run, settings, prepared, self._threads, self._check)
    results = _Results(self._directory, saved, prepared, evaluate, self._stop, self._patience)
    done = results.steps()
    if done:  # a kill may have come after a row, but before what is made of it
      results.write_missing_events()
    if run.num_steps in done:
      results.finish()
    while not self._stop.is_set():
      snapshot = self._coordinator.next_snapshot(done)
      if not snapshot:
        continue
      if 'stop' in snapshot:
        return
      if snapshot['run_id'] != description['run_id']:
        raise CoordinatorLost('another run answers in its place.')
      done.append(snapshot['step'])
      row = self._try_to_evaluate(evaluate, snapshot, snapshot['step'] in settings.nn_snapshots)
      if row:
        results.keep(row, snapshot['images'], snapshot['labels'])
        if snapshot['final']:
          results.finish()
        self._coordinator.evaluated(json.dumps(row))

  def _check(self) -> None:
    """Raises Stopping where the process is to stop; evaluations call it now and then."""
    if self._stop.is_set():
      raise Stopping()

  def _try_to_evaluate(
    self, evaluate: evaluation.Evaluation, snapshot: dict[str, Any], trains_network: bool
  ) -> dict[str, Any] | None:
    """The row of a snapshot; None where it cannot be evaluated, which must not cost other rows.

    Raises Stopping, and for the last snapshot whatever evaluating it raises.
    """
    try:
      return self._evaluate(evaluate, snapshot, trains_network)
    except Stopping:
      raise
    except Exception as error:  # a damaged or odd snapshot may raise anything
      if snapshot['final']:
        raise
      logging.exception(
        'the snapshot of step %d cannot be used (%s); it is not evaluated.', snapshot['step'], error
      )
      return None

  def _evaluate(
    self, evaluate: evaluation.Evaluation, snapshot: dict[str, Any], trains_network: bool
  ) -> dict[str, Any]:
    """The row of a snapshot; networks are trained at both ends of a run, and on demand."""
    step, images, labels = snapshot['step'], snapshot['images'], snapshot['labels']
    if snapshot['final']:  # what is reported is the file that users get
      distilled = distilled_set.load(self._directory.distilled)
      images, labels = distilled.images, distilled.labels
    row = {'step': step, **evaluate.krr(images, labels), **json.loads(snapshot['metrics'])}
    if step == 0 or snapshot['final'] or trains_network:
      row.update(evaluate.finite_network(images, labels))
    logging.info('evaluated %s', evaluation.in_words(row))
    return row


class _Results:
  """Writes rows, which must succeed, and what is made of them, which may fail."""

  def __init__(
    self,
    directory: run_directory.RunDirectory,
    saved: run_directory.Saved,
    prepared: store.Prepared,
    evaluate: evaluation.Evaluation,
    stop: threading.Event,
    patience: files.Patience,
  ):
    self._directory, self._config, self._prepared = directory, saved.config, prepared
    self._evaluate, self._stop, self._patience = evaluate, stop, patience

  def steps(self) -> list[int]:
    """Steps that have a row."""
    return [row['step'] for row in self._directory.read_metrics()]

  def keep(self, row: dict[str, Any], images: np.ndarray, labels: np.ndarray) -> None:
    """Writes a row, then TensorBoard's file of it with images [S, H, W, D] and labels [S, C].

    Raises RunDirectoryError where the row cannot be written, and Stopping.
    """
    self._persist(
      f'the row of step {row["step"]} in {self._directory.metrics}',
      lambda: self._directory.append_metrics(row),
    )

    def write_events():
      from artifacts import tensorboard  # here and below: Matplotlib takes seconds, or is missing

      tensorboard.write(self._directory, row, (images, labels), self._prepared)

    self._attempt(f"TensorBoard's file of step {row['step']}", write_events)

  def write_missing_events(self) -> None:
    """Writes TensorBoard's files that rows lack. Raises Stopping."""

    def write_missing():
      from artifacts import tensorboard

      tensorboard.write_missing(self._directory, self._directory.read_metrics(), self._prepared)

    self._attempt("TensorBoard's file of an earlier row", write_missing)

  def finish(self) -> None:
    """Writes what follows the last row, unless it is there: baselines, report. Raises Stopping."""
    directory = self._directory
    if self._config.system.evaluation.baselines and directory.read_baselines() is None:
      self._attempt('baselines.json', self._write_baselines, 'the same command')
    if _modified(directory.report) < max(
      _modified(directory.metrics), _modified(directory.baselines)
    ):
      self._attempt('report.html', self._write_report)

  def _write_baselines(self) -> None:
    size = self._config.run.images_per_class * self._prepared.num_classes
    content = files.json_line(self._evaluate.baselines(size), indent=2)
    path = self._directory.baselines
    self._persist(path, lambda: files.write_atomically(path, content))

  def _write_report(self) -> None:
    from artifacts import report

    report.write(self._directory, self._directory.read_metrics())

  def _persist(self, what: str, write: Callable[[], None]) -> None:
    files.persist(what, write, self._stop, self._patience)

  def _attempt(self, what: str, write: Callable[[], None], remedy: str = '') -> None:
    """Calls `write`; an error becomes a line of the log. Raises Stopping.

    Args:
      what: the file's name, for the message.
      write: writes it.
      remedy: the command that writes it again; '' for the report's.
    """
    try:
      write()
    except Stopping:
      raise
    except Exception as error:  # Matplotlib, fonts, folders, damaged files: the rows are written
      remedy = remedy or f'python -m programs.report --workdir={shlex.quote(self._directory.path)}'
      logging.error(
        '%s is not written (%s: %s). The results are whole; to make it again: %s',
        what,
        type(error).__name__,
        ' '.join(str(error).split()),
        remedy,
      )


def _modified(path: str) -> float:
  """When a file was written last, in seconds; 0 where there is none."""
  return os.path.getmtime(path) if os.path.exists(path) else 0.0
