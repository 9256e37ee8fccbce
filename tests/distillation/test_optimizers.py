"""Optimisers by name are optax's own; what cannot work is refused in one line."""

import jax
import numpy as np
import optax
import pytest

import kernels.precision  # noqa: F401
from distillation import optimizers

COSINE = {'name': 'cosine_decay_schedule', 'init_value': 0.3, 'decay_steps': 3}


@pytest.mark.parametrize(
  'optimizer, learning_rate, expected',
  [
    ('adam', 0.04, optax.adam(0.04)),
    ('sgd', COSINE, optax.sgd(optax.cosine_decay_schedule(0.3, 3))),
    (
      {'name': 'sgd', 'momentum': 0.9, 'nesterov': True},
      1,
      optax.sgd(1.0, momentum=0.9, nesterov=True),
    ),
    (
      {'name': 'adamw', 'weight_decay': 0.1},
      COSINE,
      optax.adamw(optax.cosine_decay_schedule(0.3, 3), weight_decay=0.1),
    ),
    ('nadam', 0.1, optax.nadam(0.1)),
    (
      'lion',
      {
        'name': 'piecewise_constant_schedule',
        'init_value': 0.1,
        'boundaries_and_scales': {'1': 0.5},
      },
      optax.lion(optax.piecewise_constant_schedule(0.1, {1: 0.5})),
    ),
  ],
)
def test_updates_are_optaxs(optimizer, learning_rate, expected):
  made = optimizers.make(optimizer, learning_rate)
  rng = np.random.default_rng(0)
  parameters = {'images': rng.normal(size=(2, 3)), 'labels': rng.normal(size=4)}
  states = [made.init(parameters), expected.init(parameters)]
  for _ in range(4):
    gradients = jax.tree.map(lambda p: rng.normal(size=p.shape), parameters)
    updates, states[0] = made.update(gradients, states[0], parameters)
    wanted, states[1] = expected.update(gradients, states[1], parameters)
    for update, value in zip(jax.tree.leaves(updates), jax.tree.leaves(wanted)):
      assert update.dtype == np.float64
      np.testing.assert_array_equal(update, value)
    parameters = optax.apply_updates(parameters, updates)


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_every_name_works(name):
  assert hasattr(optimizers.make(name, 0.1), 'update')


@pytest.mark.parametrize('name', optimizers.SCHEDULES)
def test_every_schedule_is_optaxs(name):
  assert callable(getattr(optax, name))


@pytest.mark.parametrize(
  'optimizer, learning_rate, message',
  [
    ('adm', 0.1, "optimizer: unknown name 'adm'; known: .*adam, .*sgd"),
    ({'momentum': 0.9}, 0.1, 'optimizer: unknown name None'),
    (7, 0.1, 'optimizer: expected a name or a dict with a name and arguments, got 7'),
    (
      {'name': 'adam', 'beta': 1},
      0.1,
      "optimizer: adam: got an unexpected keyword argument 'beta'; its arguments: b1, b2",
    ),
    ({'name': 'adam', 'learning_rate': 1}, 0.1, 'optimizer: adam: .*multiple values'),
    ({'name': 'adam', 'b1': 'x'}, 0.1, 'optimizer: cannot be used for this'),
    ('lbfgs', 0.1, "optimizer: unknown name 'lbfgs'"),  # needs a function of the loss
    ({'name': 'sgd', 'momentum': 'x'}, 0.1, 'optimizer: cannot be used for this'),
    (
      'adam',
      {'name': 'cosine'},
      "learning_rate: unknown name 'cosine'; known: .*cosine_decay_schedule",
    ),
    (
      'adam',
      {'name': 'cosine_decay_schedule', 'init_value': 1},
      "learning_rate: .*missing a required argument: 'decay_steps'",
    ),
    (
      'adam',
      {
        'name': 'piecewise_constant_schedule',
        'init_value': 0.1,
        'boundaries_and_scales': {'x': 0.5},
      },
      "learning_rate: piecewise_constant_schedule: invalid literal .*'x'; its arguments",
    ),
    ('adam', {**COSINE, 'init_value': float('nan')}, 'learning_rate: gives nan at step 0'),
    ('adam', {**COSINE, 'decay_steps': -1}, 'learning_rate: .*requires positive decay_steps'),
  ],
)
def test_mistakes(optimizer, learning_rate, message):
  for refuse in (optimizers.make, optimizers.check):
    with pytest.raises(ValueError, match=message) as error:
      refuse(optimizer, learning_rate)
    assert '\n' not in str(error.value)
