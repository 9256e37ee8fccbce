"""Owns the support set and the optimiser's state, cuts every update (KIP's or Label Solve) into
tasks, sums the pieces in plan order, checkpoints, and ends the run."""

import datetime
import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

import kernels.precision  # noqa: F401
from artifacts import distilled_set, files, run_directory, snapshots
from artifacts.checkpoints import Checkpoints, NoGoodCheckpoint, SupportState
from configs import schema, validation
from data import DataError, sampling, store
from distillation import initial_support, krr, label_solve, optimizers
from nodes import tasks
from nodes.task_board import TaskBoard, TaskFailed

_POLL = 0.5  # seconds between looks at the stop event while a phase runs
_LONG_POLL = 2.0  # seconds a request for work may wait for some
_IN_HAND = 2  # tasks that a worker may have: one in work and one ahead
_EVALUATOR = 'evaluator'
_LINGER = 10.0  # seconds the finished coordinator stays to tell the others to stop
_STALL = 30.0  # seconds without a piece that are worth a word
_STATUS_SECONDS = 5.0  # at most so long between two writings of status.json
_DIVERGED = 1e6  # a training loss of predictions that have nothing to do with labels in [-1, 1]


class RunFailed(RuntimeError):
  """The run cannot go on; the message is one line for the user."""


class _Stopped(Exception):
  """The process was asked to stop; with a message, the run stops for a reason of its own."""


# Errors whose message is for the user, without their type.
EXPECTED = (
  RunFailed,
  TaskFailed,
  NoGoodCheckpoint,
  run_directory.RunDirectoryError,
  krr.NotPositiveDefiniteError,
  DataError,
  OSError,
)


class Metrics(NamedTuple):
  """What a step tells of the state it started from: mean over the step's targets; pairs of the
  whole step a second.

  Label Solve's targets are the whole training set, and it does not come to know its accuracy.
  """

  train_loss: float
  train_accuracy: float | None
  wall_seconds: float
  kernel_pairs_per_second: float


class Gradient(NamedTuple):
  """Of the loss: float64 images [S, H, W, D], labels [S, C]."""

  images: np.ndarray
  labels: np.ndarray


def initial_state(
  run: schema.Run,
  prepared: store.Prepared,
  optimizer: optax.GradientTransformation,
  cache: str = '',
) -> SupportState:
  """Step 0; `cache` is the folder that keeps released sets. Raises DataError."""
  images, labels = initial_support.make(run, prepared, cache)
  return SupportState(
    0, images, labels, jax.device_get(optimizer.init(_parameters(run, images, labels)))
  )


def pairs_per_step(run: schema.Run, num_support: int) -> int:
  """Kernel entries of one step of KIP: forward and vjp count once where a task does both, else
  each."""
  targets = (
    (tasks.TARGET_BLOCKS, tasks.TARGET_VJP)
    if run.plan.split_support(num_support)
    else (tasks.TARGETS,)
  )
  return sum(
    (t[1] - t[0]) * (s[1] - s[0])
    for phase in (tasks.SUPPORT_BLOCKS, *targets, tasks.SUPPORT_VJP)
    for t, s in _plan(run, phase, num_support)
  )


def pairs_to_go(run: schema.Run, num_support: int, num_targets: int, step: int) -> int:
  """Kernel entries of the updates from `step` on, with `num_targets` training images; Label Solve's
  are forward alone."""
  solves = run.label_solve_step >= step
  return (run.num_steps - step - solves) * pairs_per_step(
    run, num_support
  ) + solves * num_support * num_targets


class Coordinator:
  """The program's only server. Its public methods are RPCs (thread safe); `run` is the program."""

  def __init__(
    self,
    workdir: str,
    cache: str,
    stop: threading.Event,
    progressed: Callable[[bool], None] = lambda lasting: None,
    patience: files.Patience = files.PATIENCE,
    handover: float = run_directory.HANDOVER,
  ):
    """
    Args:
      workdir: run directory with its config.json.
      cache: folder of prepared data that has this run's.
      stop: set when the process is to stop: the run is then checkpointed and ends as 'stopped'.
      progressed: called with False after each piece that is accepted, and with True after each
        checkpoint, which makes progress last.
      patience: with disks that are full.
      handover: seconds to wait for another coordinator to end.

    Raises:
      RunDirectoryError: another coordinator is at work in `workdir`; nothing there was touched.
      RunFailed: and any other error, which status.json tells of then.
    """
    self._start = time.monotonic()
    self._directory = run_directory.RunDirectory(workdir)
    self._claim, self._patience = self._directory.claim(handover), patience
    self._generation = 0
    try:
      self._generation = self._directory.next_generation()
      self._set_up(cache, stop, progressed)
    except Exception as error:
      self._directory.write_status(
        run_directory.FAILED,
        message=_in_words(error),
        generation=self._generation,
        step=self._directory.checkpoint_step() or 0,
      )
      self._claim.close()
      raise

  def _set_up(self, cache: str, stop: threading.Event, progressed: Callable[[bool], None]) -> None:
    """Reads the configuration and opens the data; initialises all state."""
    self._progressed = progressed
    self._saved = self._directory.read_saved()
    self._run, self._system = self._saved.config.run, self._saved.config.system
    self._cache, self._stop_event = cache, stop
    self._prepared = store.open_prepared(self._saved.data_key, cache)
    if self._prepared is None:
      raise RunFailed(
        f'the prepared data {self._saved.data_key} are not in {cache}; start the run by launch.py.'
      )
    self._board = TaskBoard(self._system.lease_seconds)
    self._checkpoints = Checkpoints(self._directory.checkpoints)
    self._rounds: SupportState | None = None  # of Label Solve, see _target_factor
    self._optimizer = optimizers.make(self._run.optimizer, self._run.learning_rate)
    self._update = jax.jit(self._updated)
    self._dtype = np.dtype(self._run.kernel_dtype)
    self._run_id = _run_id(self._saved)
    self._lock = threading.Lock()
    self._inputs: dict[str, np.ndarray] = {}  # of the current step, what workers fetch
    self._sent: dict[tuple[str, int, int], bytes] = {}  # rows of it, packed
    self._step = -1
    # Lease -> part -> content, of pieces that are still arriving.
    self._parts: dict[int, dict[int, bytes]] = {}
    self._arrived: set[int] = set()  # leases of the current step whose piece is complete
    self._fingerprint: dict[str, str] | None = None
    self._clients: dict[str, float] = {}  # when each was last heard
    self._released: set[str] = set()  # who has been told to stop
    self._rates: dict[str, float] = {}
    self._hellos: dict[str, str] = {}  # with which each was welcomed
    self._broken: dict[str, str] = {}  # who could not start or go on, and why
    self._damaged: set[int] = set()  # snapshots that cannot be read
    self._over = False
    self._evaluated = threading.Event()
    self._last_row: dict[str, Any] | None = None
    self._progress: dict[str, Any] = {}  # of the last progress line
    self._end: float | None = None  # when the last update was computed
    self._earlier_seconds = 0.0
    self._reached: tuple[int, float] = 0, 0.0  # step the run has come to, `wall_seconds` then
    self._next_status = 0.0
    self._next_log = self._next_checkpoint = 0.0
    self._next_stall = _STALL
    self._saved_step = -1
    self._pairs = 0
    # Before any worker asks: it is checked against what the run was computed by so far.
    self._state: SupportState | None = self._restore()

  # RPCs of workers.

  def describe(self) -> str:
    """The run, as JSON: `run`, `system`, `data_key`, `run_id`, `generation`."""
    return json.dumps(
      {**self._saved.to_dict(), 'run_id': self._run_id, 'generation': self._generation}
    )

  def read_data(self, folder: str, file: str, offset: int) -> bytes:
    """Part of a file of the prepared data; see `store.fetch`."""
    return store.read_chunk(self._prepared.key, self._cache, folder, file, offset)

  def lease(self, worker: str, hello: str) -> dict[str, Any] | None:
    """Work for who has none: within a few seconds.

    Args:
      worker: its name.
      hello: JSON with the worker's `fingerprint` {name: value} and measured `pairs_per_second`.

    Returns:
      None (ask again), `{'stop': reason}`, or `{'tasks': [(tuple(Task), lease id, indices)],
      'inputs': [packed arrays]}`, so many tasks that the worker has one in work and another ahead,
      where there is enough to do. The inputs, in the kernel's dtype, are what tasks of other
      answers are not likely to need: in a step of two halves, for SUPPORT_BLOCKS and TARGET_BLOCKS
        its `images`, for TARGET_VJP its rows of
      `alpha` [S, C] and of the `residual` [T, C]; in any, for SUPPORT_VJP its part of the
      `cotangent` of K_ss.
    """
    if self._hellos.get(worker) != hello:
      refusal = self._greet(worker, json.loads(hello))
      if refusal:
        return {'stop': refusal}
      self._hellos[worker] = hello
    self._clients[worker] = time.monotonic()
    if self._over:
      self._released.add(worker)
      return {'stop': 'the run is over.'}
    return self._lease(worker, [])

  def fetch(self, generation: int, step: int, name: str, start: int, stop: int) -> bytes | None:
    """Packed rows of what the step's tasks share: `images` [S, H, W, D] in the kernel's dtype,
    `alpha` [S, C]. None if the step is over."""
    with self._lock:
      return (
        self._packed(name, start, stop)
        if (generation, step) == (self._generation, self._step)
        else None
      )

  def complete(
    self,
    worker: str,
    task: list[Any],
    lease: int,
    part: int,
    parts: int,
    data: bytes,
    checksum: bytes,
    holding: list[int],
  ) -> dict[str, Any] | None:
    """Takes part `part` of `parts` of a piece (`tasks.encode`), each with the whole piece's
    checksum. Idempotent.

    Returns:
      More work, as `lease` does for who is then `holding` these, if this part was the last and
      there is some; else None. Who holds none waits for it for a few seconds.
    """
    task = _task(task)
    self._clients[worker] = time.monotonic()
    with self._lock:
      if (task.run_id, task.generation, task.step) != (
        self._run_id,
        self._generation,
        self._step,
      ) or lease in self._arrived:
        return None
      received = self._parts.setdefault(lease, {})
      received[part] = data
      if len(received) < parts:
        return None
      del self._parts[lease]
      self._arrived.add(lease)
    piece = tasks.decode([received[i] for i in range(parts)], checksum)
    bad = [name for name, array in piece.items() if not np.isfinite(array).all()]
    if bad:
      self._board.fail(task, lease, f'{bad[0]} contains NaN or infinity')
      return None
    if self._board.complete(task, lease, worker, piece):
      self._progressed(False)
    return self._lease(worker, holding) if worker in self._hellos and not self._over else None

  def fail(self, worker: str, task: list[Any], lease: int, message: str) -> None:
    """Takes note of an error in a worker."""
    logging.warning('%s: %s', worker, message)
    self._board.fail(_task(task), lease, message)

  def broken(self, name: str, message: str) -> None:
    """Takes note that a worker cannot start, or that the evaluator cannot go on."""
    logging.warning('%s cannot work: %s', name, message)
    with self._lock:
      self._broken[name] = message

  def heartbeat(self, name: str) -> None:
    """A client is alive, whatever it is busy with."""
    self._clients[name] = time.monotonic()

  # RPCs of the evaluator.

  def next_snapshot(self, done: list[int]) -> dict[str, Any] | None:
    """The first snapshot whose step is not in `done`.

    Returns:
      None (ask again), `{'stop': reason}`, or `run_id`, `step`, `images` [S, H, W, D] and `labels`
      [S, C] (float32), `metrics` (JSON), `final`.
    """
    self._clients[_EVALUATOR] = time.monotonic()
    with self._lock:
      self._broken.pop(_EVALUATOR, None)
    for step in self._snapshots_to_evaluate():
      if step not in done:
        snapshot = self._read_snapshot(step)
        if snapshot is not None:
          return snapshot
    if self._run.num_steps in done:
      self._evaluated.set()
    if self._over:
      self._released.add(_EVALUATOR)
      return {'stop': 'the run is over.'}
    self._stop_event.wait(1.0)
    return None

  def evaluated(self, row: str) -> None:
    """Takes note of a row (JSON) that the evaluator has written."""
    self._last_row = json.loads(row)
    if self._last_row['step'] == self._run.num_steps:
      self._evaluated.set()

  def _snapshots_to_evaluate(self) -> list[int]:
    """Steps of the snapshots that are there and not known to be damaged."""
    return [
      step
      for step in snapshots.steps(self._directory)
      if step <= self._run.num_steps and step not in self._damaged
    ]

  def _read_snapshot(self, step: int) -> dict[str, Any] | None:
    final = step == self._run.num_steps
    try:
      snapshot = snapshots.read(self._directory, step)
      return {
        'run_id': self._run_id,
        'step': step,
        'images': snapshot.images,
        'labels': snapshot.labels,
        'metrics': json.dumps(snapshot.metrics),
        'final': final,
      }
    except DataError as error:
      message = f'{error}; it is not evaluated.'
      logging.warning(message)
      self._damaged.add(step)
      if final:
        with self._lock:
          self._broken[_EVALUATOR] = message
      return None

  # The program.

  def run(self) -> None:
    """Distils to the end, or until stopped; whatever happens, status.json tells."""
    try:
      state, self._state = self._state, None  # the first one is not kept beside the others
      self._distil(state)
      self._write_status(run_directory.FINISHED, self._reached[0])
    except _Stopped as error:
      message = {'message': str(error)} if str(error) else {}
      self._write_status(run_directory.STOPPED, self._saved_step, **message)
      logging.info(
        'Stopped at step %d, checkpointed%s.', self._saved_step, f': {error}' if message else ''
      )
    except EXPECTED as error:
      self._fail(str(error))
    except Exception as error:
      self._fail(_in_words(error))
      raise
    finally:
      self._claim.close()
      self._release()

  def _restore(self) -> SupportState:
    template = initial_state(self._run, self._prepared, self._optimizer, self._cache)
    restored = self._checkpoints.restore(template)
    if restored is None:
      self._reached = 0, self._wall_seconds()
      self._write_status(run_directory.RUNNING, 0)
      return template
    state, meta = restored
    self._earlier_seconds, self._fingerprint = meta['wall_seconds'], meta['fingerprint']
    self._saved_step = state.step
    self._reached = state.step, meta.get('reached_seconds', meta['wall_seconds'])
    self._write_status(run_directory.RUNNING, state.step)
    logging.info('Resuming at step %d.', state.step)
    return state

  def _distil(self, state: SupportState) -> SupportState:
    num_steps = self._run.num_steps
    if state.step > num_steps:
      raise RunFailed(f'the checkpoint is at step {state.step}, past run.num_steps={num_steps}.')
    logging.info(
      '%s: %d support images, %d targets a step, steps %d to %d.',
      self._run.method,
      len(state.images),
      self._run.targets_per_step,
      state.step,
      num_steps,
    )
    solve_step = self._run.label_solve_step
    while True:
      try:
        if state.step == solve_step or state.step == num_steps == solve_step + 1:
          metrics, solved = self._label_solve(state, with_labels=state.step < num_steps)
        else:
          metrics, gradient = self._loss_and_gradient(state, with_gradient=state.step < num_steps)
      except _Stopped:
        self._save(state)
        raise
      if self._system.is_snapshot(state.step, num_steps):
        self._save(state)  # first: no snapshot is of a step that the run could fall behind
        self._write_snapshot(state, metrics)
      self._log(state, metrics)
      if state.step == num_steps:
        break
      state = (
        self._move(state, gradient)
        if state.step != solve_step
        else state._replace(step=state.step + 1, labels=solved)
      )
      self._reached = state.step, self._wall_seconds()
      if time.monotonic() >= self._next_checkpoint:
        self._save(state)
    self._await_evaluation()
    return state

  def _loss_and_gradient(
    self, state: SupportState, with_gradient: bool = True
  ) -> tuple[Metrics, Gradient | None]:
    """One pass of DESIGN 1.1's split: K_ss, solve, all targets (loss and cotangents), the vjp of
    K_ss."""
    started, pairs = time.monotonic(), self._pairs
    two_halves = self._run.plan.split_support(len(state.images)) > 0
    metrics, gradient = (self._two_halves if two_halves else self._one_pass)(state, with_gradient)
    rate = (self._pairs - pairs) / (time.monotonic() - started)
    return metrics._replace(kernel_pairs_per_second=rate), gradient

  def _one_pass(self, state: SupportState, with_gradient: bool) -> tuple[Metrics, Gradient | None]:
    """All that a group of targets contributes comes in one piece; its gradient is of all support
    images."""
    num_support = len(state.images)
    _, solution = self._solution(state)
    self._publish('alpha', solution.alpha)
    loss, correct, alpha_bar = 0.0, 0, np.zeros_like(solution.alpha)
    gradient = np.zeros_like(state.images)
    for _, piece in self._phase(tasks.TARGETS, num_support):
      loss += float(piece['loss'])
      correct += int(piece['correct'])
      alpha_bar += piece['alpha_bar']
      gradient += piece['gradient']
    metrics = self._metrics(loss, correct)
    if not with_gradient:
      return metrics, None
    cotangent, label_gradient = krr.pull_back(solution, alpha_bar)
    self._publish('cotangent', cotangent)
    for (_, (r0, r1)), piece in self._phase(tasks.SUPPORT_VJP, num_support):
      gradient[r0:r1] += piece['gradient']
    return metrics, Gradient(gradient, label_gradient)

  def _two_halves(
    self, state: SupportState, with_gradient: bool
  ) -> tuple[Metrics, Gradient | None]:
    """Blocks of K_ss and K_ts come in, residuals go out and gradients of parts of the support come
    in. A group of targets goes on to its second half as soon as its rows are whole, so that nobody
    waits for everybody but at the end of a step."""
    num_support = len(state.images)
    self._begin(state)
    support, blocks, pull_backs = (
      self._tasks(phase, num_support)
      for phase in (tasks.SUPPORT_BLOCKS, tasks.TARGET_BLOCKS, tasks.TARGET_VJP)
    )
    # Nothing can be solved without K_ss, so its tasks are the first of their workers; but many
    # images are sent for them, so those of the other workers, who all wait, go out before.
    early = _IN_HAND * (max(0, self._system.num_workers - len(support)) // 2)
    late = blocks[early:]
    self._board.post(
      [
        *blocks[:early],
        *itertools.chain(*zip(support, late)),
        *support[len(late) :],
        *late[len(support) :],
      ]
    )
    batch = sampling.targets(
      self._run.seed, state.step, self._prepared.train_labels, self._run.targets_per_step
    )
    y_t = sampling.centred_one_hot(self._prepared.train_labels[batch], self._prepared.num_classes)
    solution = self._solve(state, self._k_ss(support, num_support))
    residual, alpha_bar = np.empty_like(y_t, self._dtype), np.zeros_like(solution.alpha)
    self._publish('alpha', solution.alpha.astype(self._dtype))
    self._publish('residual', residual)
    loss, correct = 0.0, 0
    ranges = sum(task.target_range == blocks[0].target_range for task in blocks)
    for first in range(0, len(blocks), ranges):
      group, pieces, predictions = slice(*blocks[first].target_range), [], 0.0
      for task in blocks[first : first + ranges]:
        pieces.append(self._piece(task)['block'])
        predictions += krr.predictions(pieces[-1], solution.alpha[slice(*task.support_range)])
      part = krr.residual(predictions, y_t[group], len(batch))
      residual[group] = part.scaled
      loss += part.loss
      correct += part.correct
      for task, block in zip(blocks[first:], pieces):
        alpha_bar[slice(*task.support_range)] += krr.alpha_bar(block, part.scaled)
      if with_gradient and first + ranges < len(blocks):
        self._board.extend(pull_backs[first : first + ranges], first=True)
    metrics = self._metrics(loss, correct)
    if not with_gradient:
      return metrics, None
    cotangent, label_gradient = krr.pull_back(solution, alpha_bar)
    self._publish('cotangent', cotangent)
    support = self._tasks(tasks.SUPPORT_VJP, num_support)
    self._board.extend([*support, *pull_backs[-ranges:]], first=True)
    pull_backs += support
    gradient = np.zeros_like(state.images)
    for task in pull_backs:
      gradient[slice(*task.support_range)] += self._piece(task)['gradient']
    return metrics, Gradient(gradient, label_gradient)

  def _metrics(self, loss: float, correct: int) -> Metrics:
    if not loss <= _DIVERGED:
      raise RunFailed(
        f'step {self._step}: the training diverges, its loss is {loss:.3g}; lower run.learning_rate or raise run.ridge.'
      )
    return Metrics(loss, correct / self._run.targets_per_step, self._reached[1], 0.0)

  def _begin(self, state: SupportState) -> None:
    """From here on, this step is the one that workers may ask for."""
    with self._lock:
      self._step, self._inputs, self._sent = (
        state.step,
        {'images': state.images.astype(self._dtype)},
        {},
      )
      self._parts, self._arrived = {}, set()

  def _solution(self, state: SupportState) -> tuple[np.ndarray, krr.Solution]:
    """Starts the step: K_ss and its solve."""
    self._begin(state)
    support = self._tasks(tasks.SUPPORT_BLOCKS, len(state.images))
    self._board.post(support)
    k_ss = self._k_ss(support, len(state.images))
    return k_ss, self._solve(state, k_ss)

  def _k_ss(self, support: list[tasks.Task], num_support: int) -> np.ndarray:
    """Float64 [S, S]: on and above the diagonal as computed, below it the mirror image."""
    k_ss = np.zeros((num_support, num_support))
    for task in support:
      k_ss[slice(*task.support_range), slice(*task.target_range)] = self._piece(task)['block']
    return np.triu(k_ss) + np.triu(k_ss, 1).T

  def _solve(self, state: SupportState, k_ss: np.ndarray) -> krr.Solution:
    try:
      return krr.solve(k_ss, state.labels, self._run.ridge)
    except krr.NotPositiveDefiniteError as error:
      raise RunFailed(f'step {state.step}: {error}') from error

  def _label_solve(
    self, state: SupportState, with_labels: bool = True
  ) -> tuple[Metrics, np.ndarray | None]:
    """DESIGN 1.2: the loss of the state over the whole training set, and the labels [S, C] that
    make it least."""
    started, pairs = time.monotonic(), self._pairs
    k_ss, solution = self._solution(state)
    factor = self._target_factor(state)
    rate = (self._pairs - pairs) / (time.monotonic() - started)
    loss = label_solve.loss(factor, solution.alpha, len(self._prepared.train_images))
    metrics = Metrics(loss, None, self._reached[1], rate)
    return metrics, label_solve.solve(k_ss, factor, self._run.ridge) if with_labels else None

  def _target_factor(self, state: SupportState) -> np.ndarray:
    """R of [K_ts, y_t], [S + C, S + C], in rounds of `targets_per_step` images.

    Each ends with a checkpoint, whose step counts rounds. The checkpoints stand in a folder named
    by the images: rounds about others would be in the way.
    """
    num_targets, size = len(self._prepared.train_images), self._run.targets_per_step
    name = hashlib.sha256(state.images.tobytes()).hexdigest()[:16]
    folder = os.path.join(self._directory.label_solve, name)
    os.makedirs(folder, exist_ok=True)
    for other in os.listdir(self._directory.label_solve):
      if other != name:
        shutil.rmtree(os.path.join(self._directory.label_solve, other), ignore_errors=True)
    checkpoints = Checkpoints(folder)
    if self._rounds is None:
      width = sum(state.labels.shape)
      start = SupportState(0, state.images, state.labels, {'factor': np.zeros((width, width))})
      self._rounds, meta = checkpoints.restore(start) or (start, {'wall_seconds': 0.0})
      self._earlier_seconds = max(self._earlier_seconds, meta['wall_seconds'])
    while (first := self._rounds.step * size) < num_targets:
      last = min(first + size, num_targets)
      started = time.monotonic()
      pieces = [
        piece['factor']
        for _, piece in self._phase(tasks.LABEL_SOLVE, len(state.images), (first, last))
      ]
      factor = label_solve.combine([self._rounds.optimizer['factor'], *pieces])
      self._rounds = self._rounds._replace(step=self._rounds.step + 1, optimizer={'factor': factor})
      self._persist(
        f'the checkpoint of {last} training images',
        lambda: checkpoints.save(self._rounds, {'wall_seconds': self._wall_seconds()}),
      )
      self._progressed(True)
      seconds = (time.monotonic() - started) / (last - first)
      logging.info(
        'label solve: %d of %d training images, %.3g pairs/s, %s to go',
        last,
        num_targets,
        len(state.images) / seconds,
        _duration(seconds * (num_targets - last)),
      )
    return self._rounds.optimizer['factor']

  def _phase(self, phase: str, num_support: int, targets: tasks.Range | None = None):
    """Runs a phase: yields ((target_range, support_range), piece) in plan order. Raises _Stopped,
    TaskFailed or RunFailed."""
    posted = self._tasks(phase, num_support, targets)
    self._board.post(posted)
    for task in posted:
      yield (task.target_range, task.support_range), self._piece(task)

  def _tasks(
    self, phase: str, num_support: int, targets: tasks.Range | None = None
  ) -> list[tasks.Task]:
    return [
      tasks.Task(self._run_id, self._generation, self._step, phase, i, t, s)
      for i, (t, s) in enumerate(_plan(self._run, phase, num_support, targets))
    ]

  def _piece(self, task: tasks.Task) -> dict[str, np.ndarray]:
    """A posted task's piece, once it is there. Raises _Stopped, TaskFailed or RunFailed."""
    piece = None
    while piece is None:
      if self._stop_event.is_set():
        raise _Stopped()
      piece = self._board.take(task, _POLL)
      if piece is None:
        self._check_progress()
      self._refresh_status(run_directory.RUNNING)
    self._pairs += task.pairs
    return piece

  def _check_progress(self) -> None:
    """Says what a phase that does not get on is waiting for.

    Raises RunFailed where waiting is no use, _Stopped after worker_timeout.
    """
    broken = [message for name, message in list(self._broken.items()) if name != _EVALUATOR]
    if len(broken) >= self._system.num_workers and not self._rates:
      raise RunFailed(f'no worker can start; the last one said: {broken[-1]}')
    silent, timeout = self._board.silence(), self._system.worker_timeout
    if silent > timeout:
      raise _Stopped(f'no worker has been heard of for {silent:.0f} s (system.worker_timeout)')
    stalled, waits_for = self._board.stall()
    if stalled < _STALL:
      self._next_stall = _STALL
    elif stalled >= self._next_stall:
      self._next_stall = 2 * stalled
      remedy = (
        (
          f'; no worker has been heard of for {silent:.0f} s: see their output, or start some; after {timeout:.0f} s the run stops '
          'with a checkpoint'
        )
        if silent > _STALL / 2
        else ''
      )
      logging.warning(
        'step %d: no progress for %.0f s: %s%s.', self._step, stalled, waits_for, remedy
      )

  def _move(self, state: SupportState, gradient: Gradient) -> SupportState:
    parameters = _parameters(self._run, state.images, state.labels)
    gradients = _parameters(self._run, gradient.images, gradient.labels)
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
      # Also in a process whose kernels are on a GPU.
      moved, optimizer, is_finite = jax.device_get(
        self._update(gradients, state.optimizer, parameters)
      )
    for name in moved:
      if not is_finite[name]:
        raise RunFailed(
          f'step {state.step}: the update makes the {name} NaN or infinite; lower run.learning_rate.'
        )
    return SupportState(
      state.step + 1, moved['images'], moved.get('labels', state.labels), optimizer
    )

  def _updated(
    self, gradients: dict[str, Any], optimizer: Any, parameters: dict[str, Any]
  ) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """Parameters and the optimiser's state after an update, and whether they are finite, by name:
    traced, so in one pass over memory."""
    factors = {'images': 1.0, 'labels': self._run.label_learning_rate_factor}
    updates, optimizer = self._optimizer.update(gradients, optimizer, parameters)
    moved = {name: value + factors[name] * updates[name] for name, value in parameters.items()}
    return moved, optimizer, {name: jnp.isfinite(value).all() for name, value in moved.items()}

  def _publish(self, name: str, value: np.ndarray) -> None:
    with self._lock:
      self._inputs[name] = value

  def _lease(self, worker: str, holding: list[int]) -> dict[str, Any] | None:
    """Work, as the RPC gives it out; who holds none waits for it."""
    given, sent = [], {}  # inputs, each once, by identity
    while len(holding) + len(given) < _IN_HAND:
      leases = [*holding, *(lease for _, lease, _ in given)]
      lease = self._board.lease(worker, 0.0 if leases else _LONG_POLL, self._rates[worker], leases)
      if lease is None:
        break
      with self._lock:
        if lease.task.step != self._step:
          break
        inputs = self._inputs_of(lease.task)
      sent.update((id(data), data) for data in inputs)
      given.append((tuple(lease.task), lease.id, [list(sent).index(id(data)) for data in inputs]))
    return {'tasks': given, 'inputs': list(sent.values())} if given else None

  def _inputs_of(self, task: tasks.Task) -> list[bytes]:
    """What is sent with a task of the current step."""
    if task.phase == tasks.SUPPORT_VJP:
      cotangent = self._inputs['cotangent'][slice(*task.support_range), slice(*task.target_range)]
      return [tasks.pack({'cotangent': cotangent.astype(self._dtype)})]
    if task.phase in (tasks.SUPPORT_BLOCKS, tasks.TARGET_BLOCKS) and self._run.plan.split_support(
      len(self._inputs['images'])
    ):
      return [self._packed('images', *task.support_range)]
    if task.phase == tasks.TARGET_VJP:
      return [
        self._packed('alpha', *task.support_range),
        self._packed('residual', *task.target_range),
      ]
    return []

  def _packed(self, name: str, start: int, stop: int) -> bytes:
    """Rows of an input of the current step, which go to many."""
    key = name, start, stop
    if key not in self._sent:
      self._sent[key] = tasks.pack({name: self._inputs[name][start:stop]})
    return self._sent[key]

  def _greet(self, worker: str, hello: dict[str, Any]) -> str | None:
    """Checks who asks; a reason to refuse, or None."""
    new = worker not in self._clients
    with self._lock:
      if self._fingerprint is None:
        self._fingerprint = hello['fingerprint']
      differing = [
        f'{key}: {hello["fingerprint"].get(key)} instead of {value}'
        for key, value in self._fingerprint.items()
        if hello['fingerprint'].get(key) != value
      ]
      if differing and not self._system.allow_mixed:
        self._broken[worker] = (
          f'this worker would compute other bits than those before it ({"; ".join(differing)}). '
          'Make them alike, or set system.allow_mixed=True.'
        )
        return self._broken[worker]
      self._rates[worker] = hello['pairs_per_second']
    if new:
      self._say_cost(worker)
    return None

  def _say_cost(self, worker: str) -> None:
    """What the rest of the run will take, once a worker has measured its speed."""
    rate = self._rates[worker] * self._system.num_workers
    num_support = self._run.images_per_class * self._prepared.num_classes
    steps = self._run.num_steps - self._reached[0]
    pairs = pairs_to_go(self._run, num_support, len(self._prepared.train_images), self._reached[0])
    estimate = (
      'all steps are done'
      if not steps
      else (
        f'{pairs / steps:.3g} pairs a step, about {pairs / steps / rate:.2g} s a step, '
        f'{_duration(pairs / rate)} for {_count(steps, "step")}'
      )
    )
    logging.info(
      '%s joined: %.4g kernel pairs/s (%s). With %s: %s.',
      worker,
      self._rates[worker],
      self._fingerprint['implementation'],
      _count(self._system.num_workers, 'such worker'),
      estimate,
    )

  def _write_snapshot(self, state: SupportState, metrics: Metrics) -> None:
    images, labels = state.images.astype(np.float32), state.labels.astype(np.float32)
    if state.step == self._run.num_steps:
      self._persist(
        self._directory.distilled,
        lambda: distilled_set.save(
          self._directory.distilled, images, labels, state.step, self._saved.config, self._prepared
        ),
      )
    row = {name: value for name, value in metrics._asdict().items() if value is not None}
    self._persist(
      self._directory.snapshot(state.step),
      lambda: snapshots.write(self._directory, state.step, images, labels, row),
    )

  def _save(self, state: SupportState) -> None:
    if state.step != self._saved_step:
      meta = {
        'wall_seconds': self._wall_seconds(),
        'reached_seconds': self._reached[1],
        'fingerprint': self._fingerprint,
      }
      self._persist(
        f'the checkpoint of step {state.step}', lambda: self._checkpoints.save(state, meta)
      )
      self._saved_step = state.step
      self._progressed(True)
    self._next_checkpoint = time.monotonic() + self._system.checkpoint_seconds

  def _persist(self, what: str, write: Callable[[], None]) -> None:
    """Writes; where that fails, again for a while: a full disk may be emptied. Raises RunFailed."""
    try:
      files.persist(what, write, self._stop_event, self._patience)
    except run_directory.RunDirectoryError as error:
      raise RunFailed(
        f'{error} Mend that, and the same command goes on from the last checkpoint, '
        f'of step {self._saved_step}.'
      ) from error

  def _await_evaluation(self) -> None:
    """Leaves when the last row is written, the time for it is over, or the process is asked to
    stop: the data are exported already."""
    self._board.post([])
    self._end = time.monotonic()
    end = self._end + self._system.final_evaluation_timeout
    self._next_status = 0.0
    while not self._evaluated.wait(_POLL):
      self._refresh_status(run_directory.EVALUATING)
      if self._stop_event.is_set():
        raise _Stopped()
      if _EVALUATOR in self._broken:
        raise RunFailed(
          f'the set is distilled ({self._directory.distilled}), but its evaluation failed: {self._broken[_EVALUATOR]}'
        )
      silent = time.monotonic() - max(self._start, self._clients.get(_EVALUATOR, 0.0))
      if silent < _STALL:
        self._next_stall = _STALL
      elif silent >= self._next_stall:
        self._next_stall = 2 * silent
        logging.warning(
          'Waiting for the last evaluation; the evaluator has not been heard of for %.0f s.', silent
        )
      if silent > self._system.worker_timeout:
        logging.warning(
          'The evaluator has not been heard of for %.0f s (system.worker_timeout): '
          'ending without %s.',
          silent,
          self._lacking(),
        )
        return
      if time.monotonic() > end:
        logging.warning(
          'Ending without %s after %.0f s (system.final_evaluation_timeout).',
          self._lacking(),
          self._system.final_evaluation_timeout,
        )
        return

  def _lacking(self) -> str:
    """What the evaluator has not done yet: its row is written before all that is made of it."""
    rows = {row['step'] for row in self._directory.read_metrics()}
    is_there = self._run.num_steps in rows
    return 'the baselines or the report' if is_there else 'the last evaluation'

  def _release(self) -> None:
    """Tells everyone who is still there that the run is over; one that is only stopped may come
    back to them."""
    if self._stop_event.is_set():
      return
    self._over = True
    end = time.monotonic() + _LINGER
    while time.monotonic() < end and not self._stop_event.is_set():
      alive = {
        name for name, seen in list(self._clients.items()) if time.monotonic() - seen < _LINGER
      }
      if alive <= self._released:
        return
      time.sleep(0.05)

  def _fail(self, message: str) -> None:
    logging.error('The run failed: %s', message)
    self._write_status(run_directory.FAILED, max(self._saved_step, 0), message=message)

  def _log(self, state: SupportState, metrics: Metrics) -> None:
    if time.monotonic() < self._next_log and state.step < self._run.num_steps:
      return
    self._next_log = time.monotonic() + self._system.log_seconds
    row = (
      f', test {100 * self._last_row["krr_test_accuracy"]:.2f} % at step {self._last_row["step"]}'
      if self._last_row
      else ''
    )
    accuracy = (
      '' if metrics.train_accuracy is None else f', train {100 * metrics.train_accuracy:.2f} %'
    )
    # All of this update's work is done by now.
    solved = state.step == self._run.label_solve_step
    pairs = pairs_to_go(
      self._run, len(state.images), len(self._prepared.train_images), state.step + solved
    )
    seconds = pairs / metrics.kernel_pairs_per_second
    logging.info(
      'step %d/%d: loss %.5f%s%s, %.3g pairs/s by %s, %s to go',
      state.step,
      self._run.num_steps,
      metrics.train_loss,
      accuracy,
      row,
      metrics.kernel_pairs_per_second,
      _count(len(self._alive()), 'worker'),
      _duration(seconds),
    )
    self._progress = {
      'train_loss': metrics.train_loss,
      'kernel_pairs_per_second': metrics.kernel_pairs_per_second,
      'seconds_to_go': seconds,
    }
    self._write_status(run_directory.RUNNING, state.step)

  def _alive(self) -> set[str]:
    """Workers that have been heard of lately."""
    return {
      name
      for name, seen in list(self._clients.items())
      if name != _EVALUATOR and time.monotonic() - seen < _STALL
    }

  def _refresh_status(self, state: str) -> None:
    """Keeps status.json fresh while a step, or the last evaluation, takes long."""
    if time.monotonic() >= self._next_status:
      self._write_status(state, self._reached[0])

  def _write_status(self, state: str, step: int, **fields: Any) -> None:
    self._next_status = time.monotonic() + _STATUS_SECONDS
    counters, alive = self._board.counters(), self._alive() if state in run_directory.LIVE else ()
    counters['workers'] = {
      name: {**counts, 'alive': name in alive} for name, counts in counters['workers'].items()
    }
    if state == run_directory.EVALUATING:
      rows = {row['step'] for row in self._directory.read_metrics()}
      due = self._snapshots_to_evaluate()
      fields.update(evaluated=len(rows.intersection(due)), to_evaluate=len(due))
    self._directory.write_status(
      state,
      step=step,
      num_steps=self._run.num_steps,
      generation=self._generation,
      wall_seconds=self._wall_seconds(),
      pid=os.getpid(),
      **counters,
      **self._progress,
      pairs=self._pairs,
      last_row=self._last_row,
      **fields,
    )

  def _wall_seconds(self) -> float:
    """Seconds of computing, over all lives; the wait for the last evaluation is none."""
    return self._earlier_seconds + (self._end or time.monotonic()) - self._start


def _plan(run: schema.Run, phase: str, num_support: int, targets: tasks.Range | None = None):
  return tasks.plan(
    phase,
    num_support,
    targets or (0, run.targets_per_step),
    run.plan.support_tile,
    run.plan.targets_per_task,
    run.plan.split_support(num_support),
  )


def _parameters(run: schema.Run, images: Any, labels: Any) -> dict[str, Any]:
  return {'images': images, 'labels': labels} if run.learn_labels else {'images': images}


def _task(fields: list[Any]) -> tasks.Task:
  task = tasks.Task(*fields)
  return task._replace(
    target_range=tuple(task.target_range), support_range=tuple(task.support_range)
  )


def _run_id(saved: run_directory.Saved) -> str:
  """Names what a run computes."""
  fields = {
    path: value
    for path, value in validation.flatten({'run': saved.to_dict()['run']}).items()
    if path not in ('run.num_steps', 'run.data.dir')
  }
  return hashlib.sha256(json.dumps([saved.data_key, fields], sort_keys=True).encode()).hexdigest()[
    :16
  ]


def _in_words(error: Exception) -> str:
  return str(error) if isinstance(error, EXPECTED) else f'{type(error).__name__}: {error}'


def _count(number: int, noun: str) -> str:
  return f'{number} {noun}{"s" * (number != 1)}'


def _duration(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(seconds)))
