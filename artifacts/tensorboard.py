"""A run's TensorBoard events: `tensorboard --logdir=DIR`.

One file a snapshot, made aside and renamed into place: none is ever torn, and one that is evaluated
again replaces its own.
"""

import io
import os
import tempfile
from typing import Any, Sequence

import numpy as np
import tensorboardX
from absl import logging
from PIL import Image

from artifacts import distilled_set, pictures, run_directory
from data import DataError, store
from data.classes import are_numbers
from distillation import evaluation

_SCALARS = {
  'krr_test_accuracy': 'test',
  'krr_test_mse': 'test',
  'nn_test_accuracy': 'test',
  'train_loss': 'train',
  # Name in a row: group.
  'train_accuracy': 'train',
  'kernel_pairs_per_second': 'run',
  'wall_seconds': 'run',
}
# Training images: on their range of brightness the support images of all steps are shown.
_RANGE = 200


def write(
  directory: run_directory.RunDirectory,
  row: dict[str, Any],
  images: np.ndarray | None,
  labels: np.ndarray | None,
  prepared: store.Prepared,
) -> None:
  """Writes a row's numbers, and the support set it is about as a grid of images and a heat map of
  labels.

  Args:
    directory: of the run.
    row: of metrics.jsonl.
    images: [S, H, W, D], preprocessed space; labels: [S, C]; both None: the numbers alone.
    prepared: the data set, whose preprocessing is undone for display.

  Raises:
    OSError: the files cannot be written.
  """
  transform = prepared.transform
  step, num_classes = row['step'], prepared.num_classes
  with tempfile.TemporaryDirectory() as scratch:
    with tensorboardX.SummaryWriter(scratch) as writer:
      for name, group in _SCALARS.items():
        if evaluation.has(row, name):
          network = evaluation.networks_in_words([row]) if name.startswith('nn') else ''
          writer.add_scalar(f'{group}/{name}', row[name], step, summary_description=network)
      if evaluation.has(row, 'nn_test_accuracy'):
        writer.add_text('finite network', evaluation.network_in_words(row), step)
      if not are_numbers(prepared.class_names):
        names = ', '.join(f'{c} {name}' for c, name in enumerate(prepared.class_names))
        writer.add_text('classes', names, step)
      if images is not None:
        shown = pictures.grid(images, num_classes, transform, prepared.train_images[:_RANGE])
        writer.add_image('images', shown, step, dataformats='HWC')
        if transform.zca is not None:
          whitened = pictures.grid(images, num_classes)
          writer.add_image('images_whitened', whitened, step, dataformats='HWC')
        heat_map = io.BytesIO(pictures.label_heat_map(labels, prepared.class_names))
        shown = np.asarray(Image.open(heat_map).convert('RGB'))
        writer.add_image('labels', shown, step, dataformats='HWC')
    (name,) = os.listdir(scratch)
    with open(os.path.join(scratch, name), 'rb') as file:
      content = file.read()
  os.makedirs(directory.tensorboard, exist_ok=True)
  run_directory.write_atomically(_path(directory, step), lambda file: file.write(content))


def write_missing(
  directory: run_directory.RunDirectory, rows: Sequence[dict[str, Any]], prepared: store.Prepared
) -> None:
  """Writes the files that rows of metrics.jsonl lack, with images and labels of their snapshots.

  Raises OSError.
  """
  size, num_classes = prepared.train_images.shape[1:], prepared.num_classes
  for row in rows:
    if os.path.exists(_path(directory, row['step'])):
      continue
    try:
      images, labels = distilled_set.load_snapshot(directory, row['step'], size, num_classes)
    except DataError as error:
      logging.warning(
        'TensorBoard has the numbers of step %d, but no pictures: %s', row['step'], error
      )
      images = labels = None
    write(directory, row, images, labels, prepared)


def _path(directory: run_directory.RunDirectory, step: int) -> str:
  return os.path.join(directory.tensorboard, f'events.out.tfevents.{step:010d}')
