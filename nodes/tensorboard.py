"""A run's TensorBoard events: `tensorboard --logdir=DIR`.

One file a snapshot, made aside and renamed into place: none is ever torn, and one that is evaluated again replaces its own.
"""

import io
import os
import tempfile
from typing import Any

import numpy as np
from PIL import Image
import tensorboardX

from data import store
from nodes import pictures
from nodes import run_directory

_GROUPS = {'krr': 'test', 'nn': 'test', 'train': 'train'}  # of scalars, by the first word of their names
_RANGE = 200  # training images: on their range of brightness the support images of all steps are shown


def write(directory: run_directory.RunDirectory, row: dict[str, Any], images: np.ndarray, labels: np.ndarray,
          prepared: store.Prepared) -> None:
  """Writes a row's numbers, and the support set it is about as a grid of images and a heat map of labels.

  Args:
    directory: of the run.
    row: of metrics.jsonl.
    images: [S, H, W, D], preprocessed space; labels: [S, C].
    prepared: the data set, whose preprocessing is undone for display.

  Raises:
    OSError: the files cannot be written.
  """
  transform = prepared.transform
  step, num_classes = row['step'], labels.shape[1]
  with tempfile.TemporaryDirectory() as scratch:
    with tensorboardX.SummaryWriter(scratch) as writer:
      for name, value in row.items():
        if isinstance(value, (int, float)) and name != 'step':
          writer.add_scalar(f'{_GROUPS.get(name.split("_")[0], "run")}/{name}', value, step)
      writer.add_image('images', pictures.grid(images, num_classes, transform, prepared.train_images[:_RANGE]), step, dataformats='HWC')
      if transform.zca is not None:
        writer.add_image('images_whitened', pictures.grid(images, num_classes), step, dataformats='HWC')
      writer.add_image('labels', np.asarray(Image.open(io.BytesIO(pictures.label_heat_map(labels))).convert('RGB')), step, dataformats='HWC')
    (name,) = os.listdir(scratch)
    with open(os.path.join(scratch, name), 'rb') as file:
      content = file.read()
  os.makedirs(directory.tensorboard, exist_ok=True)
  run_directory.write_atomically(os.path.join(directory.tensorboard, f'events.out.tfevents.{step:010d}'), lambda file: file.write(content))
