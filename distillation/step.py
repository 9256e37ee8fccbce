"""A step of KIP (Nguyen et al. 2021a, https://arxiv.org/abs/2011.00050) and of Label Solve.

`kip_step` is the method on one page. `one_pass` and `two_halves` give the same loss and gradient
from pieces that workers compute (distillation/pieces.py), which they get through an `Exchange`;
`label_solve` does the same for the labels that fit the whole training set best.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from configs import schema
from data import sampling, store
from distillation import krr, plan
from distillation import label_solve as solver
from distillation.state import Diverged, Gradient, LabelSolveState, SupportState
from kernels import contract

_DIVERGED = 1e6  # a training loss of predictions that have nothing to do with labels in [-1, 1]

Piece = dict[str, np.ndarray]


class Metrics(NamedTuple):
  """What a step tells of the state it starts from.

  Attributes:
    loss: 1/2 mean((P - y_t)^2) over the step's targets; Label Solve's are the training set.
    accuracy: part of the targets that is predicted right; None for Label Solve.
  """

  loss: float
  accuracy: float | None


@runtime_checkable
class Exchange(Protocol):
  """How a step gets its pieces: from workers, or computed on the spot."""

  def publish(self, name: str, value: np.ndarray) -> None:
    """Lets tasks use an array: 'images' [S, H, W, D], 'alpha' [S, C], 'residual' [T, C], or the
    'cotangent' of K_ss [S, S]."""

  def post(self, tasks: Sequence[plan.Task]) -> None:
    """Asks for pieces; what they need but `residual` of other targets is published already."""

  def take(self, task: plan.Task) -> Piece:
    """The piece of a posted task, once; waits for it."""
    ...


def kip_step(
  state: SupportState, x_t: np.ndarray, y_t: np.ndarray, kernel: contract.Kernel, ridge: float
) -> tuple[Metrics, Gradient]:
  """Loss and gradient over targets x_t [T, H, W, D], y_t [T, C]: what all others must equal."""
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
  """The step that the run's plan asks for; the last state of a run needs no gradient.

  Raises:
    NotPositiveDefiniteError: K_ss has no Cholesky factor.
    Diverged: the loss is beyond all bounds.
  """
  if run.plan.split_support(len(state.images)):
    return two_halves(state, run, prepared, exchange, with_gradient)
  return one_pass(state, run, exchange, with_gradient)


def one_pass(
  state: SupportState, run: schema.Run, exchange: Exchange, with_gradient: bool = True
) -> tuple[Metrics, Gradient | None]:
  """Loss and gradient where each task does all that a group of targets asks for."""
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
  """Loss and gradient where tasks are about parts of the support set.

  Blocks come in, residuals go out, and gradients of parts of the support come in. A group of
  targets goes on to its second half as soon as its rows of K_ts are whole, so that workers wait
  for each other only at the end of a step.
  """
  exchange.publish('images', state.images.astype(run.kernel_dtype))
  support, blocks = _tasks(plan.SUPPORT_BLOCKS, state, run), _tasks(plan.TARGET_BLOCKS, state, run)
  exchange.post([*support, *blocks])
  y_t = targets_labels(state.step, run, prepared)
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
) -> tuple[Metrics, np.ndarray | None]:
  """The loss over the whole training set, and the labels [S, C] that make it least.

  Nguyen et al. 2021b, https://arxiv.org/abs/2107.13034.

  Args:
    state: its images are solved for.
    run: with its plan; a round is of `targets_per_step` images.
    prepared: the training set.
    exchange: where pieces come from.
    rounds: those that are done already.
    keep: called after each round.
    with_labels: False where the loss is all that is wanted: None in place of the labels.

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


def target_batch(step: int, run: schema.Run, prepared: store.Prepared) -> np.ndarray:
  """The training images that are a step's targets, int64 [T]."""
  return sampling.targets(run.seed, step, prepared.train_labels, run.targets_per_step)


def targets_labels(step: int, run: schema.Run, prepared: store.Prepared) -> np.ndarray:
  """Their centred labels, float64 [T, C]."""
  chosen = prepared.train_labels[target_batch(step, run, prepared)]
  return sampling.centred_one_hot(chosen, prepared.num_classes)


def _tasks(
  phase: str, state: SupportState, run: schema.Run, targets: plan.Range | None = None
) -> list[plan.Task]:
  return plan.tasks(run, phase, state.step, len(state.images), targets)


def _solved(
  state: SupportState, run: schema.Run, exchange: Exchange
) -> tuple[np.ndarray, krr.Solution]:
  """K_ss and its solution: how a step begins."""
  exchange.publish('images', state.images.astype(run.kernel_dtype))
  support = _tasks(plan.SUPPORT_BLOCKS, state, run)
  exchange.post(support)
  k_ss = _assembled(support, len(state.images), exchange)
  return k_ss, krr.solve(k_ss, state.labels, run.ridge)


def _assembled(support: list[plan.Task], num_support: int, exchange: Exchange) -> np.ndarray:
  """K_ss, [S, S]: on and above the diagonal as computed, below it the mirror image."""
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
