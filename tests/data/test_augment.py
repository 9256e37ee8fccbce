"""Augmentation against Keras' own values, against Keras' formulas written out, and what must not
matter."""

import dataclasses
import os

import numpy as np
import pytest
import scipy.ndimage

from configs import schema
from data import augment, preprocess, sampling, store

ALL = schema.Augmentation(
  fraction=0.5,
  rotation=20.0,
  width_shift=0.2,
  height_shift=0.15,
  horizontal_flip=True,
  channel_shift=30.0,
)
OFF = schema.Augmentation(fraction=1.0)


def _images(n=40, shape=(8, 11, 3), dtype=np.uint8, seed=0):
  return np.random.default_rng(seed).integers(0, 256, size=(n, *shape)).astype(dtype)


def _keras(image, rotation, down, right, channel_shift, flip):
  """keras_preprocessing 1.1.2: apply_affine_transform with its offset matrix, apply_channel_shift,
  flip_axis."""
  theta = np.deg2rad(rotation)
  turn = np.array(
    [[np.cos(theta), -np.sin(theta), 0], [np.sin(theta), np.cos(theta), 0], [0, 0, 1]]
  )
  matrix = turn @ np.array([[1, 0, down], [0, 1, right], [0, 0, 1]])
  centre = np.eye(3)
  centre[:2, 2] = image.shape[0] / 2 + 0.5, image.shape[1] / 2 + 0.5
  matrix = centre @ matrix @ np.linalg.inv(centre)
  channels = [
    scipy.ndimage.affine_transform(
      image[..., c].astype(float),
      matrix[:2, :2],
      matrix[:2, 2],  # pyright: ignore[reportArgumentType]
      order=1,
      mode='nearest',
    )
    for c in range(image.shape[-1])
  ]
  changed = np.stack(channels, axis=-1)
  changed = np.clip(changed + channel_shift, changed.min(), changed.max())
  return changed[:, ::-1] if flip else changed


def test_keras_own_values():
  with np.load(os.path.join(os.path.dirname(__file__), 'keras_golden.npz')) as golden:
    changes = augment.Changes(**{name: golden[name] for name in augment.Changes._fields})
    changed = augment.apply(golden['images'], changes._replace(flip=changes.flip > 0))
    np.testing.assert_allclose(changed, golden['changed'], rtol=1e-6, atol=1e-4)
    # The one that nothing happens to.
    np.testing.assert_array_equal(golden['changed'][0], golden['images'][0])


@pytest.mark.parametrize('shape', [(8, 11, 3), (5, 5, 1), (28, 28, 1), (32, 32, 3), (1, 6, 2)])
@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_keras_formulas(shape, dtype):
  images = _images(9, shape, dtype)
  changes = augment.draw(dataclasses.replace(ALL, rotation=180.0), 3, 7, np.arange(9), 9, shape[:2])
  expected = [_keras(image, *change) for image, *change in zip(images, *changes)]
  assert changes.flip.any() and not changes.flip.all()
  np.testing.assert_allclose(augment.apply(images, changes), expected, atol=1e-9)


def test_draws_fill_their_ranges():
  changes = augment.draw(ALL, 0, 5, np.arange(4000), 4000, (10, 20))
  for values, most in (
    (changes.rotation, 20),
    (changes.down, 1.5),
    (changes.right, 4),
    (changes.channel_shift, 30),
  ):
    assert -most <= values.min() < -0.99 * most and 0.99 * most < values.max() < most
    assert abs(values.mean()) < 4 * most / np.sqrt(3 * 4000)
  assert abs(changes.flip.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
  assert abs(np.corrcoef([*changes]) - np.eye(5)).max() < 0.08


def test_an_image_is_changed_the_same_whoever_is_with_it():
  images = _images()
  whole = augment.draw(ALL, 1, 2, np.arange(40), 40, (8, 11))
  part = np.array([33, 2, 17])
  for some, all_ in zip(augment.draw(ALL, 1, 2, part, 40, (8, 11)), whole):
    np.testing.assert_array_equal(some, all_[part])
  np.testing.assert_array_equal(
    augment.apply(images[part], augment.draw(ALL, 1, 2, part, 40, (8, 11))),
    augment.apply(images, whole)[part],
  )
  rotations = {
    tuple(augment.draw(ALL, seed, step, part, 40, (8, 11)).rotation)
    for seed in (1, 2)
    for step in (2, 3)
  }
  assert len(rotations) == 4


@pytest.mark.parametrize(
  'fraction, expected', [(0.0, 0), (0.01, 0), (0.3, 3), (0.99, 9), (1.0, 10)]
)
def test_the_fraction_is_exact(fraction, expected):
  batch = np.arange(50)[::5]
  masks = [augment.chosen(fraction, 0, step, batch, 50) for step in range(30)]
  assert {mask.sum() for mask in masks} == {expected}
  if 0 < expected < 10:
    assert np.mean(masks, axis=0).min() > 0 and np.mean(masks, axis=0).max() < 1  # others each time


@pytest.mark.parametrize('zca', [False, True])
def test_target_images(tmp_path, zca):
  raw, labels = _images(160), np.arange(160) % 4
  np.savez(tmp_path / 'a.npz', x_train=raw, y_train=labels, x_test=raw[:4], y_test=labels[:4])
  data = schema.Data(name=str(tmp_path / 'a.npz'), zca=zca)
  prepared = store.prepare(data, str(tmp_path / 'cache'), raw=True)
  run = schema.Run(seed=4, augmentation=ALL)
  batch = sampling.class_balanced(4, sampling.TARGETS, 6, labels, 120)
  whole = augment.target_images(run, prepared, 6, batch, 0, 120)
  mask = augment.chosen(0.5, 4, 6, batch, 160)
  assert whole.dtype == np.float32 and mask.sum() == 60  # two blocks
  np.testing.assert_array_equal(whole[~mask], prepared.train_images[batch[~mask]])
  changes = augment.draw(ALL, 4, 6, batch[mask], 160, (8, 11))
  expected = np.stack(
    [_keras(image, *change) for image, *change in zip(raw[batch[mask]], *changes)]
  )
  np.testing.assert_allclose(whole[mask], preprocess.apply(prepared.transform, expected), atol=1e-5)
  tiles = [
    augment.target_images(run, prepared, 6, batch, start, min(start + 35, 120))
    for start in range(0, 120, 35)
  ]
  np.testing.assert_array_equal(np.concatenate(tiles), whole)
  threads = augment.target_images(run, prepared, 6, batch, 0, 120, threads=3)
  np.testing.assert_array_equal(threads, whole)
  untouched = augment.target_images(
    dataclasses.replace(run, augmentation=OFF), prepared, 6, batch, 0, 120
  )
  np.testing.assert_array_equal(untouched, prepared.train_images[batch])
