"""Random changes of target images, with the meaning that Keras' ImageDataGenerator gives them: the
tool of the papers' authors.

Rotation, shift, channel shift and flip, in this order, on raw pixels; bilinear, the nearest pixel
beyond the border. What is done to an image is a function of (seed, step, image index), so nobody
needs to know who else augments what. The authors' version of Keras (its package
keras_preprocessing, up to 1.1.2) turns images about the point (H/2 + 1/2, W/2 + 1/2), one pixel
beyond the middle; so does this.
"""

from typing import NamedTuple

import numpy as np

from configs import schema
from data import preprocess, sampling, store


class Changes(NamedTuple):
  """What happens to each of N images.

  Attributes:
    rotation: degrees.
    down, right: where in the image, in pixels, the new image looks: its content moves up and left.
    channel_shift: added to every channel, clipped to the image's own least and greatest value.
    flip: bool, left and right are exchanged.
  """

  rotation: np.ndarray
  down: np.ndarray
  right: np.ndarray
  channel_shift: np.ndarray
  flip: np.ndarray


def target_images(
  run: schema.Run,
  prepared: store.Prepared,
  step: int,
  batch: np.ndarray,
  start: int,
  stop: int,
  threads: int = 1,
) -> np.ndarray:
  """Preprocessed target images, the chosen ones augmented before.

  Args:
    run: the run's configuration.
    prepared: with its raw images.
    step: of the run.
    batch: int64 [T], the step's whole target batch; images `start` to `stop` of it are wanted.
    threads: to compute on; no bit depends on it.

  Returns:
    float32 [stop - start, H, W, D].
  """
  settings, seed, num_images = run.augmentation, run.seed, len(prepared.train_labels)
  wanted = batch[start:stop]
  images = prepared.train_images[wanted]
  places = np.flatnonzero(chosen(settings.fraction, seed, step, batch, num_images)[start:stop])
  changes = draw(settings, seed, step, wanted[places], num_images, images.shape[1:3])

  def change(block):
    some = places[block]
    changed = apply(
      prepared.raw_images[wanted[some]], Changes(*(values[block] for values in changes))
    )
    images[some] = preprocess.apply_to_block(prepared.transform, changed)

  preprocess.in_blocks(change, len(places), threads)
  return images


def chosen(fraction: float, seed: int, step: int, batch: np.ndarray, num_images: int) -> np.ndarray:
  """Which images of a batch [T] are augmented: bool [T], as many as int(fraction T) (K1's
  notebook)."""
  values = sampling.uniform(seed, sampling.AUGMENTED, step, num_images)[batch]
  mask = np.zeros(len(batch), bool)
  mask[np.argsort(values, kind='stable')[: int(fraction * len(batch))]] = True
  return mask


def draw(
  settings: schema.Augmentation,
  seed: int,
  step: int,
  indices: np.ndarray,
  num_images: int,
  size: tuple[int, int],
) -> Changes:
  """The changes of images `indices` of the training set's `num_images`, which are `size` = (H, W)
  pixels large."""

  def symmetric(stream, most):
    return most * (2 * sampling.uniform(seed, stream, step, num_images)[indices] - 1)

  return Changes(
    symmetric(sampling.ROTATION, settings.rotation),
    symmetric(sampling.HEIGHT_SHIFT, settings.height_shift * size[0]),
    symmetric(sampling.WIDTH_SHIFT, settings.width_shift * size[1]),
    symmetric(sampling.CHANNEL_SHIFT, settings.channel_shift),
    settings.horizontal_flip
    & (sampling.uniform(seed, sampling.FLIP, step, num_images)[indices] < 0.5),
  )


def apply(images: np.ndarray, changes: Changes) -> np.ndarray:
  """Raw images [N, H, W, D] -> changed images, float64 [N, H, W, D]."""
  n, height, width, channels = images.shape
  angle = np.deg2rad(changes.rotation)[:, None, None]
  cos, sin = np.cos(angle), np.sin(angle)
  middle_y, middle_x = height / 2 + 0.5, width / 2 + 0.5
  y = np.arange(height)[:, None] - middle_y + changes.down[:, None, None]
  x = np.arange(width) - middle_x + changes.right[:, None, None]
  row, row_weight = _between(cos * y - sin * x + middle_y, height)
  column, column_weight = _between(sin * y + cos * x + middle_x, width)
  # NumPy is slow at loops as short as the channels.
  planes = np.moveaxis(images, -1, 0).reshape(channels, -1)
  corner = np.arange(n)[:, None, None] * height * width + row * width + column
  # Steps to the neighbours; none beyond the border.
  below, beside = width * (row < height - 1), 1 * (column < width - 1)
  upper = _mix(planes.take(corner, axis=1), planes.take(corner + beside, axis=1), column_weight)
  lower = _mix(
    planes.take(corner + below, axis=1), planes.take(corner + below + beside, axis=1), column_weight
  )
  changed = _mix(upper, lower, row_weight)
  low, high = (limit(changed, axis=(0, 2, 3), keepdims=True) for limit in (np.min, np.max))
  changed = np.clip(changed + changes.channel_shift[:, None, None], low, high)
  changed = np.where(changes.flip[:, None, None], changed[..., ::-1], changed)
  return np.moveaxis(changed, 0, -1)


def _between(position: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
  """The pixel before each position, clamped to [0, size - 1], and how far the position is beyond
  it."""
  position = np.clip(position, 0, size - 1)
  before = position.astype(np.int64)
  return before, position - before


def _mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
  return (1 - weight) * first + weight * second
