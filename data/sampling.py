"""Every random choice of a run, as a pure function of (seed, stream, step, image index).

Philox's raw words are part of NumPy's compatibility promise and are mapped here by our own rule, so
that no library's release can move a run; no choice depends on which others were made.
"""

import numpy as np

# Streams: each keeps its draws whatever the others draw.
INITIAL_SUPPORT, TARGETS, INITIAL_NOISE = range(3)
AUGMENTED, ROTATION, HEIGHT_SHIFT, WIDTH_SHIFT, CHANNEL_SHIFT, FLIP = range(100, 106)


def words(seed: int, stream: int, step: int, n: int) -> np.ndarray:
  """Random words, uint64 [n], one for each image.

  Word i is number i % 4 of Philox keyed by (seed, stream) at the counter (i // 4, step).
  """
  return np.random.Philox(key=[seed, stream], counter=[0, step, 0, 0]).random_raw(n)


def uniform(seed: int, stream: int, step: int, n: int) -> np.ndarray:
  """Numbers for n images, float64 [n], uniform in [0, 1)."""
  return (words(seed, stream, step, n) >> np.uint64(11)) * 2.0**-53


def normal(seed: int, stream: int, step: int, n: int) -> np.ndarray:
  """Noise, float64 [n], of mean 0 and variance 1.

  Sums of 12 uniform numbers: close enough to normal for pictures, and exact on every machine.
  """
  return uniform(seed, stream, step, 12 * n).reshape(n, 12).sum(axis=1) - 6


def class_balanced(seed: int, stream: int, step: int, labels: np.ndarray, size: int) -> np.ndarray:
  """Draws `size` different images, as many of each class.

  Args:
    seed, stream, step: name the draw.
    labels: int64 [N], every class 0 … C-1 present.
    size: a multiple of C, at most C times the smallest class.

  Returns:
    Indices int64 [size], class by class, each class's in the order drawn.

  Raises:
    ValueError: for a size that breaks these rules.
  """
  counts = np.bincount(labels)
  per_class, rest = divmod(size, len(counts))
  if rest or not 1 <= per_class <= counts.min():
    raise ValueError(
      f'size must be a multiple of {len(counts)} (the classes) from {len(counts)} to '
      f'{len(counts) * counts.min()} (the smallest class has {counts.min()} images), got {size}.'
    )
  return least_of_each_class(words(seed, stream, step, len(labels)), labels, per_class)


def least_of_each_class(words: np.ndarray, labels: np.ndarray, per_class: int) -> np.ndarray:
  """Indices of the images with the least words of their class; equal words go by index.

  Args:
    words: uint64 [N].
    labels: int64 [N], every class 0 … C-1 present.
    per_class: at most the images of the smallest class.

  Returns:
    int64 [C * per_class], class by class, by word within a class.
  """
  counts = np.bincount(labels)
  # Much faster than a stable sort, and the same unless two words are equal, which is most unlikely.
  order = np.argsort(words)
  if not np.all(np.diff(words[order])):
    order = np.argsort(words, kind='stable')
  # By class, then by word.
  order = order[np.argsort(labels[order].astype(np.min_scalar_type(len(counts))), kind='stable')]
  starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
  return np.concatenate([order[start : start + per_class] for start in starts])


def targets(seed: int, step: int, labels: np.ndarray, size: int) -> np.ndarray:
  """Indices of a step's target images, int64 [size].

  Class-balanced, or the whole training set in its order where `size` is all of it.
  """
  if size == len(labels):
    return np.arange(size)
  return class_balanced(seed, TARGETS, step, labels, size)


def centred_one_hot(labels: np.ndarray, num_classes: int) -> np.ndarray:
  """Hard labels, float64 [N, C], of classes [N]: one-hot minus 1/C.

  Source: Nguyen et al. 2021a (KIP, ICLR), https://arxiv.org/abs/2011.00050.
  """
  return np.eye(num_classes)[labels] - 1 / num_classes
