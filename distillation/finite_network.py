"""Test accuracy of finite-width networks trained on a distilled set, by the protocol of Nguyen et
al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034)."""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from absl import logging
from jaxtyping import Float, Int, PyTree

import kernels.precision  # noqa: F401
from kernels import architectures, reference

LOSSES = ('mse', 'cross_entropy')
_MOMENTUM = 0.9
_NTK_IMAGES = 50  # on which the learning rate is set
# The time left is logged after so many updates if it is longer than this, in seconds.
_TIMED, _LONG = 10, 60
_TEST_BATCH = 500

# Preprocessed images [N, H, W, D], and their classes [N].
Images = tuple[Float[np.ndarray, '_ H W D'], Int[np.ndarray, ' _']]
Apply = Callable[..., Any]  # parameters, images [N, H, W, D] -> outputs [N, C]


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
  num_classes = labels.shape[1]
  train_one = functools.partial(
    train,
    architecture,
    images,
    labels,
    np.asarray(held_out[0][:_NTK_IMAGES], np.float32),
    width=width,
    steps=steps,
    batch=min(batch, len(images)),
    loss=loss,
    seed=seed,
    check=check,
  )

  def accuracy(params: PyTree, data: Images) -> float:
    return test_accuracy(network(architecture, width, num_classes)[1], params, *data, check)

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
  apply_fn: Apply,
  params: PyTree,
  images: Float[np.ndarray, 'N H W D'],
  classes: Int[np.ndarray, ' N'],
  check: Callable[[], None],
) -> float:
  """Share of images whose largest output is that of their class.

  An output that is not finite is wrong. `check` is called before every batch.
  """
  predict = _predict(apply_fn)
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
  apply_fn: Apply, params: PyTree, images: Float[np.ndarray, 'n H W D'], num_classes: int
) -> float:
  """2 n C / lambda_max of the empirical NTK [n, n] of sum_c f_c / sqrt(C) on n images."""
  theta = np.asarray(_empirical_ntk(apply_fn, num_classes)(images, None, params), np.float64)
  largest = scipy.linalg.eigvalsh(theta, subset_by_index=[len(theta) - 1] * 2)[0]
  return 2 * num_classes * len(images) / largest


def train(
  architecture: architectures.Architecture,
  images: Float[np.ndarray, 'S H W D'],
  labels: Float[np.ndarray, 'S C'],
  ntk_images: Float[np.ndarray, 'n H W D'],
  k: int,
  learning_rate_factor: float,
  l2: float,
  *,
  width: int,
  steps: int,
  batch: int,
  loss: str,
  seed: int,
  check: Callable[[], None],
) -> PyTree:
  """Trains network `k`, and returns its parameters; other arguments as for `evaluate`.

  Args:
    ntk_images: the images that set the learning rate.
  """
  init_fn, apply_fn = network(architecture, width, labels.shape[1])
  weights_key, batch_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), k))
  params = jax.tree.map(
    lambda p: p.astype(jnp.float32), init_fn(weights_key, (-1,) + images.shape[1:])[1]
  )
  check()
  rate = jnp.float32(
    learning_rate_factor * max_learning_rate(apply_fn, params, ntk_images, labels.shape[1])
  )
  update = _update(apply_fn, steps, batch, loss)
  x, y = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.float32)
  carry = params, optax.sgd(0.0, momentum=_MOMENTUM).init(params)
  # A Python loop: inside lax.scan XLA's CPU backend runs a convolution's backward pass some 40
  # times slower.
  for i in range(steps):
    check()
    carry = update(carry, i, x, y, batch_key, rate, jnp.float32(l2))
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
def network(
  architecture: architectures.Architecture, width: int, outputs: int
) -> tuple[Callable, Apply]:
  """`init_fn` and `apply_fn` of the finite network, as `reference.network` gives them."""
  made = reference.network(architecture, width=width, outputs=outputs, parameterization='standard')
  return made[0], made[1]


@functools.cache
def _update(apply_fn: Apply, steps: int, batch: int, loss: str) -> Callable:
  """One jitted update: (parameters, optimiser's state) before it -> after it."""

  def objective(params, x, y, l2):
    outputs = apply_fn(params, x)
    if loss == 'mse':
      error = 0.5 * jnp.mean((outputs - y) ** 2)
    else:
      error = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, y.argmax(axis=1)))
    return error + 0.5 * l2 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

  def update(carry, i, images, labels, batch_key, rate, l2):
    params, state = carry
    chosen = jax.random.permutation(jax.random.fold_in(batch_key, i), len(images))[:batch]
    gradient = jax.grad(objective)(params, images[chosen], labels[chosen], l2)
    decayed = rate * 0.5 * (1 + jnp.cos(jnp.pi * i / steps))
    optimizer = optax.sgd(decayed.astype(jnp.float32), momentum=_MOMENTUM)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, updates), state

  return jax.jit(update, donate_argnums=0)


@functools.cache
def _predict(apply_fn: Apply) -> Callable:
  """Jitted arg-max of the outputs, [N]; -1 where one of them is not finite."""

  def predict(params, x):
    outputs = apply_fn(params, x)
    return jnp.where(jnp.isfinite(outputs).all(axis=1), outputs.argmax(axis=1), -1)

  return jax.jit(predict)


@functools.cache
def _empirical_ntk(apply_fn: Apply, num_classes: int) -> Callable:
  """Jitted empirical NTK of sum_c f_c / sqrt(C)."""

  def summed(params: Any, inputs: Any, *_: Any, **__: Any) -> jax.Array:
    return apply_fn(params, inputs).sum(axis=1, keepdims=True) / num_classes**0.5

  return jax.jit(reference.nt.empirical_ntk_fn(summed, vmap_axes=0, trace_axes=(-1,)))
