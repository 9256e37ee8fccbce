"""A run's TensorBoard events: `tensorboard --logdir=DIR`.

Each row of metrics.jsonl has a file of its own, made aside and renamed into place: none is ever
torn, and a row that is evaluated again replaces its own.
"""

import io
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorboardX
from absl import logging
from PIL import Image

from artifacts import files, pictures, run_directory, snapshots
from data import DataError, store
from data.classes import are_numbers
from distillation import evaluation

_SCALARS = {  # name in a row: group
  'krr_test_accuracy': 'test',
  'krr_test_mse': 'test',
  'nn_test_accuracy': 'test',
  'train_loss': 'train',
  'train_accuracy': 'train',
  'kernel_pairs_per_second': 'run',
  'wall_seconds': 'run',
}
# Training images whose range of brightness the support images of all steps are shown on.
_RANGE = 200


def write(
  directory: run_directory.RunDirectory,
  row: dict[str, Any],
  support: tuple[np.ndarray, np.ndarray] | None,
  prepared: store.Prepared,
) -> None:
  """Writes a row's numbers, and its support set as a grid of images and a heat map of labels.

  Args:
    directory: of the run.
    row: of metrics.jsonl.
    support: images [S, H, W, D], preprocessed space, and labels [S, C]; None: the numbers alone.
    prepared: the data set, whose preprocessing is undone for display.

  Raises:
    OSError: the file cannot be written.
  """
  with tempfile.TemporaryDirectory() as scratch:
    with tensorboardX.SummaryWriter(scratch) as writer:
      _add_numbers(writer, row, prepared.class_names)
      if support is not None:
        _add_pictures(writer, row['step'], *support, prepared)
    (name,) = os.listdir(scratch)
    with open(os.path.join(scratch, name), 'rb') as file:
      content = file.read()
  os.makedirs(directory.tensorboard, exist_ok=True)
  files.write_atomically(_path(directory, row['step']), content)


def write_missing(
  directory: run_directory.RunDirectory, rows: Sequence[dict[str, Any]], prepared: store.Prepared
) -> None:
  """Writes the files that rows of metrics.jsonl lack, with the support sets of their snapshots.

  Raises OSError.
  """
  image_shape, num_classes = prepared.train_images.shape[1:], prepared.num_classes
  for row in rows:
    if os.path.exists(_path(directory, row['step'])):
      continue
    support = None
    try:
      support = snapshots.read_checked(directory, row['step'], image_shape, num_classes)[:2]
    except DataError as error:
      logging.warning(
        'TensorBoard has the numbers of step %d, but no pictures: %s', row['step'], error
      )
    write(directory, row, support, prepared)


def _add_numbers(
  writer: tensorboardX.SummaryWriter, row: dict[str, Any], class_names: Sequence[str]
) -> None:
  step = row['step']
  for name, group in _SCALARS.items():
    if evaluation.has(row, name):
      network = evaluation.networks_in_words([row]) if name.startswith('nn') else ''
      # As an array without axes: tensorboardX 2.6 gives a number one, which NumPy 2.5 refuses.
      number = np.asarray(row[name])
      writer.add_scalar(f'{group}/{name}', number, step, summary_description=network)
  if evaluation.has(row, 'nn_test_accuracy'):
    writer.add_text('finite network', evaluation.network_in_words(row), step)
  if not are_numbers(class_names):
    names = ', '.join(f'{c} {name}' for c, name in enumerate(class_names))
    writer.add_text('classes', names, step)


def _add_pictures(
  writer: tensorboardX.SummaryWriter,
  step: int,
  images: np.ndarray,
  labels: np.ndarray,
  prepared: store.Prepared,
) -> None:
  transform, num_classes = prepared.transform, prepared.num_classes
  grid = pictures.grid(images, num_classes, transform, prepared.train_images[:_RANGE])
  writer.add_image('images', grid, step, dataformats='HWC')
  if transform.zca is not None:
    whitened = pictures.grid(images, num_classes)
    writer.add_image('images_whitened', whitened, step, dataformats='HWC')
  heat_map = Image.open(io.BytesIO(pictures.label_heat_map(labels, prepared.class_names)))
  writer.add_image('labels', np.asarray(heat_map.convert('RGB')), step, dataformats='HWC')


def _path(directory: run_directory.RunDirectory, step: int) -> str:
  return os.path.join(directory.tensorboard, f'events.out.tfevents.{step:010d}')
