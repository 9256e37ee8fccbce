"""A step of KIP, and of Label Solve.

`kip_step` is KIP in a dozen lines. `one_pass` and `two_halves` give the same loss and gradient from
pieces that workers compute (distillation/pieces.py) and that come through an `Exchange`.
`label_solve` finds the labels that fit the whole training set best, from pieces too.

Nguyen et al. 2021a (KIP, ICLR), https://arxiv.org/abs/2011.00050;
Nguyen et al. 2021b (NeurIPS), https://arxiv.org/abs/2107.13034.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float64, Int64

from configs import schema
from data import sampling, store
from distillation import krr, plan
from distillation import label_solve as solver
from distillation.state import Diverged, Gradient, LabelSolveState, SupportState
from kernels import contract

_DIVERGED = 1e6  # a training loss that is far too large for labels in [-1, 1]

Piece = dict[str, np.ndarray]


class Metrics(NamedTuple):
  """Metrics of the state from which a step starts.

  Attributes:
    loss: 1/2 mean((P - y_t)^2) over the step's targets; for Label Solve, over the training set.
    accuracy: fraction of the targets that is predicted right; None for Label Solve.
  """

  loss: float
  accuracy: float | None


@runtime_checkable
class Exchange(Protocol):
  """The source of a step's pieces: workers (nodes/exchange.py), or this process (in_process.py)."""

  def publish(self, name: str, value: np.ndarray) -> None:
    """Lets tasks use an array, to which the step may still write rows that no posted task needs.

    It is 'images' [S, H, W, D], which begins a step, 'alpha' [S, C], 'residual' [T, C], or
    'cotangent', that of K_ss, [S, S].
    """

  def post(self, tasks: Sequence[plan.Task]) -> None:
    """Asks for the pieces of tasks, whose inputs are published."""

  def take(self, task: plan.Task) -> Piece:
    """Takes the piece of a posted task, once; waits for it."""
    ...


def kip_step(
  state: SupportState,
  x_t: Float[np.ndarray, 'T H W D'],
  y_t: Float64[np.ndarray, 'T C'],
  kernel: contract.Kernel,
  ridge: float,
) -> tuple[Metrics, Gradient]:
  """Metrics and gradient of a step over targets x_t with labels y_t, all at once."""
  k_ss = kernel.linearise(state.images, state.images)
  k_st = kernel.linearise(state.images, x_t)
  solution = krr.solve(k_ss.block, state.labels, ridge)
  residual = krr.residual(krr.predictions(k_st.block, solution.alpha), y_t, len(y_t))
  alpha_bar = krr.alpha_bar(k_st.block, residual.scaled)
  k_ss_bar, labels_bar = krr.pull_back(solution, alpha_bar)
  images_bar = np.zeros_like(state.images)
  images_bar += k_ss.pull_back(k_ss_bar)
  images_bar += k_st.pull_back(krr.cotangent(solution.alpha, residual.scaled))
  return Metrics(residual.loss, residual.correct / len(y_t)), Gradient(images_bar, labels_bar)


def loss_and_gradient(
  state: SupportState,
  run: schema.Run,
  prepared: store.Prepared,
  exchange: Exchange,
  with_gradient: bool = True,
) -> tuple[Metrics, Gradient | None]:
  """Metrics and gradient of a step as the run's plan cuts it.

  Args:
    state: support set.
    run: with its plan.
    prepared: training set.
    exchange: source of pieces.
    with_gradient: False for the last state of a run, which needs no gradient: None in its place.

  Raises:
    NotPositiveDefiniteError: K_ss has no Cholesky factor.
    Diverged: the loss is not finite, or far too large.
  """
  if run.plan.split_support(len(state.images)):
    return two_halves(state, run, prepared, exchange, with_gradient)
  return one_pass(state, run, exchange, with_gradient)


def one_pass(
  state: SupportState, run: schema.Run, exchange: Exchange, with_gradient: bool = True
) -> tuple[Metrics, Gradient | None]:
  """`loss_and_gradient` where each task does all that its targets need."""
  _, solution = _solved(state, run, exchange)
  exchange.publish('alpha', solution.alpha)
  targets = _tasks(plan.TARGETS, state, run)
  exchange.post(targets)
  loss, correct, alpha_bar = 0.0, 0, np.zeros_like(solution.alpha)
  gradient = np.zeros_like(state.images)
  for task in targets:
    piece = exchange.take(task)
    loss += float(piece['loss'])
    correct += int(piece['correct'])
    alpha_bar += piece['alpha_bar']
    gradient += piece['gradient']
  metrics = _metrics(loss, correct, run)
  if not with_gradient:
    return metrics, None
  k_ss_bar, labels_bar = krr.pull_back(solution, alpha_bar)
  exchange.publish('cotangent', k_ss_bar)
  support = _tasks(plan.SUPPORT_VJP, state, run)
  exchange.post(support)
  for task in support:
    gradient[task.rows] += exchange.take(task)['gradient']
  return metrics, Gradient(gradient, labels_bar)


def two_halves(
  state: SupportState,
  run: schema.Run,
  prepared: store.Prepared,
  exchange: Exchange,
  with_gradient: bool = True,
) -> tuple[Metrics, Gradient | None]:
  """`loss_and_gradient` where tasks are about parts of the support set, in two halves.

  Blocks come in, residuals go out, and gradients by parts of the support come in. A group of
  targets enters its second half as soon as its rows of K_ts are complete, so that workers wait for
  each other only at the end of a step.
  """
  exchange.publish('images', state.images.astype(run.kernel_dtype))
  support, blocks = _tasks(plan.SUPPORT_BLOCKS, state, run), _tasks(plan.TARGET_BLOCKS, state, run)
  exchange.post([*support, *blocks])
  y_t = target_labels(state.step, run, prepared)
  solution = krr.solve(_assembled(support, len(state.images), exchange), state.labels, run.ridge)
  residual, alpha_bar = np.empty_like(y_t, run.kernel_dtype), np.zeros_like(solution.alpha)
  exchange.publish('alpha', solution.alpha.astype(run.kernel_dtype))
  exchange.publish('residual', residual)
  loss, correct = 0.0, 0
  second = plan.groups(_tasks(plan.TARGET_VJP, state, run))
  for group, tasks in enumerate(plan.groups(blocks)):
    pieces = [exchange.take(task)['block'] for task in tasks]
    predictions = np.zeros_like(y_t[tasks[0].columns])
    for task, block in zip(tasks, pieces):
      predictions += krr.predictions(block, solution.alpha[task.rows])
    part = krr.residual(predictions, y_t[tasks[0].columns], len(y_t))
    residual[tasks[0].columns] = part.scaled
    loss += part.loss
    correct += part.correct
    for task, block in zip(tasks, pieces):
      alpha_bar[task.rows] += krr.alpha_bar(block, part.scaled)
    if with_gradient and group + 1 < len(second):
      exchange.post(second[group])
  metrics = _metrics(loss, correct, run)
  if not with_gradient:
    return metrics, None
  k_ss_bar, labels_bar = krr.pull_back(solution, alpha_bar)
  exchange.publish('cotangent', k_ss_bar)
  support = _tasks(plan.SUPPORT_VJP, state, run)
  exchange.post([*support, *second[-1]])
  gradient = np.zeros_like(state.images)
  for task in [*(task for group in second for task in group), *support]:
    gradient[task.rows] += exchange.take(task)['gradient']
  return metrics, Gradient(gradient, labels_bar)


def label_solve(
  state: SupportState,
  run: schema.Run,
  prepared: store.Prepared,
  exchange: Exchange,
  rounds: LabelSolveState,
  keep: Callable[[LabelSolveState], None] = lambda rounds: None,
  with_labels: bool = True,
) -> tuple[Metrics, Float64[np.ndarray, 'S C'] | None]:
  """Metrics over the whole training set, and the labels that minimise the loss.

  Args:
    state: its images are used, and its labels for the metrics.
    run: with its plan; a round is of `targets_per_step` images.
    prepared: the training set.
    exchange: source of pieces.
    rounds: those that are done already.
    keep: called after each round.
    with_labels: False where metrics are all that is wanted: None in place of the labels.

  Raises:
    NotPositiveDefiniteError: K_ss has no Cholesky factor.
  """
  k_ss, solution = _solved(state, run, exchange)
  num_targets, size = len(prepared.train_images), run.targets_per_step
  while (first := rounds.rounds * size) < num_targets:
    tasks = _tasks(plan.LABEL_SOLVE, state, run, (first, min(first + size, num_targets)))
    exchange.post(tasks)
    factors = [exchange.take(task)['factor'] for task in tasks]
    rounds = LabelSolveState(rounds.rounds + 1, solver.combine([rounds.factor, *factors]))
    keep(rounds)
  metrics = Metrics(solver.loss(rounds.factor, solution.alpha, num_targets), None)
  return metrics, solver.solve(k_ss, rounds.factor, run.ridge) if with_labels else None


def no_rounds(state: SupportState) -> LabelSolveState:
  """A Label Solve before its first round."""
  width = sum(state.labels.shape)
  return LabelSolveState(0, np.zeros((width, width)))


def target_batch(step: int, run: schema.Run, prepared: store.Prepared) -> Int64[np.ndarray, ' T']:
  """Indices of the training images that are a step's targets."""
  return sampling.targets(run.seed, step, prepared.train_labels, run.targets_per_step)


def target_labels(
  step: int, run: schema.Run, prepared: store.Prepared
) -> Float64[np.ndarray, 'T C']:
  """Centred labels of a step's targets."""
  chosen = prepared.train_labels[target_batch(step, run, prepared)]
  return sampling.centred_one_hot(chosen, prepared.num_classes)


def _tasks(
  phase: str, state: SupportState, run: schema.Run, targets: plan.Range | None = None
) -> list[plan.Task]:
  return plan.tasks(run, phase, state.step, len(state.images), targets)


def _solved(
  state: SupportState, run: schema.Run, exchange: Exchange
) -> tuple[np.ndarray, krr.Solution]:
  """Begins a step: publishes the images, and returns K_ss [S, S] and its solution."""
  exchange.publish('images', state.images.astype(run.kernel_dtype))
  support = _tasks(plan.SUPPORT_BLOCKS, state, run)
  exchange.post(support)
  k_ss = _assembled(support, len(state.images), exchange)
  return k_ss, krr.solve(k_ss, state.labels, run.ridge)


def _assembled(
  support: list[plan.Task], num_support: int, exchange: Exchange
) -> Float64[np.ndarray, 'S S']:
  """Takes the pieces of K_ss and mirrors what is above the diagonal."""
  k_ss = np.zeros((num_support, num_support))
  for task in support:
    k_ss[task.rows, task.columns] = exchange.take(task)['block']
  return np.triu(k_ss) + np.triu(k_ss, 1).T


def _metrics(loss: float, correct: int, run: schema.Run) -> Metrics:
  if not loss <= _DIVERGED:
    raise Diverged(
      f'the training diverges, its loss is {loss:.3g}; lower run.learning_rate or raise run.ridge.'
    )
  return Metrics(loss, correct / run.targets_per_step)
