"""Owns the support set and the optimiser's state; serves workers and evaluator.

It runs step after step on what the workers compute, saves checkpoints and snapshots, and ends the
run.
"""

import functools
import hashlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from absl import logging

import kernels.precision  # noqa: F401
from artifacts import RunDirectoryError, files, run_directory
from artifacts.checkpoints import NoGoodCheckpoint
from artifacts.waiting import pause
from configs import validation
from data import DataError, store
from distillation import krr, optimizers, pieces, state, step
from distillation.state import SupportState
from nodes import hardware, messages
from nodes.admission import EVALUATOR, Admission
from nodes.errors import RunFailed, Stopped
from nodes.evaluations import Evaluations
from nodes.exchange import Served
from nodes.keeper import Keeper
from nodes.messages import Life
from nodes.progress import Progress
from nodes.stall import StallWatch
from nodes.task_board import TaskBoard, TaskFailed

T = TypeVar('T')

_MAX_MESSAGE = 2000  # characters of a client's that are kept
# Errors whose message suffices for the user; of others the type is named too.
EXPECTED = (RunFailed, TaskFailed, NoGoodCheckpoint, RunDirectoryError, DataError, OSError)


class Timing(NamedTuple):
  """Intervals, in seconds.

  Attributes:
    poll: between two looks at the stop event while a step waits.
    long_poll: for which a request for work may wait for some.
    linger: for which the finished coordinator stays, to tell its clients to stop.
    stall: without a piece, or a sign of the evaluator, before a warning is logged.
    handover: that another coordinator may take to end.
    disk: how long to wait for room on it.
  """

  poll: float = 0.5
  long_poll: float = 2.0
  linger: float = 10.0
  stall: float = 30.0
  handover: float = run_directory.HANDOVER
  disk: files.Patience = files.PATIENCE


TIMING = Timing()


class Coordinator:
  """The program's only server. Its public methods are RPCs (thread safe); `run` is the program."""

  def __init__(
    self,
    workdir: str,
    cache: str,
    stop: threading.Event,
    progressed: Callable[[bool], None] = lambda lasting: None,
    timing: Timing = TIMING,
  ):
    """Claims the run directory and restores the run.

    Args:
      workdir: run directory with its config.json.
      cache: folder of prepared data, this run's among them.
      stop: set when the process is to stop: the run is then checkpointed and ends as 'stopped'.
      progressed: called with False after each accepted piece, and with True after each checkpoint,
        from which on that progress cannot be lost.
      timing: intervals; tests shorten them.

    Raises:
      RunDirectoryError: another coordinator is at work in `workdir`; nothing there was touched.
      RunFailed: the prepared data are missing. This and every other error is in status.json.
    """
    self._directory = run_directory.RunDirectory(workdir)
    self._cache, self._stop, self._progressed, self._timing = cache, stop, progressed, timing
    self._claim = self._directory.claim(timing.handover)
    generation = 0
    try:
      generation = self._directory.next_generation()
      self._set_up(generation)
    except Exception as error:
      self._directory.write_status(
        run_directory.FAILED,
        message=_in_words(error),
        generation=generation,
        step=self._directory.checkpoint_step() or 0,
      )
      self._claim.close()
      raise

  def _set_up(self, generation: int) -> None:
    """Reads the configuration, opens the data, and restores the state."""
    self._saved = self._directory.read_saved()
    self._run, self._system = run, system = self._saved.config.run, self._saved.config.system
    prepared = store.open_prepared(self._saved.data_key, self._cache)
    if prepared is None:
      raise RunFailed(
        f'the prepared data {self._saved.data_key} are not in {self._cache}; '
        'start the run by launch.py.'
      )
    self.prepared, self._life = prepared, Life(_run_id(self._saved), generation)
    num_support = run.images_per_class * prepared.num_classes
    in_halves = run.plan.split_support(num_support) > 0
    self.board = TaskBoard(system.lease_seconds, system.num_workers, in_halves)
    self._admission = Admission(
      system, lambda *new: self._progress.log_joined(*new), own=hardware.software()
    )
    self._stall = StallWatch(self.board, self._admission, system, self._timing.stall)
    self._progress = Progress(
      self._directory,
      self._saved.config,
      generation,
      self.board,
      self._admission,
      num_support,
      len(prepared.train_images),
      self._timing.stall,
    )
    self.exchange = Served(
      self.board,
      self._life,
      np.dtype(run.kernel_dtype),
      in_halves,
      lambda task: pieces.forms(task, run, prepared.num_classes, prepared.train_images.shape[1:]),
      self._watch,
      self._timing.poll,
    )
    optimizer = optimizers.make(run.optimizer, run.learning_rate)
    self._update = state.Update(run, optimizer)
    self._keeper = Keeper(
      self._directory,
      self._saved.config,
      prepared,
      self._progress,
      self._admission,
      self._stop,
      self._progressed,
      self._timing.disk,
    )
    self._evaluations = Evaluations(
      self._directory,
      self._saved.config,
      self._keeper,
      self._progress,
      self._admission,
      self._stop,
      self._timing.poll,
      self._timing.stall,
    )
    self._over = False
    self._released: set[str] = set()  # clients that have been told to stop
    # Restored before any worker asks: its hardware is compared with that of earlier lives.
    self._first: SupportState | None = self._keeper.restore(
      state.initial(run, prepared, optimizer, self._cache)
    )

  # RPCs of workers.

  def describe(self) -> str:
    """Describes the run, as JSON: `run`, `system`, `data_key`, `run_id`, `generation`."""
    return json.dumps({**self._saved.to_dict(), **self._life._asdict()})

  def read_data(self, folder: str, file: str, offset: int) -> bytes:
    """Reads part of a file of the prepared data; see `store.fetch`."""
    return store.read_chunk(self.prepared.key, self._cache, folder, file, offset)

  def lease(self, worker: str, hello: str) -> dict[str, Any] | None:
    """Leases tasks to an idle worker, waiting briefly if none are ready.

    Args:
      worker: its name.
      hello: see `Admission.admit`.

    Returns:
      None (ask again), `{'stop': reason}`, or `life`, `tasks` [(tuple(task), lease, indices)] and
      `inputs` [packed arrays]: one task to work on, one ahead if there are enough, each with the
      indices of the inputs that are sent with it. These, in the kernel's dtype, are arrays that the
      worker's other tasks are not likely to need: for SUPPORT_VJP its part of the `cotangent` of
      K_ss; in a step of two halves also rows of `images` for SUPPORT_BLOCKS and TARGET_BLOCKS, of
      `alpha` [S, C] and `residual` [T, C] for TARGET_VJP. The rest is fetched.
    """
    refusal = self._admission.admit(worker, hello)
    if refusal:
      return {'stop': refusal}
    if self._over:
      self._released.add(worker)
      return {'stop': 'the run is over.'}
    return self._lease(worker, [])

  def fetch(self, life: list[Any], step: int, name: str, start: int, stop: int) -> bytes | None:
    """Packs rows of an array that the step's tasks share; None if the step is over.

    The array is `images` [S, H, W, D] in the kernel's dtype, or `alpha` [S, C].
    """
    return self.exchange.fetch(Life(*life), step, name, start, stop)

  def complete(
    self,
    worker: str,
    life: list[Any],
    task: list[Any],
    lease: int,
    part: int,
    parts: int,
    data: bytes,
    checksum: bytes,
    holding: list[int],
  ) -> dict[str, Any] | None:
    """Takes one part of a piece, and leases further tasks after the last one. Idempotent.

    Args:
      worker: its name.
      life: of the coordinator that leased the task.
      task: `list(task)`.
      lease: of the task.
      part: index of this part.
      parts: of the piece.
      data: content of this part.
      checksum: of the whole piece.
      holding: leases that the worker still has.

    Returns:
      Further tasks, as from `lease`; None if there are none, and before the last part.

    Raises:
      Malformed: no worker of this version sends that. This one gets no further tasks.
      ValueError: the checksum does not fit.
    """
    self._admission.hear(worker)
    if not self._admission.is_admitted(worker):  # it is another life of the coordinator
      return None
    done = messages.task_from(task)
    try:
      piece = self.exchange.receive(worker, Life(*life), done, lease, part, parts, data, checksum)
    except messages.Malformed as error:
      self._admission.exclude(worker, f'{error}; let all have the same version of this project.')
      self.board.drop(worker)
      raise
    if piece is None:
      return None
    bad = [name for name, array in piece.items() if not np.isfinite(array).all()]
    if bad:
      self.board.report_error(done, lease, f'{bad[0]} contains NaN or infinity')
      return None
    if self.board.complete(done, lease, worker, piece):
      self._progressed(False)
    if self._over or not self._admission.is_admitted(worker):
      return None
    return self._lease(worker, holding)

  def report_task_error(self, worker: str, task: list[Any], lease: int, message: str) -> None:
    """Records that computing a task raised in a worker."""
    message = message[:_MAX_MESSAGE]
    logging.warning('%s: %s', worker, message)
    self.board.report_error(messages.task_from(task), lease, message)

  def report_unusable(self, name: str, message: str) -> None:
    """Records that a worker cannot start, or that the evaluator cannot go on."""
    self._admission.report_unusable(name, message)

  def heartbeat(self, name: str) -> None:
    """Records that a client is alive, even while it computes."""
    self._admission.hear(name)

  # RPCs of the evaluator.

  def next_snapshot(self, done: list[int]) -> dict[str, Any] | None:
    """Reads the first snapshot whose step is not in `done`.

    Returns:
      None (ask again), `{'stop': reason}`, or `run_id`, `step`, `images` [S, H, W, D] and `labels`
      [S, C] (float32), `metrics` (JSON), `final`.
    """
    self._admission.hear(EVALUATOR)
    self._admission.report_usable(EVALUATOR)
    snapshot = self._evaluations.next(done)
    if snapshot is not None:
      return {'run_id': self._life.run_id, **snapshot}
    if self._over:
      self._released.add(EVALUATOR)
      return {'stop': 'the run is over.'}
    self._stop.wait(1.0)
    return None

  def evaluated(self, row: str) -> None:
    """Records a row (JSON) that the evaluator has written."""
    self._evaluations.record(row)

  # The program.

  def run(self) -> None:
    """Distils to the end, or until stopped, and records the outcome in status.json.

    Raises errors that are none of EXPECTED.
    """
    try:
      first, self._first = self._first, None  # so that its memory is freed after the first step
      assert first is not None, 'run() is called once'
      self._distil(first)
      self._progress.write_status(run_directory.FINISHED, self._progress.reached)
    except Stopped as error:
      message = {'message': str(error)} if str(error) else {}
      self._progress.write_status(run_directory.STOPPED, self._keeper.saved_step, **message)
      reason = f': {error}' if message else ''
      logging.info('Stopped at step %d, checkpointed%s.', self._keeper.saved_step, reason)
    except Exception as error:
      message = _in_words(error)
      logging.error('The run failed: %s', message)
      self._progress.write_status(
        run_directory.FAILED, max(self._keeper.saved_step, 0), message=message
      )
      if not isinstance(error, EXPECTED):
        raise
    finally:
      self._claim.close()
      self._release()

  def _distil(self, current: SupportState) -> None:
    num_steps = self._run.num_steps
    if current.step > num_steps:
      raise RunFailed(f'the checkpoint is at step {current.step}, past run.num_steps={num_steps}.')
    logging.info(
      '%s: %d support images, %d targets a step, steps %d to %d.',
      self._run.method,
      len(current.images),
      self._run.targets_per_step,
      current.step,
      num_steps,
    )
    while True:
      try:
        row, following = self._step(current)
      except Stopped:
        self._keeper.save(current)
        raise
      if self._system.is_snapshot(current.step, num_steps):
        self._keeper.save(current)  # first, so that no run resumes before a step it has shown
        self._keeper.write_snapshot(current, row)
      self._progress.log_step(current.step, row)
      if following is None:
        break
      current, following = self._checked(current.step, following), None  # frees what it was made of
      self._progress.reach(current.step)
      if self._keeper.is_checkpoint_due():
        self._keeper.save(current)
    self.board.clear()
    self._progress.end()
    self._evaluations.wait()

  def _step(
    self, current: SupportState
  ) -> tuple[dict[str, Any], Callable[[], SupportState] | None]:
    """Computes the metrics of a state and, unless it is the last, all that its update needs.

    Returns:
      The row of metrics; a function that makes the next state, or None. It is called after this
      state's snapshot is written.
    """
    run, solve_step = self._run, self._run.label_solve_step
    is_last = current.step == run.num_steps
    began, pairs = time.monotonic(), self.board.pairs_taken
    arguments, following = (current, run, self.prepared, self.exchange), None
    # The last state of a run that ends with Label Solve is measured by the loss that was minimised.
    if current.step == solve_step or (is_last and current.step == solve_step + 1):
      rounds = self._keeper.rounds(current)
      metrics, labels = self._checked(
        current.step, lambda: step.label_solve(*arguments, *rounds, with_labels=not is_last)
      )
      if labels is not None:
        following = functools.partial(current._replace, step=current.step + 1, labels=labels)
    else:
      metrics, gradient = self._checked(
        current.step, lambda: step.loss_and_gradient(*arguments, with_gradient=not is_last)
      )
      if gradient is not None:
        following = functools.partial(self._update, current, gradient)
    accuracy = {} if metrics.accuracy is None else {'train_accuracy': metrics.accuracy}
    return {
      'train_loss': metrics.loss,
      **accuracy,
      'wall_seconds': self._progress.reached_seconds,
      'kernel_pairs_per_second': (self.board.pairs_taken - pairs) / (time.monotonic() - began),
    }, following

  def _checked(self, step: int, function: Callable[[], T]) -> T:
    """Calls `function`. Raises RunFailed, naming the step, where the run has diverged."""
    try:
      return function()
    except (krr.NotPositiveDefiniteError, state.Diverged) as error:
      raise RunFailed(f'step {step}: {error}') from error

  def _watch(self, waited: bool) -> None:
    """Is called before every wait for a piece, with whether the last wait ended without it."""
    if self._stop.is_set():
      raise Stopped()
    if waited:
      self._stall.check(self._progress.reached)
    if self._progress.is_status_due():
      self._progress.write_status(run_directory.RUNNING, self._progress.reached)

  def _lease(self, worker: str, holding: list[int]) -> dict[str, Any] | None:
    rate = self._admission.rate(worker)
    return self.exchange.lease(worker, rate, holding, self._timing.long_poll)

  # The end.

  def _release(self) -> None:
    """Stays until all clients know that the run is over, unless it was only stopped."""
    if self._stop.is_set():
      return
    self._over = True
    end = time.monotonic() + self._timing.linger
    while time.monotonic() < end and not self._stop.is_set():
      if self._admission.heard_of(self._timing.linger) <= self._released:
        return
      pause(0.05, self._stop)


def _run_id(saved: run_directory.Saved) -> str:
  """Names a run by all that its results depend on."""
  irrelevant = 'run.num_steps', 'run.data.dir'
  fields = validation.flatten({'run': saved.to_dict()['run']})
  named = {path: value for path, value in fields.items() if path not in irrelevant}
  content = json.dumps([saved.data_key, named], sort_keys=True)
  return hashlib.sha256(content.encode()).hexdigest()[:16]


def _in_words(error: Exception) -> str:
  return str(error) if isinstance(error, EXPECTED) else f'{type(error).__name__}: {error}'
