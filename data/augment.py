"""Random changes of target images as Keras' ImageDataGenerator makes them, which the authors of the
papers used.

Rotation, shift, channel shift and flip, in this order, on raw pixels; bilinear, the nearest pixel
beyond the border. An image's changes are a function of (seed, step, image index), so that any
process can compute any part of a batch. The authors' version of Keras (its package
keras_preprocessing, up to 1.1.2) turns images about the point (H/2 + 1/2, W/2 + 1/2), one pixel
beyond the middle; so does this.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from configs import schema
from data import preprocess, sampling, store


class Changes(NamedTuple):
  """Changes of N images; arrays [N].

  Attributes:
    rotation: degrees.
    down, right: pixels by which the view moves; the content moves up and left.
    channel_shift: added to every channel, clipped to the image's own least and greatest value.
    flip: bool, whether left and right are exchanged.
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
  """Preprocessed target images, some of them augmented first.

  Args:
    run: the run's configuration.
    prepared: its data set, with raw images where augmentation is on.
    step: of the run.
    batch: int64 [T], the step's whole target batch.
    start, stop: range of the batch to compute.
    threads: to compute on; no bit depends on it.

  Returns:
    float32 [stop - start, H, W, D].

  Raises:
    ValueError: `prepared` has no raw images, but augmentation is on.
  """
  wanted = batch[start:stop]
  images = prepared.train_images[wanted]
  if not run.augmentation.is_on:
    return images
  if prepared.raw_images is None:
    raise ValueError('augmentation needs the raw images: prepare the data set with raw=True.')
  raw_images, transform = prepared.raw_images, prepared.transform
  settings, seed, num_images = run.augmentation, run.seed, len(prepared.train_labels)
  places = np.flatnonzero(chosen(settings.fraction, seed, step, batch, num_images)[start:stop])
  changes = draw(settings, seed, step, wanted[places], num_images, images.shape[1:3])

  def change(block: slice) -> None:
    some = places[block]
    changed = apply(raw_images[wanted[some]], Changes(*(values[block] for values in changes)))
    images[some] = preprocess.apply_to_block(transform, changed)

  preprocess.in_blocks(change, len(places), threads)
  return images


def chosen(fraction: float, seed: int, step: int, batch: np.ndarray, num_images: int) -> np.ndarray:
  """Mask bool [T] of the images of a batch [T] that are augmented.

  They are int(fraction * T), as in the notebook of Nguyen et al. 2021a (KIP, ICLR,
  https://arxiv.org/abs/2011.00050).
  """
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
  size: Sequence[int],
) -> Changes:
  """Draws the changes of images.

  Args:
    settings: what changes, and how much.
    seed, step: of the run.
    indices: [N], of the images in the training set.
    num_images: of the training set.
    size: (H, W), pixels.
  """

  def symmetric(stream: int, most: float) -> np.ndarray:
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
  """Changes raw images [N, H, W, D]; float64 [N, H, W, D]."""
  n, height, width, channels = images.shape
  angle = np.deg2rad(changes.rotation)[:, None, None]
  cos, sin = np.cos(angle), np.sin(angle)
  middle_y, middle_x = height / 2 + 0.5, width / 2 + 0.5
  y = np.arange(height)[:, None] - middle_y + changes.down[:, None, None]
  x = np.arange(width) - middle_x + changes.right[:, None, None]
  row, row_weight = _between(cos * y - sin * x + middle_y, height)
  column, column_weight = _between(sin * y + cos * x + middle_x, width)
  # Channels first: NumPy is slow at inner loops as short as the channels.
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
  """The pixel before each position, clamped to [0, size - 1], and the rest of the position."""
  position = np.clip(position, 0, size - 1)
  before = position.astype(np.int64)
  return before, position - before


def _mix(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
  return (1 - weight) * first + weight * second
