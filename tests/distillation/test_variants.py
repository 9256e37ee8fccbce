"""Every variant of KIP, in float64, against the whole loss written out for JAX and optax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_runs

import kernels.precision  # noqa: F401
from data import sampling
from distillation import optimizers, step
from distillation import state as states
from distillation.in_process import InProcess
from kernels import architectures, reference, registry

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

  parameters: Any = {'images': images, **({'labels': labels} if learn_labels else {})}
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
  settings, prepared = run.config.run, small_runs.prepared_data(run)
  exchange = InProcess(settings, prepared, registry.for_run(settings, 1))
  update = states.Update(settings, optimizers.make(settings.optimizer, settings.learning_rate))
  first = state = small_runs.first_state(run)
  losses = []
  for _ in range(STEPS):
    metrics, gradient = step.loss_and_gradient(state, settings, prepared, exchange)
    assert gradient is not None
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
