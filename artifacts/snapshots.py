"""Snapshots of a run, `snapshots/STEP.npz`: the support set and the metrics of a step.

The evaluator, the report and TensorBoard read them.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from artifacts import files
from artifacts.run_directory import RunDirectory
from data import DataError, npz


class Snapshot(NamedTuple):
  """The support set after a step.

  Attributes:
    images: float32 [S, H, W, D], preprocessed space.
    labels: float32 [S, C], centred.
    metrics: of the step, such as `train_loss`: part of its row in metrics.jsonl.
  """

  images: np.ndarray
  labels: np.ndarray
  metrics: dict[str, Any]


def write(
  directory: RunDirectory,
  step: int,
  images: np.ndarray,
  labels: np.ndarray,
  metrics: Mapping[str, Any],
) -> None:
  """Writes the snapshot of a step, images [S, H, W, D] and labels [S, C] as float32.

  Raises OSError.
  """
  arrays = {
    'images': np.asarray(images, np.float32),
    'labels': np.asarray(labels, np.float32),
    'metrics': np.array(json.dumps(dict(metrics))),
  }
  files.write_atomically(directory.snapshot(step), lambda file: np.savez(file, **arrays))


def steps(directory: RunDirectory) -> list[int]:
  """Steps whose snapshots are there, readable or not, in order."""
  names = (os.path.splitext(name) for name in os.listdir(directory.snapshots))
  return sorted(int(stem) for stem, extension in names if extension == '.npz' and stem.isdigit())


def read(directory: RunDirectory, step: int) -> Snapshot:
  """Reads the snapshot of a step. Raises DataError where it is missing or damaged."""
  try:
    arrays = npz.read(directory.snapshot(step), ('images', 'labels', 'metrics'))
    return Snapshot(arrays['images'], arrays['labels'], json.loads(str(arrays['metrics'])))
  except ValueError as error:
    raise DataError(f'the snapshot of step {step} cannot be read ({error})') from error


def read_checked(
  directory: RunDirectory, step: int, image_shape: Sequence[int], num_classes: int
) -> Snapshot:
  """Reads the snapshot of a step, whose arrays must have the shapes of the run.

  Args:
    directory: of the run.
    step: of the snapshot.
    image_shape: (H, W, D) of the data set.
    num_classes: `C`.

  Raises:
    DataError: it cannot be read, or has other shapes; the message names the snapshots beside it.
  """
  num_images = directory.read_saved().config.run.images_per_class * num_classes
  expected = (num_images, *image_shape), (num_images, num_classes)
  try:
    snapshot = read(directory, step)
    found = snapshot.images.shape, snapshot.labels.shape
    if found != expected:
      raise DataError(
        f'the snapshot of step {step} cannot be read (images {found[0]}, labels {found[1]} '
        f'instead of {expected[0]}, {expected[1]})'
      )
  except DataError as error:
    others = ', '.join(str(other) for other in steps(directory) if other != step)
    there = f'there are those of steps {others}' if others else 'there is no other'
    raise DataError(f'{error}; {there}.') from error
  return snapshot
