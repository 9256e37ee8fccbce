"""Every variant of KIP against automatic differentiation of the whole loss and optax, both written
out, in float64."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_workers import working

import kernels.precision  # noqa: F401
from artifacts import distilled_set
from configs import own_architecture
from data import sampling
from distillation import optimizers, step
from distillation import state as states
from kernels import architectures, reference
from programs import local

STEPS = 2


def _written_out(
  run,
  prepared,
  images,
  labels,
  optimizer,
  label_factor=1.0,
  learn_labels=True,
  kind='ntk',
  batch=None,
  **network,
):
  """The images and labels after STEPS updates, and the losses before each."""
  kernel_fn = reference.network(architectures.get(run.architecture), **network)[2]

  def loss(parameters, x_t, y_t):
    x, y = parameters['images'], parameters.get('labels', labels)
    k_ss, k_ts = kernel_fn(x, x, get=kind), kernel_fn(x_t, x, get=kind)
    k = k_ss + run.ridge * jnp.trace(k_ss) / len(x) * jnp.eye(len(x))
    return 0.5 * jnp.mean((k_ts @ jnp.linalg.solve(k, y) - y_t) ** 2)

  parameters = {'images': images, **({'labels': labels} if learn_labels else {})}
  state, losses, gradient = optimizer.init(parameters), [], jax.jit(jax.value_and_grad(loss))
  for number in range(STEPS):
    chosen = batch
    if batch is None:
      chosen = sampling.class_balanced(
        run.seed, sampling.TARGETS, number, prepared.train_labels, run.targets_per_step
      )
    y_t = sampling.centred_one_hot(prepared.train_labels[chosen], prepared.num_classes)
    value, gradients = gradient(
      parameters, jnp.asarray(prepared.train_images[chosen], jnp.float64), y_t
    )
    updates, state = optimizer.update(gradients, state, parameters)
    if learn_labels:
      updates['labels'] *= label_factor
    parameters = optax.apply_updates(parameters, updates)
    losses.append(float(value))
  return parameters['images'], parameters.get('labels', labels), losses


SGD = {'run.optimizer': 'sgd', 'run.learning_rate': 50}


@pytest.mark.parametrize(
  'changes, optimizer, written',
  [
    ({'run.label_learning_rate_factor': 0.1}, optax.adam(0.04), {'label_factor': 0.1}),
    (
      {'run.learn_labels': False, 'run.optimizer': {'name': 'adamw', 'weight_decay': 0.3}},
      optax.adamw(0.04, weight_decay=0.3),
      {'learn_labels': False},
    ),
    (
      {
        'run.optimizer': {'name': 'sgd', 'momentum': 0.9},
        'run.label_learning_rate_factor': 3.0,
        'run.learning_rate': {
          'name': 'exponential_decay',
          'init_value': 50.0,
          'transition_steps': 1,
          'decay_rate': 0.5,
        },
      },
      optax.sgd(optax.exponential_decay(50.0, 1, 0.5), momentum=0.9),
      {'label_factor': 3.0},
    ),
    ({**SGD, 'run.targets_per_step': 96}, optax.sgd(50), {'batch': np.arange(96)}),
    ({**SGD, 'run.ridge': 0.1}, optax.sgd(50), {}),
    ({**SGD, 'run.kernel': 'nngp'}, optax.sgd(50), {'kind': 'nngp'}),
    (
      {**SGD, 'run.kernel': 'nngp', 'run.architecture': 'convnet1'},
      optax.sgd(50),
      {'kind': 'nngp'},
    ),
    (
      {**SGD, 'run.parameterization': 'standard', 'run.standard_width': 40},
      optax.sgd(50),
      {'parameterization': 'standard', 'width': 40},
    ),
    (
      {**SGD, 'run.parameterization': 'standard', 'run.architecture': 'convnet1'},
      optax.sgd(50),
      {'parameterization': 'standard', 'width': 1024},
    ),
    ({**SGD, 'run.initial_images': 'noise'}, optax.sgd(50), {}),
    (
      {
        **SGD,
        'run.architecture': {
          'stages': [{'convs': 1, 'pool': True}, {'convs': 2, 'pool': False}],
          'readout': 'global_average_pool',
          'hidden': 1,
          'w_std': 1.2,
          'b_std': 0.3,
        },
      },
      optax.sgd(50),
      {},
    ),
  ],
)
def test_first_steps(make_run, tmp_path, changes, optimizer, written):
  run = make_run(tmp_path, {'run.architecture': 'fc1', 'run.kernel_dtype': 'float64', **changes})
  with working(run) as coordinator:
    settings, prepared = run.config.run, coordinator.prepared
    configured = optimizers.make(settings.optimizer, settings.learning_rate)
    update = states.Update(settings, configured)
    first = state = states.initial(settings, prepared, configured)
    losses = []
    for _ in range(STEPS):
      metrics, gradient = step.loss_and_gradient(state, settings, prepared, coordinator.exchange)
      losses.append(metrics.loss)
      state = update(state, gradient)
  images, labels, expected = _written_out(
    settings, prepared, first.images, first.labels, optimizer, **written
  )
  np.testing.assert_allclose(losses, expected, rtol=1e-7)
  for found, wanted, start in (
    (state.images, images, first.images),
    (state.labels, labels, first.labels),
  ):
    np.testing.assert_allclose(
      found - start, wanted - start, rtol=0, atol=1e-6 * np.abs(wanted - start).max()
    )
  assert np.abs(state.images - first.images).max() > 1e-2


def test_an_own_architecture_through_the_whole_program(make_run, tmp_path):
  """Kernel, finite network, export, and coming back to the run directory, whose JSON knows no
  tuples."""
  architecture = own_architecture.get_config().run.architecture.to_dict()
  changes = {
    'run.architecture': architecture,
    'run.num_steps': 1,
    'system.evaluation.nn_steps': 3,
    'system.evaluation.nn_width': 4,
  }
  for num_steps in (1, 2):
    run = make_run(tmp_path, {**changes, 'run.num_steps': num_steps})
    local.distil(run, threading.Event())
    run.directory.close()
    assert run.directory.read_status()['state'] == 'finished'
  rows = {row['step']: row for row in run.directory.read_metrics()}
  assert (
    sorted(rows) == [0, 1, 2]
    and rows[2]['train_loss'] < rows[0]['train_loss']
    and 0 <= rows[2]['nn_test_accuracy'] <= 1
  )
  saved = architectures.get(
    distilled_set.load(run.directory.distilled).settings['run']['architecture']
  )
  assert (
    saved.stages == ((2, True), (1, False))
    and saved.readout == 'global_average_pool'
    and saved.hidden == 1
  )
