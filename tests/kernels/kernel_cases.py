"""The table of architectures, sizes and images for the kernel tests and the golden values."""

from typing import Any, NamedTuple

import numpy as np


def _dict(*stages, **rest) -> dict[str, Any]:
  return {'stages': [{'convs': convs, 'pool': pool} for convs, pool in stages], **rest}


class Case(NamedTuple):
  """One row of the table.

  Attributes:
    architecture: see `architectures.get`.
    shape: an image's [H, W, D].
    images: the name of a function below.
    counts: numbers of images x1 and x2.
    cheap: small enough to run Neural Tangents live.
    dtypes: the tested ones; only one where compilation would take long.
  """

  architecture: Any
  shape: tuple[int, int, int]
  images: str
  counts: tuple[int, int] = (3, 4)
  cheap: bool = False
  dtypes: tuple[str, ...] = ('float32', 'float64')


CASES = {
  'fc2': Case('fc2', (8, 8, 1), 'random', cheap=True),
  'fc2_flat': Case('fc2', (9, 7, 2), 'flat', cheap=True),
  'conv2_digits': Case('conv2', (8, 8, 1), 'digits'),
  'convnet': Case('convnet', (8, 8, 1), 'random'),
  'convnet_flat': Case('convnet', (8, 8, 1), 'flat'),
  'convnet_odd': Case('convnet', (9, 11, 2), 'random', dtypes=('float32',)),
  'convnet2_digits': Case('convnet2', (28, 28, 1), 'digits', (1, 1)),
  'convnet_smooth': Case('convnet', (32, 32, 3), 'smooth', (1, 2), dtypes=('float32',)),
  'convnet_near': Case('convnet3', (8, 8, 3), 'near', (1, 5)),
  'convnet2_odd_flat': Case('convnet2', (9, 7, 2), 'flat', cheap=True),
  'myrtle5': Case('myrtle5', (9, 7, 2), 'smooth'),
  'myrtle5_flat': Case('myrtle5', (9, 7, 2), 'flat'),
  'myrtle10': Case('myrtle10', (8, 4, 1), 'random', (2, 2), dtypes=('float32',)),
  'merged_stages_hidden': Case(
    _dict((1, False), (0, True), (1, True), hidden=1), (9, 7, 2), 'random'
  ),
  'pool_first_global_hidden': Case(
    _dict((0, True), (2, False), readout='global_average_pool', hidden=2), (6, 5, 1), 'random'
  ),
  'no_bias': Case(_dict((2, True), b_std=0.0, w_std=1.5), (6, 6, 1), 'random'),
  'linear_pool': Case(_dict((0, True), b_std=0.3), (6, 7, 1), 'random', cheap=True),
  'linear': Case(_dict(), (4, 5, 2), 'flat', cheap=True),
  'global_only_hidden': Case(_dict(readout='global_average_pool', hidden=1), (4, 5, 2), 'random'),
}

# Of these the NNGP too, on random images.
NNGP = ('fc2', 'convnet2_odd_flat', 'linear_pool', 'no_bias', 'pool_first_global_hidden')

# For test_near_pairs.py.
NEAR_NETWORKS = {
  'fc1': 'fc1',
  'fc3': 'fc3',
  'conv3': 'conv3',
  'convnet2': 'convnet2',
  'myrtle5': 'myrtle5',
  'hidden': _dict((2, False), hidden=2),
  'pooled_hidden': _dict((1, True), (1, True), hidden=1),
  'global_hidden': _dict((2, True), (1, False), readout='global_average_pool', hidden=1),
  'pool_first_hidden': _dict((0, True), hidden=1),
  'fc2_without_bias': _dict(hidden=2, b_std=0.0),
  'conv2_without_bias': _dict((2, False), b_std=0.0),
  'pooled_without_bias': _dict((1, True), (1, False), b_std=0.0, hidden=1),
}


def images(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """x1 [A, H, W, D], x2 [B, H, W, D] and a cotangent [A, B], the same on every machine."""
  rng = np.random.RandomState(sum(map(ord, case.images)) + 31 * case.shape[0] + case.shape[1])
  x1, x2 = globals()['_' + case.images](rng, case.shape, *case.counts)
  return x1, x2, rng.standard_normal(case.counts)


def _random(rng, shape, a, b):
  x = rng.standard_normal((a + b,) + shape)
  return x[:a], x[a:]


def _smooth(rng, shape, a, b):
  height, width, depth = shape
  y, x = np.mgrid[:height, :width, :1][:2] / 8
  waves = [np.sin(f * y + g * x + p) for f, g, p in rng.uniform(-2, 2, (a + b, 3, depth))]
  return np.stack(waves[:a]), np.stack(waves[a:])


def _digits(rng, shape, a, b):
  """A stroke on an empty background, of 8 bits and standardised as MNIST is."""
  height, width, _ = shape
  y, x = np.mgrid[:height, :width, :1][:2] / height
  strokes = []
  for slope, offset, bend in rng.uniform(-1, 1, (a + b, 3)):
    distance = np.abs(x - 0.5 - 0.5 * slope * (y - 0.5) - 0.2 * offset - bend * (y - 0.5) ** 2)
    strokes.append(
      np.round(255 * np.clip(1.5 - 12 * distance, 0, 1) * (np.abs(y - 0.5) < 0.35)) / 255
    )
  strokes = (np.stack(strokes) - 0.13) / 0.31
  return strokes[:a], strokes[a:]


def _flat(rng, shape, a, b):
  """Images that are identical, zero, constant, or constant in large parts, all at once."""
  x1, x2 = _random(rng, shape, a, b)
  x1[1, 2:] = 0.5
  x1[2] = 0
  x2[0], x2[1], x2[2] = x1[0], x1[1], 0.5
  x2[3, :, 3:] = 0
  return x1, x2


def _near(rng, shape, a, b):
  """x2 = x1 + ε · noise, ε from 1e-4 to 1e-1, exact in float32: their differences count."""
  x1, noise = _random(rng, shape, a, b)
  x2 = x1 + np.geomspace(1e-4, 1e-1, b)[:, None, None, None] * noise
  return tuple(x.astype(np.float32).astype(np.float64) for x in (x1, x2))
