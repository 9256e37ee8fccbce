"""The events hold the row and the set, and a snapshot that is evaluated twice is there once."""

import io
import json
import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from artifacts import files, run_directory, snapshots, tensorboard
from configs import schema
from data import preprocess, store

ROW = {
  'step': 3,
  'krr_test_accuracy': 0.75,
  'nn_selected_on': None,
  'nn_seeds': 2,
  'train_loss': 0.125,
  'wall_seconds': 7.0,
}


def _prepared(images, transform, class_names):
  """Two classes of training images [N, H, W, D]."""
  classes = np.arange(len(images)) % 2
  return store.Prepared(
    '', '', '', images, classes, images, classes, 2, transform, class_names=class_names
  )


def _events(path) -> Iterator[Any]:
  """Events of a file in TensorFlow's record format: length, its checksum, event, its checksum."""
  with open(path, 'rb') as file:
    while header := file.read(12):
      event: Any = event_pb2.Event()  # whose fields are made at run time
      event.ParseFromString(file.read(struct.unpack('<Q', header[:8])[0]))
      yield event
      file.read(4)


def _values(directory):
  """{(tag, step): [value, ...]} over all files, in TensorBoard's order."""
  found = {}
  for name in sorted(os.listdir(directory.tensorboard)):
    assert 'tfevents' in name
    for event in _events(os.path.join(directory.tensorboard, name)):
      for value in event.summary.value:
        found.setdefault((value.tag, event.step), []).append(value)
  return found


# NumPy 2.5 makes it an error.
@pytest.mark.filterwarnings('error:Conversion of an array with ndim > 0:DeprecationWarning')
def test_a_row_and_its_set_once(tmp_path):
  """Two images of one grey each, in the space of (x - 10) / 20; training images from 0 to 40."""
  directory = run_directory.RunDirectory(str(tmp_path))
  train = np.linspace(-0.5, 1.5, 2 * 4 * 4, dtype=np.float32).reshape(2, 4, 4, 1)
  transform = preprocess.Transform(np.array([10.0]), np.array([20.0]))
  prepared = _prepared(train, transform, ('cat', 'dog'))
  # Pixels 20 and 30.
  images = np.array([0.5, 1.0], np.float32)[:, None, None, None] * np.ones((2, 4, 4, 1), np.float32)
  labels = np.array([[0.9, -0.1], [-0.4, 0.2]])
  for step in (3, 12, 3):
    tensorboard.write(directory, {**ROW, 'step': step}, (images, labels), prepared)
  assert sorted(os.listdir(directory.tensorboard)) == [
    'events.out.tfevents.0000000003',
    'events.out.tfevents.0000000012',
  ]
  found = _values(directory)
  assert {tag for tag, _ in found} == {
    'test/krr_test_accuracy',
    'train/train_loss',
    'run/wall_seconds',
    'images',
    'labels',
    'classes/text_summary',
  }
  assert found['classes/text_summary', 12][0].tensor.string_val == [b'0 cat, 1 dog']
  assert all(len(values) == 1 and step in (3, 12) for (_, step), values in found.items())
  assert (
    found['test/krr_test_accuracy', 12][0].simple_value == 0.75
    and found['train/train_loss', 3][0].simple_value == 0.125
  )
  picture = np.asarray(Image.open(io.BytesIO(found['images', 3][0].image.encoded_image_string)))
  height, width = picture.shape[:2]
  assert abs(int(picture[height // 2, width // 4, 0]) - 255 * 20 / 40) <= 1
  assert abs(int(picture[height // 2, 3 * width // 4, 0]) - 255 * 30 / 40) <= 1
  heat = Image.open(io.BytesIO(found['labels', 3][0].image.encoded_image_string))
  assert min(heat.size) > 300


def test_the_accuracy_of_a_finite_network_says_of_which(tmp_path):
  directory = run_directory.RunDirectory(str(tmp_path))
  images = np.zeros((2, 4, 4, 1), np.float32)
  prepared = _prepared(images, preprocess.Transform(np.zeros(1), np.ones(1)), ('0', '1'))
  row = {**ROW, 'nn_test_accuracy': 0.5, 'nn_width': 128, 'nn_steps': 1000, 'train_accuracy': None}
  tensorboard.write(directory, row, (images, np.eye(2)), prepared)
  found = _values(directory)
  (value,) = found['test/nn_test_accuracy', 3]
  assert value.simple_value == 0.5
  assert value.metadata.summary_description == 'width 128, 1000 updates'
  (text,) = found['finite network/text_summary', 3]
  assert text.tensor.string_val == [b'50.00 % (width 128, 1000 updates)']
  assert ('train/train_accuracy', 3) not in found and ('classes/text_summary', 3) not in found


@pytest.mark.parametrize('damage', [None, 'garbage', 'other shapes', 'no file'])
def test_files_that_are_missing_are_written_from_the_snapshots(tmp_path, caplog, damage):
  directory = run_directory.RunDirectory(str(tmp_path))
  os.makedirs(directory.snapshots)
  saved = run_directory.Saved(schema.Config(), f'{0:032x}-standard')
  files.write_atomically(directory.config, json.dumps(saved.to_dict()))
  images = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
  labels = np.eye(2, dtype=np.float32)
  prepared = _prepared(images, preprocess.Transform(np.zeros(1), np.ones(1)), ('cat', 'dog'))
  rows = [{**ROW, 'step': step} for step in (0, 3)]
  for row in rows:
    snapshots.write(directory, row['step'], images, labels, {})
    tensorboard.write(directory, row, (images, labels), prepared)
  kept = os.path.join(directory.tensorboard, 'events.out.tfevents.0000000000')
  whole = _values(directory)
  before = os.stat(kept).st_mtime_ns
  os.remove(os.path.join(directory.tensorboard, 'events.out.tfevents.0000000003'))
  if damage == 'garbage':
    os.truncate(directory.snapshot(3), 50)
  elif damage == 'other shapes':
    snapshots.write(directory, 3, images[:, :3], labels, {})
  elif damage == 'no file':
    os.remove(directory.snapshot(3))
  tensorboard.write_missing(directory, rows, prepared)
  found = _values(directory)
  assert found['test/krr_test_accuracy', 3][0].simple_value == 0.75
  assert os.stat(kept).st_mtime_ns == before
  if damage:
    assert found.keys() == whole.keys() - {('images', 3), ('labels', 3)}
    assert 'TensorBoard has the numbers of step 3, but no pictures: the snapshot' in caplog.text
  else:
    assert found == whole


def test_whitened_images_are_shown_as_kernels_see_them_too(tmp_path):
  directory = run_directory.RunDirectory(str(tmp_path))
  images = np.random.default_rng(0).normal(size=(4, 3, 3, 1)).astype(np.float32)
  prepared = _prepared(images, preprocess.fit(images, 0.1), ('0', '1'))
  labels = np.eye(2)[[0, 0, 1, 1]] - 0.5
  tensorboard.write(directory, ROW, (images, labels), prepared)
  found = _values(directory)
  images, whitened = (
    found[tag, 3][0].image.encoded_image_string for tag in ('images', 'images_whitened')
  )
  assert images != whitened
