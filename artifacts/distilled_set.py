"""`distilled.npz`: a distilled set, and all it takes to use it again.

`images` and `labels` are as in the files that the papers' authors released. The whitening matrix,
far larger than the set (75 MB for 32 x 32 x 3), is beside it in `transform.npz`, whose hash the set
has.
"""

import dataclasses
import json
import os
from typing import Any, NamedTuple

import numpy as np

from artifacts import files
from configs import schema
from data import DataError, npz, preprocess, released, store

_ARRAYS = ('images', 'labels', 'mean', 'std', 'norm', 'zca_sha256', 'settings')  # that it must have
# How to load one, for the documents: images [S, H, W, D] and labels [S, C], float32.
_READ = "file = numpy.load('distilled.npz')\n"
LOADING = {
  'NumPy': _READ + "images, labels = file['images'], file['labels']",
  'JAX': _READ
  + "images, labels = jax.numpy.asarray(file['images']), jax.numpy.asarray(file['labels'])",
  'PyTorch': _READ
  + "images, labels = torch.from_numpy(file['images']), torch.from_numpy(file['labels'])",
}


class Distilled(NamedTuple):
  """A distilled set.

  Attributes:
    images: float32 [S, H, W, D], preprocessed space.
    labels: float32 [S, C], centred.
    transform: raw pixels -> preprocessed space.
    settings: JSON; files of other versions may have less or more of it. `data` (`name`, `key`,
      `class_names`), `step`, `run` and `evaluation` (the configuration's groups of these names),
      `label_offset` (one-hot + offset = label).
  """

  images: np.ndarray
  labels: np.ndarray
  transform: preprocess.Transform
  settings: dict[str, Any]

  @property
  def class_names(self) -> list[str]:
    """`C` names, of the labels' columns; numbers where the file has no names."""
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
  """Writes a distilled set atomically, and before it its whitening matrix, without pickles.

  Args:
    path: of `distilled.npz`.
    images: [S, H, W, D], preprocessed space.
    labels: [S, C], centred.
    step: updates that made it.
    config: of the run.
    prepared: its data set.

  Raises:
    OSError: a file cannot be written.
  """
  transform = prepared.transform
  if transform.zca is not None:
    zca = transform.zca
    files.write_atomically(_transform_path(path), lambda file: np.savez(file, zca=zca))
  arrays = {
    'images': np.asarray(images, np.float32),
    'labels': np.asarray(labels, np.float32),
    'mean': transform.mean,
    'std': transform.std,
    'norm': np.array(transform.norm),
    'zca_sha256': np.array(preprocess.digest(transform)),
    'class_names': np.array(prepared.class_names, str),
    'settings': np.array(
      json.dumps(_settings(prepared, step, config.run, config.system.evaluation))
    ),
  }
  files.write_atomically(path, lambda file: np.savez(file, **arrays))


def load(path: str) -> Distilled:
  """Reads what `save` wrote. Raises DataError."""
  try:
    arrays = npz.read(path, _ARRAYS)
    settings, norm = json.loads(str(arrays['settings'])), float(arrays['norm'])
  except (ValueError, TypeError) as error:
    raise DataError(f'{path!r} is not a distilled set: {error}') from error
  transform = preprocess.Transform(arrays['mean'], arrays['std'], norm=norm)
  if digest := str(arrays['zca_sha256']):
    transform = transform._replace(zca=_load_zca(path))
    if preprocess.digest(transform) != digest:
      raise DataError(
        f'{_transform_path(path)!r} is not the matrix that {path!r} was whitened by: '
        'their hashes differ.'
      )
  return Distilled(arrays['images'], arrays['labels'], transform, settings)


def load_released(name: str, cache: str, folder: str = '') -> Distilled:
  """Loads a set that the papers' authors released, with a transform, which their files lack.

  The transform is fitted here, on the whole training set; theirs may have been fitted on part of it
  (see `preprocess.fit`).

  Args:
    name: in their bucket, see `released.load`.
    cache: folder for it and for the prepared data set.
    folder: of the data set it was distilled from (`run.data.dir`); '' takes it from the hub.

  Returns:
    The set; its `settings` are the defaults of configs/schema.py but for what the name says.

  Raises:
    DataError: as `released.load` and `store.prepare`; or `folder` holds another data set.
  """
  found = released.load(name, cache)
  num_classes = found.labels.shape[1]
  run = schema.Run(
    data=schema.Data(name=found.data, dir=folder, zca=found.zca),
    architecture=found.architecture,
    images_per_class=len(found.labels) // num_classes,
    learn_labels=found.learned_labels,
  )
  prepared = store.prepare(run.data, cache)
  expected, there = found.images.shape[1:], prepared.train_images.shape[1:]
  if (there, prepared.num_classes) != (expected, num_classes):
    raise DataError(
      f'{name} belongs to {found.data}: images {expected}, {num_classes} classes; '
      f'{folder!r} holds images {there}, {prepared.num_classes} classes.'
    )
  settings = _settings(prepared, found.step, run, schema.Evaluation())
  return Distilled(found.images, found.labels, prepared.transform, settings)


def raw_images(distilled: Distilled) -> np.ndarray:
  """Undoes the preprocessing.

  Returns:
    uint8 [S, H, W, D], in the raw data's own units (digits: 0 to 16), rounded and clipped to 0 to
    255.
  """
  raw = preprocess.invert(distilled.transform, distilled.images)
  return np.clip(np.round(raw), 0, 255).astype(np.uint8)


def _settings(
  prepared: store.Prepared, step: int, run: schema.Run, evaluation: schema.Evaluation
) -> dict[str, Any]:
  """`Distilled.settings`."""
  return {
    'data': {'name': prepared.name, 'key': prepared.key, 'class_names': list(prepared.class_names)},
    'step': step,
    'run': dataclasses.asdict(run),
    'evaluation': dataclasses.asdict(evaluation),
    'label_offset': -1 / prepared.num_classes,
  }


def _load_zca(path: str) -> np.ndarray:
  """The whitening matrix, float64 [d, d], that belongs to a distilled set. Raises DataError."""
  try:
    return npz.read(_transform_path(path), ('zca',))['zca']
  except DataError as error:
    raise DataError(
      f'{path!r} was whitened by the matrix in {_transform_path(path)!r}, which cannot be read: '
      f'{error}'
    ) from error


def _transform_path(path: str) -> str:
  return os.path.join(os.path.dirname(path), 'transform.npz')
