"""Every way to compute a step against `kip_step`, and that against automatic differentiation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kernels.precision  # noqa: F401
from data import sampling, store
from distillation import optimizers, step
from distillation import state as states
from distillation.in_process import InProcess
from kernels import architectures, reference, registry


@pytest.fixture
def make_step(make_run, tmp_path):
  """A function {field: value} -> (run, data, kernel, state), away from one-hot labels."""

  def make(changes):
    run = make_run(tmp_path, {'run.kernel_dtype': 'float64', **changes})
    settings = run.config.run
    prepared = store.open_prepared(run.directory.read_saved().data_key, run.cache)
    assert prepared is not None
    state = states.initial(settings, prepared, optax.adam(0.04))
    noise = np.random.default_rng(0)
    state = state._replace(
      images=state.images + 0.1 * noise.normal(size=state.images.shape),
      labels=state.labels + 0.1 * noise.normal(size=state.labels.shape),
    )
    return settings, prepared, registry.for_run(settings, 1), state

  return make


def _targets(run, prepared, number):
  chosen = step.target_batch(number, run, prepared)
  return prepared.train_images[chosen], step.target_labels(number, run, prepared)


@pytest.mark.parametrize('architecture', ['fc1', 'convnet2'])
def test_kip_step_is_the_gradient_of_the_loss(make_step, architecture):
  run, prepared, kernel, state = make_step({'run.architecture': architecture})
  x_t, y_t = _targets(run, prepared, 0)
  kernel_fn = reference.network(architectures.get(architecture))[2]

  def loss(images, labels):
    k_ss, k_ts = (kernel_fn(x, images, get='ntk') for x in (images, jnp.asarray(x_t, 'float64')))
    k = k_ss + run.ridge * jnp.trace(k_ss) / len(images) * jnp.eye(len(images))
    return 0.5 * jnp.mean((k_ts @ jnp.linalg.solve(k, labels) - y_t) ** 2)

  value, (images, labels) = jax.jit(jax.value_and_grad(loss, (0, 1)))(state.images, state.labels)
  metrics, gradient = step.kip_step(state, x_t, y_t, kernel, run.ridge)
  assert metrics.loss == pytest.approx(float(value), rel=1e-9)
  assert metrics.accuracy is not None and 0 <= metrics.accuracy <= 1
  assert np.abs(gradient.images - images).max() <= 5e-8 * np.abs(images).max()
  assert np.abs(gradient.labels - labels).max() <= 1e-8 * np.abs(labels).max()


@pytest.mark.parametrize('architecture', ['fc1', 'convnet2'])
@pytest.mark.parametrize('part', [0, 1, 4, 5])
def test_pieces_add_up_to_kip_step(make_step, architecture, part):
  """In one pass, and in halves over ragged parts of the 6 support images."""
  run, prepared, kernel, state = make_step(
    {'run.architecture': architecture, 'run.plan.support_per_task': part}
  )
  exchange = InProcess(run, prepared, kernel)
  expected, whole = step.kip_step(state, *_targets(run, prepared, 0), kernel, run.ridge)
  metrics, gradient = step.loss_and_gradient(state, run, prepared, exchange)
  assert metrics.loss == pytest.approx(expected.loss, rel=1e-12)
  assert metrics.accuracy == expected.accuracy
  assert gradient is not None
  for found, wanted in zip(gradient, whole):
    assert np.abs(found - wanted).max() <= 1e-11 * np.abs(wanted).max()
  alone, nothing = step.loss_and_gradient(state, run, prepared, exchange, with_gradient=False)
  assert alone == metrics and nothing is None


def test_rounds_of_label_solve_are_kept_and_gone_on_from(make_step):
  run, prepared, kernel, state = make_step(
    {
      'run.architecture': 'fc1',
      'run.method': 'label_solve',
      'run.num_steps': 1,
      'run.targets_per_step': 36,
    }
  )
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


def test_adam_moves_what_the_configuration_says(make_step):
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
def test_a_loss_beyond_all_bounds_is_an_error(make_step, part):
  run, prepared, kernel, state = make_step(
    {'run.architecture': 'fc1', 'run.plan.support_per_task': part}
  )
  state = state._replace(labels=1e4 * state.labels)
  with pytest.raises(states.Diverged, match='the training diverges, its loss is .*e\\+0'):
    step.loss_and_gradient(state, run, prepared, InProcess(run, prepared, kernel))
