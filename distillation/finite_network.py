"""Trains the finite-width network of an architecture on a distilled set (K2's protocol) and tells
its test accuracy."""

import functools
import itertools
import time
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from absl import logging

import kernels.precision  # noqa: F401
from kernels import architectures, reference

LOSSES = ('mse', 'cross_entropy')
_MOMENTUM = 0.9
_NTK_IMAGES = 50  # on which the learning rate is set
# After so many updates, say how long the rest will take if it is longer than this, in seconds.
_TIMED, _LONG = 10, 60
_TEST_BATCH = 500

Images = tuple[np.ndarray, np.ndarray]  # float [N, H, W, D] preprocessed, int [N] classes


class Result(NamedTuple):
  """What training told.

  Attributes:
    test_accuracies: of each seed's network.
    learning_rate_factor, l2: those they were trained with.
    validation_accuracy: by which these two were selected, of the first seed's network; None where
      there was nothing to select.
  """

  test_accuracies: list[float]
  learning_rate_factor: float
  l2: float
  validation_accuracy: float | None


def evaluate(
  architecture: architectures.Architecture,
  images: np.ndarray,
  labels: np.ndarray,
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
  """Test accuracy of networks trained on `images` and `labels`.

  Standard parameterisation; momentum 0.9, cosine decay to 0; learning rate `factor * 2 * 50 C /
  lambda_max`, of the empirical NTK of sum_c f_c / sqrt(C) on the first 50 held-out images (K2). Of
  several factors and L2 weights the pair with the best accuracy of the first seed's network on
  `held_out` is taken; on a tie the first. The test set decides nothing.

  Args:
    architecture: the network.
    images: [S, H, W, D], preprocessed; labels: [S, C].
    held_out: part of the training set; the networks are not trained on it.
    test: the test set.
    width: channels of every layer.
    steps: updates; batch: images an update, at most S.
    loss: 'mse', 1/2 mean((f - y)^2), or 'cross_entropy' with the arg-max of `labels` as classes;
      either plus l2/2 |parameters|^2.
    learning_rate_factors, l2s: as above; each at least one.
    num_seeds: networks that differ in initial weights and batches; seed: names them all.
    check: called before every update and test batch; what it raises ends the evaluation.
  """
  images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.float32)
  train = functools.partial(
    _train,
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
  accuracy = lambda params, data: test_accuracy(
    _apply(architecture, width, labels.shape[1])[1], params, *data, check
  )
  grid = list(itertools.product(learning_rate_factors, l2s))
  best, params, score = grid[0], None, None
  if len(grid) > 1:
    for pair in grid:
      candidate = train(0, *pair)
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
    params = train(k, *best) if k or params is None else params
    accuracies.append(accuracy(params, test))
  return Result(accuracies, *best, score)


def test_accuracy(
  apply_fn: Callable,
  params: Any,
  images: np.ndarray,
  classes: np.ndarray,
  check: Callable[[], None],
) -> float:
  """Share of `images` [N, H, W, D] whose largest output is that of `classes` [N]; an output that is
  not finite is wrong."""
  predict = _predict(apply_fn)
  correct = 0
  for start in range(0, len(images), _TEST_BATCH):
    check()
    x = np.asarray(images[start : start + _TEST_BATCH], np.float32)
    # One shape, compiled once.
    padded = np.concatenate([x, np.zeros((_TEST_BATCH - len(x),) + x.shape[1:], np.float32)])
    correct += int(
      np.sum(np.asarray(predict(params, padded))[: len(x)] == classes[start : start + len(x)])
    )
  return correct / len(images)


def max_learning_rate(
  apply_fn: Callable, params: Any, images: np.ndarray, num_classes: int
) -> float:
  """2 * n * C / lambda_max of the empirical NTK [n, n] of sum_c f_c / sqrt(C) on `images` [n, H, W,
  D]."""
  theta = np.asarray(_empirical_ntk(apply_fn, num_classes)(images, None, params), np.float64)
  largest = scipy.linalg.eigvalsh(theta, subset_by_index=[len(theta) - 1] * 2)[0]
  return 2 * num_classes * len(images) / largest


def _train(
  architecture,
  images,
  labels,
  ntk_images,
  k,
  learning_rate_factor,
  l2,
  *,
  width,
  steps,
  batch,
  loss,
  seed,
  check,
):
  """The parameters of network `k` after `steps` updates."""
  init_fn, apply_fn = _apply(architecture, width, labels.shape[1])
  weights_key, batch_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), k))
  params = jax.tree.map(
    lambda p: p.astype(jnp.float32), init_fn(weights_key, (-1,) + images.shape[1:])[1]
  )
  check()
  rate = jnp.float32(
    learning_rate_factor * max_learning_rate(apply_fn, params, ntk_images, labels.shape[1])
  )
  update = _update(apply_fn, steps, batch, loss)
  carry = params, optax.sgd(0.0, momentum=_MOMENTUM).init(params)
  # A Python loop: inside lax.scan XLA's CPU backend runs a convolution's backward pass some 40
  # times slower.
  for i in range(steps):
    check()
    carry = update(carry, i, images, labels, batch_key, rate, jnp.float32(l2))
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


# Compiled once a process for all seeds, learning rates and L2 weights.


@functools.lru_cache(maxsize=None)
def _apply(architecture, width, outputs):
  return reference.network(architecture, width=width, outputs=outputs, parameterization='standard')[
    :2
  ]


@functools.lru_cache(maxsize=None)
def _update(apply_fn, steps, batch, loss):

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
    updates, state = optax.sgd(decayed.astype(jnp.float32), momentum=_MOMENTUM).update(
      gradient, state
    )
    return optax.apply_updates(params, updates), state

  return jax.jit(update, donate_argnums=0)


@functools.lru_cache(maxsize=None)
def _predict(apply_fn):

  def predict(params, x):
    outputs = apply_fn(params, x)
    return jnp.where(jnp.isfinite(outputs).all(axis=1), outputs.argmax(axis=1), -1)

  return jax.jit(predict)


@functools.lru_cache(maxsize=None)
def _empirical_ntk(apply_fn, num_classes):
  summed = lambda params, x: apply_fn(params, x).sum(axis=1, keepdims=True) / num_classes**0.5
  return jax.jit(reference.nt.empirical_ntk_fn(summed, vmap_axes=0, trace_axes=(-1,)))
