"""Finite networks against a network, its gradients and its optimiser written out in NumPy
(float64)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kernels.precision  # noqa: F401
from distillation import finite_network
from distillation.network import Network
from kernels import architectures

FC1 = architectures.get('fc1')
WIDTH, SHAPE, CLASSES = 12, (2, 3, 1), 3
NETWORK = Network(FC1, WIDTH, CLASSES)
PLAIN: dict[str, Any] = dict(
  width=WIDTH,
  steps=4,
  batch=100,
  loss='mse',
  learning_rate_factors=(0.5,),
  l2s=(0.01,),
  num_seeds=1,
  seed=7,
)


def _data(n, seed=0):
  rng = np.random.default_rng(seed)
  classes = np.arange(n) % CLASSES
  images = rng.normal(size=(n, *SHAPE)) + 3 * np.eye(6)[classes].reshape(n, *SHAPE)
  return images.astype(np.float32), classes


def _soft_labels(classes):
  """Labels as learned ones: scaled, shifted by noise that leaves the arg-max."""
  noise = np.random.default_rng(1).normal(size=(len(classes), CLASSES))
  return (0.7 * np.eye(CLASSES)[classes] - 0.2 + 0.05 * noise).astype(np.float32)


def _initial(seed, k):
  weights, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed), k))
  params = NETWORK.initial(weights, SHAPE)
  return [np.asarray(p, np.float64) for p in jax.tree.leaves(params)]


def _outputs_and_gradients(params, x, cotangent):
  """Outputs [N, C] of x -> relu(x w1 + b1) w2 + b2, and `cotangent(outputs)` pulled back."""
  w1, b1, w2, b2 = params
  before = x @ w1 + b1
  hidden = np.maximum(before, 0)
  outputs = hidden @ w2 + b2
  c = cotangent(outputs)
  d = (c @ w2.T) * (before > 0)
  return outputs, [x.T @ d, d.sum(0, keepdims=True), hidden.T @ c, c.sum(0, keepdims=True)]


def _max_rate(params, images):
  """2 n C / lambda_max of the Gram matrix of each image's gradient of sum_c f_c / sqrt(C)."""
  x = images.reshape(len(images), -1).astype(np.float64)

  def row(image):
    gradients = _outputs_and_gradients(params, image, lambda f: np.ones_like(f) / CLASSES**0.5)[1]
    return np.concatenate([gradient.ravel() for gradient in gradients])

  rows = np.stack([row(x[i : i + 1]) for i in range(len(x))])
  return 2 * len(x) * CLASSES / np.linalg.eigvalsh(rows @ rows.T)[-1]


def _trained(images, labels, ntk_images, loss, factor, l2, steps, seed, k):
  """Full-batch gradient descent with momentum 0.9 and cosine decay."""
  params = _initial(seed, k)
  rate = factor * _max_rate(params, ntk_images)
  x, y = images.reshape(len(images), -1).astype(np.float64), labels.astype(np.float64)

  def cotangent(f):
    if loss == 'mse':
      return (f - y) / y.size
    e = np.exp(f - f.max(axis=1, keepdims=True))
    return (e / e.sum(axis=1, keepdims=True) - np.eye(CLASSES)[y.argmax(axis=1)]) / len(y)

  velocity = [np.zeros_like(p) for p in params]
  for i in range(steps):
    gradients = _outputs_and_gradients(params, x, cotangent)[1]
    velocity = [0.9 * v + g + l2 * p for v, g, p in zip(velocity, gradients, params)]
    params = [p - rate * (1 + np.cos(np.pi * i / steps)) / 2 * v for p, v in zip(params, velocity)]
  return params


def _ours(images, labels, ntk_images, k, factor, l2, **changes):
  settings = {**PLAIN, **changes}
  params = finite_network.train(
    NETWORK,
    images,
    labels,
    ntk_images,
    k,
    factor,
    l2,
    check=lambda: None,
    batch=min(settings['batch'], len(images)),
    **{name: settings[name] for name in ('steps', 'loss', 'seed')},
  )
  return [np.asarray(p) for p in jax.tree.leaves(params)]


def _gap(found, expected, initial):
  """Largest deviation relative to the largest change of a parameter."""
  return max(np.abs(f - e).max() / np.abs(e - i).max() for f, e, i in zip(found, expected, initial))


@pytest.mark.parametrize('loss', finite_network.LOSSES)
@pytest.mark.parametrize(
  'k, factor, l2, steps', [(0, 0.5, 0.01, 4), (2, 1.3, 0.0, 7), (1, 0.2, 0.5, 1)]
)
def test_training_is_that_of_the_papers(loss, k, factor, l2, steps):
  (images, classes), (ntk_images, _) = _data(7), _data(9, seed=1)
  labels = _soft_labels(classes)
  expected = _trained(images, labels, ntk_images, loss, factor, l2, steps, seed=7, k=k)
  ours = _ours(images, labels, ntk_images, k, factor, l2, loss=loss, steps=steps)
  assert _gap(ours, expected, _initial(7, k)) < 1e-4


def test_learning_rate_is_set_by_the_first_fifty_held_out_images():
  (images, classes), held_out = _data(7), _data(60, seed=1)
  params = NETWORK.initial(jax.random.key(3), SHAPE)
  first = held_out[0][:50]
  rate = finite_network.max_learning_rate(NETWORK, params, first.astype(np.float64))
  expected = _max_rate([np.asarray(p) for p in jax.tree.leaves(params)], first)
  assert rate == pytest.approx(expected, rel=1e-9)
  # Whatever comes after the fiftieth changes nothing.
  other = held_out[0].copy()
  other[50:] *= 100
  results = [
    finite_network.evaluate(
      FC1, images, _soft_labels(classes), (x, held_out[1]), _data(200, seed=2), **PLAIN
    )
    for x in (held_out[0], other)
  ]
  assert results[0] == results[1]


def test_cross_entropy_sees_the_arg_max_of_labels_only():
  images, classes = _data(7)
  both = _soft_labels(classes), np.eye(CLASSES, dtype=np.float32)[classes]
  same = {
    loss: [
      np.array_equal(a, b)
      for a, b in zip(
        *[_ours(images, labels, _data(9, seed=1)[0], 0, 0.5, 0.01, loss=loss) for labels in both]
      )
    ]
    for loss in finite_network.LOSSES
  }
  assert all(same['cross_entropy']) and not any(same['mse'])


def test_batches_are_of_different_images_and_differ_between_seeds_and_steps():
  """One update with a batch of 2 of 5 images is the update with some pair of them; which pair
  depends on the seed."""
  images, classes = _data(5)
  labels, ntk_images = _soft_labels(classes), _data(9, seed=1)[0]
  pairs = [(i, j) for i in range(5) for j in range(i)]
  found = set()
  for k in range(8):
    ours = _ours(images, labels, ntk_images, k, 0.5, 0.0, steps=1, batch=2)
    gaps = {}
    for pair in pairs:
      x, y = images[list(pair)], labels[list(pair)]
      expected = _trained(x, y, ntk_images, 'mse', 0.5, 0.0, 1, 7, k)
      gaps[pair] = _gap(ours, expected, _initial(7, k))
    best = min(pairs, key=gaps.__getitem__)
    assert gaps[best] < 1e-4
    found.add(best)
  assert len(found) > 2


def test_several_seeds_give_what_each_gives_and_the_same_again():
  (images, classes), held_out, test = _data(7), _data(60, seed=1), _data(301, seed=2)
  labels = _soft_labels(classes)
  settings = {**PLAIN, 'num_seeds': 3}
  several = finite_network.evaluate(FC1, images, labels, held_out, test, **settings)
  assert several == finite_network.evaluate(FC1, images, labels, held_out, test, **settings)
  assert len(set(several.test_accuracies)) > 1
  assert several[1:] == (0.5, 0.01, None)
  for k, accuracy in enumerate(several.test_accuracies):
    params = _trained(images, labels, held_out[0][:50], 'mse', 0.5, 0.01, 4, 7, k)
    outputs, _ = _outputs_and_gradients(
      params, test[0].reshape(301, -1).astype(np.float64), np.zeros_like
    )
    assert accuracy == pytest.approx(np.mean(outputs.argmax(axis=1) == test[1]), abs=1.5 / 301)


def test_the_grid_is_decided_on_held_out_images_even_against_the_test_set():
  """Untrained (factor 1e-12) or trained: held-out classes choose, and turning those of the test set
  round changes no choice."""
  (images, classes), (x_held, held) = _data(30), _data(90, seed=1)
  x_test, test = _data(90, seed=2)
  settings = {**PLAIN, 'steps': 60, 'learning_rate_factors': (1e-12, 0.5), 'l2s': (0.0, 1e-3)}
  labels = np.eye(CLASSES, dtype=np.float32)[classes] - 1 / 3
  right, turned = [
    finite_network.evaluate(FC1, images, labels, (x_held, held), (x_test, y), **settings)
    for y in (test, (test + 1) % CLASSES)
  ]
  assert right.learning_rate_factor == turned.learning_rate_factor == 0.5 and right.l2 == turned.l2
  assert right.validation_accuracy == turned.validation_accuracy
  assert right.validation_accuracy is not None and right.validation_accuracy > 0.6
  assert right.test_accuracies[0] > 0.6 and turned.test_accuracies[0] < 0.3
  # What is reported is the selected network, not the last of the grid, and it is the one that is
  # trained without a grid.
  settings_selected = {**settings, 'learning_rate_factors': (0.5,), 'l2s': (right.l2,)}
  selected = finite_network.evaluate(
    FC1, images, labels, (x_held, held), (x_test, test), **settings_selected
  )
  assert right.test_accuracies == selected.test_accuracies
  # Held-out classes on which training does harm select the untrained network, though the test set
  # would not.
  untrained = finite_network.evaluate(
    FC1, images, labels, (x_held, (held + 1) % CLASSES), (x_test, test), **settings
  )
  # A tie between the two L2: the first.
  assert untrained.learning_rate_factor == 1e-12 and untrained.l2 == 0.0


def test_a_network_that_diverges_scores_nothing_and_is_not_selected(caplog):
  (images, classes), held_out, test = _data(7), _data(60, seed=1), _data(30, seed=2)
  settings = {**PLAIN, 'steps': 200, 'learning_rate_factors': (1e9, 0.5)}
  labels = _soft_labels(classes)
  found = finite_network.evaluate(FC1, images, labels, held_out, test, **settings)
  assert found.learning_rate_factor == 0.5
  assert 'has diverged: lower system.evaluation.nn_learning_rate_factors (1e+09)' in caplog.text
  settings['learning_rate_factors'] = (1e9,)
  lost = finite_network.evaluate(FC1, images, labels, held_out, test, **settings)
  assert lost.test_accuracies == [0.0]


def test_accuracy_counts_every_image_once():
  """Of a linear network whose outputs are the first three pixels."""
  x, classes = _data(1203)
  network = Network(architectures.Architecture(), WIDTH, CLASSES)
  params = [(jnp.eye(6, CLASSES, dtype=jnp.float32), jnp.zeros((1, CLASSES), jnp.float32))]
  expected = np.mean(x.reshape(1203, -1)[:, :CLASSES].argmax(axis=1) == classes)
  assert finite_network.test_accuracy(network, params, x, classes, lambda: None) == expected


def test_what_check_raises_ends_it():
  calls = []

  def check():
    calls.append(0)
    if len(calls) == 3:
      raise KeyboardInterrupt

  (images, classes), held_out = _data(7), _data(60, seed=1)
  settings = {**PLAIN, 'steps': 10**6, 'check': check}
  with pytest.raises(KeyboardInterrupt):
    finite_network.evaluate(FC1, images, _soft_labels(classes), held_out, held_out, **settings)


def test_another_architecture_and_ragged_images():
  """A network with convolutions learns the three blobs of 5x7 pixels."""
  rng = np.random.default_rng(0)
  classes = np.arange(60) % 3
  images = rng.normal(size=(60, 5, 7, 2)).astype(np.float32)
  images[np.arange(60), 1 + classes, 1 + 2 * classes] += 6
  result = finite_network.evaluate(
    architectures.get('convnet1'),
    images[:30],
    np.eye(3)[classes[:30]] - 1 / 3,
    (images[:30], classes[:30]),
    (images[30:], classes[30:]),
    **{**PLAIN, 'steps': 100, 'batch': 10, 'num_seeds': 2},
  )
  assert min(result.test_accuracies) > 0.8


def test_seeds_and_settings_share_one_compilation(caplog):
  (images, classes), held_out = _data(8), _data(60, seed=1)  # 8: no other test has compiled it
  grid = {'learning_rate_factors': (0.1, 0.5), 'l2s': (0.0, 1e-3), 'num_seeds': 3}
  settings = {**PLAIN, **grid}
  with jax.log_compiles():
    finite_network.evaluate(FC1, images, _soft_labels(classes), held_out, held_out, **settings)
  assert caplog.text.count('Finished XLA compilation of jit(update)') == 1
