"""Trains the finite-width network of an architecture on a distilled set (K2's protocol) and tells its test accuracy."""

import functools
from typing import Callable

from kernels import precision  # pylint: disable=unused-import

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg

from kernels import architectures
from kernels import reference

_MOMENTUM = 0.9
_NTK_IMAGES = 50  # on which the learning rate is set
_CHUNK = 50  # updates between looks at `stop`
_TEST_BATCH = 500


def test_accuracy(architecture: architectures.Architecture, images: np.ndarray, labels: np.ndarray, held_out: np.ndarray,
                  test_images: np.ndarray, test_classes: np.ndarray, *, width: int, steps: int, batch: int,
                  learning_rate_factor: float, l2: float, seed: int, stop: Callable[[], bool] = lambda: False) -> float | None:
  """Test accuracy of the network trained on `images` and `labels`, or None where `stop()` became true.

  Standard parameterisation; loss 1/2 mean((f - y)^2) + l2/2 |theta|^2; momentum 0.9, cosine decay to 0; learning rate
  `learning_rate_factor * 2 * 50 C / lambda_max`, of the empirical NTK of sum_c f_c / sqrt(C) on the first 50 held-out images [K2].

  Args:
    architecture: the network.
    images: [S, H, W, D], preprocessed; labels: [S, C].
    held_out: training images that were not distilled from, [N, H, W, D]; the first 50 are used.
    test_images: [N, H, W, D]; test_classes: int [N].
    width: channels of every layer.
    steps: updates; batch: images an update, at most S.
    learning_rate_factor, l2: as above.
    seed: of the initial weights and of the batches.
    stop: looked at every few updates.
  """
  num_classes = labels.shape[1]
  init_fn, apply_fn, _ = reference.network(architecture, width=width, outputs=num_classes, parameterization='standard')
  images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.float32)
  weights_key, batch_key = jax.random.split(jax.random.key(seed))
  params = jax.tree.map(lambda p: p.astype(jnp.float32), init_fn(weights_key, (-1,) + images.shape[1:])[1])

  rate = learning_rate_factor * max_learning_rate(apply_fn, params, np.asarray(held_out[:_NTK_IMAGES], np.float32), num_classes)
  optimizer = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=_MOMENTUM)
  batch = min(batch, len(images))

  def loss(params, x, y):
    return 0.5 * jnp.mean((apply_fn(params, x) - y) ** 2) + 0.5 * l2 * sum(jnp.sum(p ** 2) for p in jax.tree.leaves(params))

  @functools.partial(jax.jit, static_argnums=2)
  def train(carry, start, updates):
    def update(carry, i):
      params, state = carry
      chosen = jax.random.permutation(jax.random.fold_in(batch_key, i), len(images))[:batch]
      updates, state = optimizer.update(jax.grad(loss)(params, images[chosen], labels[chosen]), state, params)
      return (optax.apply_updates(params, updates), state), None
    return jax.lax.scan(update, carry, start + jnp.arange(updates))[0]

  carry = (params, optimizer.init(params))
  for start in range(0, steps, _CHUNK):
    if stop():
      return None
    carry = jax.block_until_ready(train(carry, start, min(_CHUNK, steps - start)))

  predict = jax.jit(lambda params, x: apply_fn(params, x).argmax(axis=1))
  correct = 0
  for start in range(0, len(test_images), _TEST_BATCH):
    if stop():
      return None
    x = np.asarray(test_images[start:start + _TEST_BATCH], np.float32)
    padded = np.concatenate([x, np.zeros((_TEST_BATCH - len(x),) + x.shape[1:], np.float32)])  # one shape, compiled once
    correct += int(np.sum(np.asarray(predict(carry[0], padded))[:len(x)] == test_classes[start:start + len(x)]))
  return correct / len(test_images)


def max_learning_rate(apply_fn: Callable, params, images: np.ndarray, num_classes: int) -> float:
  """2 * n * C / lambda_max of the empirical NTK [n, n] of sum_c f_c / sqrt(C) on `images` [n, H, W, D]."""
  summed = lambda params, x: apply_fn(params, x).sum(axis=1, keepdims=True) / num_classes ** 0.5
  kernel = jax.jit(reference.nt.empirical_ntk_fn(summed, vmap_axes=0, trace_axes=(-1,)))
  theta = np.asarray(kernel(images, None, params), np.float64)
  largest = scipy.linalg.eigvalsh(theta, subset_by_index=[len(theta) - 1] * 2)[0]
  return 2 * num_classes * len(images) / largest
