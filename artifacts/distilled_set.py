"""`distilled.npz`: the distilled set as the papers' authors released theirs (`images`, `labels`),
plus all it takes to use it again.

A whitening matrix is far larger than the set (75 MB for 32 x 32 x 3), so it lies beside:
`transform.npz`, known by its hash. Written out:

    python -m artifacts.distilled_set DIR/distilled.npz --to=FOLDER --format=images

makes FOLDER/CLASS/FILE.png (raw pixel values, rounded to 8 bits) and labels.csv; --format=dataset
a Hugging Face dataset folder: `datasets.load_dataset(FOLDER)` gives `image` (the same PNG), `label`
(a ClassLabel, by name), and exact `pixels` [H, W, D] and `soft_label` [C].

In place of DIR/distilled.npz may stand the name of a set that the papers' authors released
(data/released.py); it is fetched, as is the data set it stands for, unless --config=FILE
--config.run.data.dir=FOLDER says where that is.
"""

import csv
import dataclasses
import io
import json
import os
import pathlib
import re
import sys
from typing import Any, NamedTuple, Sequence

import numpy as np
from absl import flags

from artifacts import run_directory
from configs import base, schema
from data import NPZ_ERRORS, DataError, preprocess, released, store
from programs import command_line

_SETTINGS = 'settings'
_TRANSFORM = 'transform.npz'
_LABELS = 'labels.csv'
_FOLDER_NAME_LENGTH = 60  # characters, four bytes each at most: file systems allow 255 bytes

LOADING = {  # the documented lines: images [S, H, W, D] and labels [S, C], float32
  'NumPy': "images, labels = (numpy.load('distilled.npz')[name] for name in ('images', 'labels'))",
  'JAX': "images, labels = (jax.numpy.asarray(numpy.load('distilled.npz')[name]) for name in ('images', 'labels'))",
  'PyTorch': "images, labels = (torch.from_numpy(numpy.load('distilled.npz')[name]) for name in ('images', 'labels'))",
}


class Distilled(NamedTuple):
  """A distilled set.

  Attributes:
    images: float32 [S, H, W, D], preprocessed space.
    labels: float32 [S, C], centred.
    transform: raw pixels -> preprocessed space.
    settings: `data` (name, key, class names), `step`, `run` (its whole configuration),
      `evaluation`, `label_offset` (one-hot + offset = label).
  """

  images: np.ndarray
  labels: np.ndarray
  transform: preprocess.Transform
  settings: dict[str, Any]

  @property
  def class_names(self) -> list[str]:
    """`C` names: column c of the labels is of class_names[c]; numbers in files without names."""
    numbers = [str(c) for c in range(self.labels.shape[1])]
    return self.settings.get('data', {}).get('class_names', numbers)


def save(
  path: str,
  images: np.ndarray,
  labels: np.ndarray,
  step: int,
  config: schema.Config,
  prepared: store.Prepared,
) -> None:
  """Writes `distilled.npz` atomically, and its whitening matrix before it; every entry loads with
  `numpy.load(path)`, no pickles."""
  settings = {
    'data': _data(prepared),
    'step': step,
    'run': dataclasses.asdict(config.run),
    'evaluation': dataclasses.asdict(config.system.evaluation),
    'label_offset': -1 / prepared.num_classes,
  }
  transform = prepared.transform
  if transform.zca is not None:
    run_directory.write_atomically(_beside(path), lambda file: np.savez(file, zca=transform.zca))
  run_directory.write_atomically(
    path,
    lambda file: np.savez(
      file,
      images=np.asarray(images, np.float32),
      labels=np.asarray(labels, np.float32),
      mean=transform.mean,
      std=transform.std,
      norm=transform.norm,
      zca_sha256=preprocess.digest(transform),
      class_names=np.array(prepared.class_names, str),
      **{_SETTINGS: json.dumps(settings)},
    ),
  )


def load(path: str) -> Distilled:
  """Reads what `save` wrote. Raises DataError."""
  try:
    with np.load(path, allow_pickle=False) as file:
      transform = preprocess.Transform(file['mean'], file['std'], norm=float(file['norm']))
      digest = str(file['zca_sha256'])
      distilled = Distilled(
        file['images'], file['labels'], transform, json.loads(str(file[_SETTINGS]))
      )
  except NPZ_ERRORS as error:
    raise DataError(f'{path!r} is not a distilled set: {error}') from error
  return (
    distilled._replace(transform=transform._replace(zca=_load_zca(path, digest)))
    if digest
    else distilled
  )


def load_released(name: str, cache: str, folder: str = '') -> Distilled:
  """A set that the papers' authors released, with the transform that belongs to it, which their
  files do not hold.

  The transform is fitted here, on the whole training set; theirs may have been fitted on part of it
  (see `preprocess.fit`).

  Args:
    name: in their bucket, see `released.load`.
    cache: folder for it and for the prepared data set.
    folder: of the data set it stands for (`run.data.dir`); '' takes it from the hub.

  Returns:
    `settings` are those of configs/base.py, the published ones, with what the name tells.

  Raises:
    DataError: as `released.load` and `store.prepare`.
  """
  found = released.load(name, cache)
  run = schema.Run(
    data=schema.Data(name=found.data, dir=folder, zca=found.zca),
    architecture=found.architecture,
    images_per_class=len(found.labels) // found.labels.shape[1],
    learn_labels=found.learned_labels,
  )
  prepared = store.prepare(run.data, cache)
  if (
    prepared.train_images.shape[1:] != found.images.shape[1:]
    or prepared.num_classes != found.labels.shape[1]
  ):
    raise DataError(
      f'{name} belongs to {found.data}: images {found.images.shape[1:]}, {found.labels.shape[1]} classes; '
      f'{folder!r} holds images {prepared.train_images.shape[1:]}, {prepared.num_classes} classes.'
    )
  settings = {
    'data': _data(prepared),
    'step': found.step,
    'run': dataclasses.asdict(run),
    'evaluation': dataclasses.asdict(schema.Evaluation()),
    'label_offset': -1 / prepared.num_classes,
  }
  return Distilled(found.images, found.labels, prepared.transform, settings)


def raw_images(distilled: Distilled) -> np.ndarray:
  """uint8 [S, H, W, D]: preprocessing undone, in the raw data's own units (digits: 0 to 16),
  rounded and clipped to 0 to 255."""
  return np.clip(np.round(preprocess.invert(distilled.transform, distilled.images)), 0, 255).astype(
    np.uint8
  )


def load_snapshot(
  directory: run_directory.RunDirectory, step: int, size: Sequence[int], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
  """Images float32 [S, H, W, D], preprocessed space, and labels float32 [S, C] of a run's snapshot.

  Args:
    directory: of the run.
    step: of the snapshot.
    size: (H, W, D) of the data set.
    num_classes: `C`.

  Raises:
    DataError: it cannot be read, or its arrays have other shapes.
  """
  num_images = directory.read_saved().config.run.images_per_class * num_classes
  try:
    with np.load(directory.snapshot(step), allow_pickle=False) as file:
      images, labels = file['images'], file['labels']
    shapes = (num_images, *size), (num_images, num_classes)
    if (images.shape, labels.shape) != shapes:
      raise ValueError(
        f'images {images.shape}, labels {labels.shape} instead of {shapes[0]}, {shapes[1]}'
      )
  except NPZ_ERRORS as error:
    others = ', '.join(str(other) for other in directory.snapshot_steps() if other != step)
    there = f'there are those of steps {others}' if others else 'there is no other'
    raise DataError(f'the snapshot of step {step} cannot be read ({error}); {there}.') from error
  return images, labels


def write_images(distilled: Distilled, folder: str) -> None:
  """FOLDER/CLASS/NUMBER.png and FOLDER/labels.csv (file, and the label of each class). Raises
  DataError, OSError."""
  pictures, (num_images, num_classes) = _pictures(distilled), distilled.labels.shape
  folders, lines = _folder_names(distilled.class_names), io.StringIO()
  table = csv.writer(lines, lineterminator='\n')
  table.writerow(['file', *(f'label_{name}' for name in distilled.class_names)])
  for i, (picture, label) in enumerate(zip(pictures, distilled.labels)):
    name = f'{folders[i * num_classes // num_images]}/{i:05d}.png'
    os.makedirs(os.path.join(folder, os.path.dirname(name)), exist_ok=True)
    picture.save(os.path.join(folder, name))
    table.writerow([name, *(f'{value:.9g}' for value in label)])
  run_directory.write_atomically(os.path.join(folder, _LABELS), lines.getvalue())


def write_dataset(distilled: Distilled, folder: str) -> None:
  """FOLDER/train.parquet, which `datasets.load_dataset(FOLDER)` reads. Raises DataError,
  OSError."""
  import datasets  # here, because workers import this module

  pictures, (num_images, num_classes) = _pictures(distilled), distilled.labels.shape
  features = datasets.Features(
    {
      'image': datasets.Image(),
      'label': datasets.ClassLabel(names=distilled.class_names),
      'pixels': datasets.Array3D(distilled.images.shape[1:], 'float32'),
      'soft_label': datasets.List(datasets.Value('float32'), num_classes),
    }
  )
  os.makedirs(folder, exist_ok=True)
  datasets.Dataset.from_dict(
    {
      'image': pictures,
      'label': [i * num_classes // num_images for i in range(num_images)],
      'pixels': list(distilled.images),
      'soft_label': distilled.labels.tolist(),
    },
    features=features,
  ).to_parquet(os.path.join(folder, 'train.parquet'))


def _data(prepared: store.Prepared) -> dict[str, Any]:
  return {'name': prepared.name, 'key': prepared.key, 'class_names': list(prepared.class_names)}


def _folder_names(class_names: Sequence[str]) -> list[str]:
  """Different names of folders on any system, as near as may be to those of the classes."""
  names = []
  for c, class_name in enumerate(class_names):
    name = re.sub(r'[^\w.+() -]', '_', class_name)[:_FOLDER_NAME_LENGTH].strip('. ')
    taken = [_LABELS, *(other.lower() for other in names)]
    while not name or name.lower() in taken or pathlib.PureWindowsPath(name).is_reserved():
      name = f'{c}_{name}'
    names.append(name)
  return names


def _pictures(distilled: Distilled) -> list[Any]:
  from PIL import Image

  channels = distilled.images.shape[-1]
  if channels not in (1, 3):
    raise DataError(f'PNG files hold 1 or 3 channels; these images have {channels}.')
  return [
    Image.fromarray(image[..., 0] if channels == 1 else image) for image in raw_images(distilled)
  ]


def _load_zca(path: str, digest: str) -> np.ndarray:
  try:
    with np.load(_beside(path), allow_pickle=False) as file:
      zca = file['zca']
  except NPZ_ERRORS as error:
    raise DataError(
      f'{path!r} was whitened by the matrix in {_beside(path)!r}, which cannot be read: {error}'
    ) from error
  if preprocess.digest(preprocess.Transform(None, None, zca)) != digest:
    raise DataError(
      f'{_beside(path)!r} is not the matrix that {path!r} was whitened by: their hashes differ.'
    )
  return zca


def _beside(path: str) -> str:
  return os.path.join(os.path.dirname(path), _TRANSFORM)


def main(argv: Sequence[str]) -> int:
  """Writes a distilled set out in another format; returns the exit status."""
  flags.DEFINE_string('to', None, 'Folder to write to; it must be empty or not there.')
  flags.DEFINE_string(
    'format',
    'images',
    'images: FOLDER/CLASS/FILE.png and labels.csv; dataset: a Hugging Face dataset folder.',
  )
  writers = {'images': write_images, 'dataset': write_dataset}
  try:
    path, *rest = [argument for argument in argv[1:] if not argument.startswith('-')] or [None]
    command_line.parse(
      [argument for argument in argv if argument != path],
      'DIR/distilled.npz --to=FOLDER --format=images|dataset',
    )
    folder, wanted = flags.FLAGS.to, flags.FLAGS.format
    if path is None or rest or not folder:
      raise command_line.BadInput('expected DIR/distilled.npz --to=FOLDER --format=images|dataset.')
    if wanted not in writers:
      raise command_line.BadInput(f'--format must be one of {", ".join(writers)}; got {wanted!r}.')
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
      raise command_line.BadInput(
        f'--to={folder} is there and not an empty folder; choose another.'
      )
    config = command_line.CONFIG.value or base.get_config()
    cache = store.cache_folder(config.system.cache_dir)
    if released.is_name(path):
      distilled = load_released(path, cache, config.run.data.dir)
    else:
      distilled = load(path)
    writers[wanted](distilled, folder)
  except (command_line.BadInput, DataError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return run_directory.BAD_INPUT_STATUS
  print(f'{len(distilled.images)} images in {folder}')
  return 0


if __name__ == '__main__':
  command_line.exit_with(main)
