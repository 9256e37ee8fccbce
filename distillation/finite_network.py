"""Test accuracy of finite-width networks trained on a distilled set, by the protocol of Nguyen et
al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034)."""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from absl import logging
from jaxtyping import Float, Int

import kernels.precision  # noqa: F401
from distillation.network import Network, Parameters, empirical_ntk
from kernels import architectures

LOSSES = ('mse', 'cross_entropy')
_MOMENTUM = 0.9
_NTK_IMAGES = 50  # on which the learning rate is set
# The time left is logged after so many updates if it is longer than this, in seconds.
_TIMED, _LONG = 10, 60
_TEST_BATCH = 500

# Preprocessed images [N, H, W, D], and their classes [N].
Images = tuple[Float[np.ndarray, '_ H W D'], Int[np.ndarray, ' _']]


class Result(NamedTuple):
  """Accuracies of trained networks.

  Attributes:
    test_accuracies: of each seed's network.
    learning_rate_factor, l2: used in their training.
    validation_accuracy: of the first seed's network, by which these two were selected; None where
      there was one pair only.
  """

  test_accuracies: list[float]
  learning_rate_factor: float
  l2: float
  validation_accuracy: float | None


def evaluate(
  architecture: architectures.Architecture,
  images: Float[np.ndarray, 'S H W D'],
  labels: Float[np.ndarray, 'S C'],
  held_out: Images,
  test: Images,
  *,
  width: int,
  steps: int,
  batch: int,
  loss: str,
  learning_rate_factors: Sequence[float],
  l2s: Sequence[float],
  num_seeds: int,
  seed: int,
  check: Callable[[], None] = lambda: None,
) -> Result:
  """Trains networks on `images` and `labels`, and tests them.

  Standard parameterisation; momentum 0.9, cosine decay to 0; learning rate `factor * 2 * 50 C /
  lambda_max`, of the empirical NTK of sum_c f_c / sqrt(C) on the first 50 held-out images. Of
  several factors and L2 weights the pair with the best accuracy of the first seed's network on
  `held_out` is taken; on a tie the first. The test set decides nothing.

  Args:
    architecture: the network.
    images: preprocessed, [S, H, W, D].
    labels: [S, C].
    held_out: part of the training set; the networks are not trained on it.
    test: the test set.
    width: channels of every layer.
    steps: updates.
    batch: images an update, at most S.
    loss: 'mse', 1/2 mean((f - y)^2), or 'cross_entropy' with the arg-max of `labels` as classes;
      either plus l2/2 |parameters|^2.
    learning_rate_factors, l2s: as above; each at least one.
    num_seeds: networks, which differ in initial weights and batches.
    seed: of all of them.
    check: called before every update and test batch; what it raises ends the evaluation.
  """
  network = Network(architecture, width, labels.shape[1])
  train_one = functools.partial(
    train,
    network,
    images,
    labels,
    np.asarray(held_out[0][:_NTK_IMAGES], np.float32),
    steps=steps,
    batch=min(batch, len(images)),
    loss=loss,
    seed=seed,
    check=check,
  )

  def accuracy(params: Parameters, data: Images) -> float:
    return test_accuracy(network, params, *data, check)

  grid = list(itertools.product(learning_rate_factors, l2s))
  best, params, score = grid[0], None, None
  if len(grid) > 1:
    for pair in grid:
      candidate = train_one(0, *pair)
      candidate_score = accuracy(candidate, held_out)
      logging.info(
        'finite network: learning-rate factor %g, L2 %g: %.2f %% of the held-out training images.',
        *pair,
        100 * candidate_score,
      )
      if score is None or candidate_score > score:
        best, params, score = pair, candidate, candidate_score
  accuracies = []
  for k in range(num_seeds):
    params = train_one(k, *best) if k or params is None else params
    accuracies.append(accuracy(params, test))
  factor, l2 = best
  return Result(accuracies, factor, l2, score)


def test_accuracy(
  network: Network,
  params: Parameters,
  images: Float[np.ndarray, 'N H W D'],
  classes: Int[np.ndarray, ' N'],
  check: Callable[[], None],
) -> float:
  """Share of images whose largest output is that of their class.

  An output that is not finite is wrong. `check` is called before every batch.
  """
  predict = _predict(network)
  correct = 0
  for start in range(0, len(images), _TEST_BATCH):
    check()
    x = np.asarray(images[start : start + _TEST_BATCH], np.float32)
    # One shape, compiled once.
    padded = np.concatenate([x, np.zeros((_TEST_BATCH - len(x),) + x.shape[1:], np.float32)])
    predicted = np.asarray(predict(params, padded))[: len(x)]
    correct += int(np.sum(predicted == classes[start : start + len(x)]))
  return correct / len(images)


def max_learning_rate(
  network: Network, params: Parameters, images: Float[np.ndarray, 'n H W D']
) -> float:
  """2 n C / lambda_max of the empirical NTK [n, n] of sum_c f_c / sqrt(C) on n images."""
  theta = np.asarray(empirical_ntk(network, params, images), np.float64)
  largest = scipy.linalg.eigvalsh(theta, subset_by_index=[len(theta) - 1] * 2)[0]
  return 2 * network.outputs * len(images) / largest


def train(
  network: Network,
  images: Float[np.ndarray, 'S H W D'],
  labels: Float[np.ndarray, 'S C'],
  ntk_images: Float[np.ndarray, 'n H W D'],
  k: int,
  learning_rate_factor: float,
  l2: float,
  *,
  steps: int,
  batch: int,
  loss: str,
  seed: int,
  check: Callable[[], None],
) -> Parameters:
  """Trains network `k`, and returns its parameters; other arguments as for `evaluate`.

  Args:
    ntk_images: the images that set the learning rate.
  """
  weights_key, batch_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), k))
  params = jax.tree.map(jnp.float32, network.initial(weights_key, images.shape[1:]))
  check()
  rate = jnp.float32(learning_rate_factor * max_learning_rate(network, params, ntk_images))
  update = _update(network, batch, loss)
  x, y = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.float32)
  carry = params, optax.sgd(0.0, momentum=_MOMENTUM).init(params)
  # A Python loop: inside lax.scan XLA's CPU backend runs a convolution's backward pass some 40
  # times slower.
  for i in range(steps):
    check()
    carry = update(carry, i, steps, x, y, batch_key, rate, jnp.float32(l2))
    if i == 0:
      start = time.monotonic()  # compiled by now
    elif i == _TIMED:
      jax.block_until_ready(carry)
      left = (time.monotonic() - start) / _TIMED * (steps - i)
      if left > _LONG:
        logging.info('finite network: %.0f s for the remaining %d updates.', left, steps - i)
  if not all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(carry[0])):
    logging.warning(
      'The finite network has diverged: lower system.evaluation.nn_learning_rate_factors (%g).',
      learning_rate_factor,
    )
  return carry[0]


# Cached, so that all seeds, learning rates and L2 weights of a process share one compilation.


@functools.cache
def _update(network: Network, batch: int, loss: str) -> Callable:
  """One jitted update: (parameters, optimiser's state) before it -> after it."""

  def objective(params, x, y, l2):
    outputs = network(params, x)
    if loss == 'mse':
      error = 0.5 * jnp.mean((outputs - y) ** 2)
    else:
      error = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, y.argmax(axis=1)))
    return error + 0.5 * l2 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

  def update(carry, i, steps, images, labels, batch_key, rate, l2):
    params, state = carry
    chosen = jax.random.permutation(jax.random.fold_in(batch_key, i), len(images))[:batch]
    gradient = jax.grad(objective)(params, images[chosen], labels[chosen], l2)
    decayed = rate * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
    optimizer = optax.sgd(decayed.astype(jnp.float32), momentum=_MOMENTUM)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state

  return jax.jit(update, donate_argnums=0)


@functools.cache
def _predict(network: Network) -> Callable:
  """Jitted arg-max of the outputs, [N]; -1 where one of them is not finite."""

  def predict(params, x):
    outputs = network(params, x)
    return jnp.where(jnp.isfinite(outputs).all(axis=1), outputs.argmax(axis=1), -1)

  return jax.jit(predict)
