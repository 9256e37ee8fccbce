"""Every random choice of a run, as a pure function of (seed, stream, step, image index).

Philox's raw words are part of NumPy's compatibility promise and are mapped here by our own rule, so
that no library's release can move a run; no choice depends on which others were made.
"""

import numpy as np

# Streams.
INITIAL_SUPPORT, TARGETS, INITIAL_NOISE = range(3)
AUGMENTED, ROTATION, HEIGHT_SHIFT, WIDTH_SHIFT, CHANNEL_SHIFT, FLIP = range(100, 106)


def _words(seed: int, stream: int, step: int, n: int) -> np.ndarray:
  """Word i of the result belongs to image i: Philox keyed by (seed, stream), counter (i // 4,
  step)."""
  return np.random.Philox(key=[seed, stream], counter=[0, step, 0, 0]).random_raw(n)


def uniform(seed: int, stream: int, step: int, n: int) -> np.ndarray:
  """A number for each of n images, float64 [n], uniform in [0, 1)."""
  return (_words(seed, stream, step, n) >> np.uint64(11)) * 2.0**-53


def normal(seed: int, stream: int, step: int, n: int) -> np.ndarray:
  """Noise, float64 [n], of mean 0 and variance 1: sums of 12 uniform numbers, normal for all that
  pictures show and exact on every machine."""
  return uniform(seed, stream, step, 12 * n).reshape(n, 12).sum(axis=1) - 6


def class_balanced(seed: int, stream: int, step: int, labels: np.ndarray, size: int) -> np.ndarray:
  """Draws `size` different images, as many of each class.

  Args:
    labels: int64 [N], every class 0 … C-1 present.
    size: how many; a multiple of C, at most C times the smallest class.

  Returns:
    int64 [size] indices, class by class, each class's in the order drawn.

  Raises:
    ValueError: for a size that breaks these rules.
  """
  counts = np.bincount(labels)
  per_class, rest = divmod(size, len(counts))
  if rest or not 1 <= per_class <= counts.min():
    raise ValueError(
      f'size must be a multiple of {len(counts)} (the classes) from {len(counts)} to {len(counts) * counts.min()} '
      f'(the smallest class has {counts.min()} images), got {size}.'
    )
  words = _words(seed, stream, step, len(labels))
  # Much faster than a stable sort, and the same unless two words are equal, which was never seen.
  order = np.argsort(words)
  if not np.all(np.diff(words[order])):
    order = np.argsort(words, kind='stable')
  # By class, then by word.
  order = order[np.argsort(labels[order].astype(np.min_scalar_type(len(counts))), kind='stable')]
  starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
  return np.concatenate([order[start : start + per_class] for start in starts])


def targets(seed: int, step: int, labels: np.ndarray, size: int) -> np.ndarray:
  """The step's target images, int64 [size]: class-balanced, or the whole training set in its order
  where `size` is all of it."""
  return (
    np.arange(size) if size == len(labels) else class_balanced(seed, TARGETS, step, labels, size)
  )


def centred_one_hot(labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Labels [N] -> float64 [N, C]: one-hot minus 1/C (K1)."""
  return np.eye(num_classes)[labels] - 1 / num_classes
