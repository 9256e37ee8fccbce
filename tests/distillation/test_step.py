"""Every way to compute a step against `kip_step`, and that against automatic differentiation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from small_runs import AUGMENTED, HALVES

import kernels.precision  # noqa: F401
from configs import schema
from data import augment, sampling, store
from distillation import optimizers, step
from distillation import state as states
from distillation.in_process import InProcess
from kernels import architectures, contract, reference, registry

GAP = {
  'stages': [{'convs': 1, 'pool': True}, {'convs': 1, 'pool': False}],
  'readout': 'global_average_pool',
}
NNGP = {'run.kernel': 'nngp'}


class Step(NamedTuple):
  """All that a step is computed from."""

  run: schema.Run
  prepared: store.Prepared
  kernel: contract.Kernel
  state: states.SupportState

  def targets(self) -> tuple[np.ndarray, np.ndarray]:
    """Images [T, H, W, D] and labels [T, C] of the step's targets."""
    batch = step.target_batch(self.state.step, self.run, self.prepared)
    images = augment.target_images(self.run, self.prepared, self.state.step, batch, 0, len(batch))
    return images, step.target_labels(self.state.step, self.run, self.prepared)

  def whole(self) -> tuple[step.Metrics, states.Gradient]:
    """Metrics and gradient by `kip_step`."""
    return step.kip_step(self.state, *self.targets(), self.kernel, self.run.ridge)

  def by_pieces(self) -> tuple[step.Metrics, states.Gradient]:
    """Metrics and gradient from the pieces of the run's plan."""
    exchange = InProcess(self.run, self.prepared, self.kernel)
    metrics, gradient = step.loss_and_gradient(self.state, self.run, self.prepared, exchange)
    assert gradient is not None
    return metrics, gradient


Make = Callable[[dict[str, Any]], Step]


@pytest.fixture
def make_step(make_run, tmp_path) -> Make:
  """A function {field: value} -> Step."""

  def make(changes):
    run = make_run(tmp_path, {'run.kernel_dtype': 'float64', **changes})
    run.directory.close()
    return Step(
      run.config.run,
      small_runs.prepared_data(run),
      _kernel(run.config.run),
      small_runs.moved(small_runs.first_state(run)),
    )

  return make


_KERNELS: dict[str, contract.Kernel] = {}


def _kernel(run: schema.Run) -> contract.Kernel:
  """The run's kernel, one for all tests: some take long to compile."""
  asked = repr((run.architecture, run.implementation, run.kernel_dtype, run.kernel))
  if asked not in _KERNELS:
    _KERNELS[asked] = registry.for_run(run, 1)
  return _KERNELS[asked]


@functools.cache
def _gradient_of_the_loss(architecture: architectures.Architecture, kind: str):
  """A function (images, labels, x_t, y_t, ridge) -> loss and its gradients by Neural Tangents."""
  kernel_fn = reference.network(architecture)[2]

  def loss(images, labels, x_t, y_t, ridge):
    k_ss, k_ts = (kernel_fn(x, images, get=kind) for x in (images, x_t))
    k = k_ss + ridge * jnp.trace(k_ss) / len(images) * jnp.eye(len(images))
    return 0.5 * jnp.mean((k_ts @ jnp.linalg.solve(k, labels) - y_t) ** 2)

  return jax.jit(jax.value_and_grad(loss, (0, 1)))


@pytest.mark.parametrize(
  'implementation, architecture, more',
  [
    *((name, 'fc1', {}) for name in registry.available()),
    ('auto', 'myrtle5', {}),
    ('auto', 'convnet2', {}),
    ('auto', 'fc1', AUGMENTED),
    ('auto', 'convnet2', NNGP),
    ('auto', GAP, {}),
  ],
)
def test_kip_step_is_the_gradient_of_the_loss(make_step: Make, implementation, architecture, more):
  case = make_step({'run.architecture': architecture, 'run.implementation': implementation, **more})
  run, state, (x_t, y_t) = case.run, case.state, case.targets()
  function = _gradient_of_the_loss(architectures.get(run.architecture), run.kernel)
  value, (images, labels) = function(
    state.images, state.labels, jnp.asarray(x_t, jnp.float64), y_t, run.ridge
  )
  metrics, gradient = case.whole()
  assert metrics.loss == pytest.approx(float(value), rel=1e-8)
  assert metrics.accuracy is not None and 0 <= metrics.accuracy <= 1
  # On the diagonal of K_ss Neural Tangents differentiates sqrt(1 - c^2) at c = 1 within rounding:
  # good to 2e-8.
  assert np.abs(gradient.images - images).max() <= 5e-8 * np.abs(images).max()
  assert np.abs(gradient.labels - labels).max() <= 1e-8 * np.abs(labels).max()


@pytest.mark.parametrize(
  'architecture, support_tile, target_tile, per_task, more',
  [
    *(
      (architecture, 4, 5, 2, {'run.plan.support_per_task': part})
      for architecture in ('fc1', 'convnet2')
      for part in (0, 1, 4, 5)
    ),
    ('fc1', 2, 7, 1, {}),
    ('fc1', 2, 7, 2, AUGMENTED),
    ('fc1', 4, 5, 2, {**AUGMENTED, 'run.plan.support_per_task': 5}),
    ('myrtle5', 6, 33, 1, {}),
    ('myrtle5', 4, 10, 1, HALVES),
    ('convnet2', 4, 5, 2, {**NNGP, **HALVES}),
    (GAP, 4, 7, 2, {}),
    (GAP, 5, 7, 1, HALVES),
  ],
)
def test_pieces_add_up_to_kip_step(
  make_step: Make, architecture, support_tile, target_tile, per_task, more
):
  """In one pass, and in halves over ragged parts of the 6 support images."""
  case = make_step(
    {
      'run.architecture': architecture,
      'run.plan.support_tile': support_tile,
      'run.plan.target_tile': target_tile,
      'run.plan.target_tiles_per_task': per_task,
      **more,
    }
  )
  expected, whole = case.whole()
  metrics, gradient = case.by_pieces()
  assert metrics.loss == pytest.approx(expected.loss, rel=1e-12)
  assert metrics.accuracy == expected.accuracy
  for found, wanted in zip(gradient, whole):
    assert np.abs(found - wanted).max() <= 1e-11 * np.abs(wanted).max()
  alone, nothing = step.loss_and_gradient(
    case.state,
    case.run,
    case.prepared,
    InProcess(case.run, case.prepared, case.kernel),
    with_gradient=False,
  )
  assert alone == metrics and nothing is None


@pytest.mark.parametrize('part', [0, 4])
def test_pieces_in_float32_add_up_to_kip_step(make_step: Make, part):
  case = make_step({'run.kernel_dtype': 'float32', 'run.plan.support_per_task': part})
  (expected, whole), (metrics, gradient) = case.whole(), case.by_pieces()
  assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
  assert metrics.accuracy == expected.accuracy
  for found, wanted in zip(gradient, whole):
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(
  'architecture, part, dtype, more',
  [
    ('convnet2', 1, 'float64', {}),
    ('convnet2', 4, 'float32', {}),
    ('fc1', 5, 'float64', AUGMENTED),
  ],
)
def test_same_bits_with_and_without_room_for_derivatives(
  make_step: Make, architecture, part, dtype, more
):
  """Where nothing, some or all tiles are kept from the first half of a task to the second."""
  case = make_step(
    {
      'run.architecture': architecture,
      'run.kernel_dtype': dtype,
      'run.plan.support_per_task': part,
      **more,
    }
  )
  tile = case.kernel.linearise(case.state.images[:part], case.targets()[0][:5]).nbytes
  results = []
  for room in (case.kernel.kept_bytes, 3 * tile, 0):
    kernel = contract.Wrapper(case.kernel)
    kernel.kept_bytes = room
    results.append(case._replace(kernel=kernel).by_pieces())
  for other in results[1:]:
    small_runs.assert_same_bits(results[0], other)


def test_rounds_of_label_solve_are_kept_and_gone_on_from(make_step: Make):
  case = make_step(
    {
      'run.architecture': 'fc1',
      'run.method': 'label_solve',
      'run.num_steps': 1,
      'run.targets_per_step': 36,
    }
  )
  run, prepared, kernel, state = case
  exchange, kept = InProcess(run, prepared, kernel), []
  arguments = state, run, prepared, exchange
  metrics, labels = step.label_solve(*arguments, step.no_rounds(state), kept.append)
  assert [rounds.rounds for rounds in kept] == [1, 2, 3]  # of 96 training images
  again, same = step.label_solve(*arguments, kept[1])
  assert again == metrics and metrics.accuracy is None
  assert labels is not None and same is not None and labels.tobytes() == same.tobytes()
  solved, _ = step.label_solve(
    state._replace(labels=labels), *arguments[1:], kept[2], with_labels=False
  )
  y_t = sampling.centred_one_hot(prepared.train_labels, prepared.num_classes)
  assert solved.loss < metrics.loss < 0.5 * np.mean(y_t**2) * 10


def test_adam_moves_what_the_configuration_says(make_step: Make):
  """Its first update is the learning rate times the gradient's sign."""
  run, _, _, state = make_step({'run.architecture': 'fc1', 'run.learning_rate': 0.03})
  signs = np.where(np.arange(state.images.size).reshape(state.images.shape) % 2, 1.0, -2.0)
  gradient = states.Gradient(signs, np.ones_like(state.labels))
  for learn in (True, False):
    settings = dataclasses.replace(run, learn_labels=learn)
    optimizer = optimizers.make(settings.optimizer, settings.learning_rate)
    parameters = {'images': state.images, **({'labels': state.labels} if learn else {})}
    first = state._replace(optimizer=jax.device_get(optimizer.init(parameters)))
    moved = states.Update(settings, optimizer)(first, gradient)
    assert moved.step == 1
    expected = state.images - 0.03 * np.sign(signs)
    np.testing.assert_allclose(moved.images, expected, rtol=0, atol=1e-9)
    expected = state.labels - (0.03 if learn else 0)
    np.testing.assert_allclose(moved.labels, expected, rtol=0, atol=1e-9)
    with pytest.raises(states.Diverged, match='the update makes the images NaN or infinite'):
      states.Update(settings, optimizer)(first, gradient._replace(images=np.inf * signs))


@pytest.mark.parametrize('part', [0, 4])
def test_a_loss_beyond_all_bounds_is_an_error(make_step: Make, part):
  case = make_step({'run.architecture': 'fc1', 'run.plan.support_per_task': part})
  case = case._replace(state=case.state._replace(labels=1e4 * case.state.labels))
  with pytest.raises(states.Diverged, match='the training diverges, its loss is .*e\\+0'):
    case.by_pieces()
