"""`distilled.npz`: the distilled set as the papers' authors released theirs (`images`, `labels`), plus all it takes to use it again.

A whitening matrix is far larger than the set (75 MB for 32 x 32 x 3), so it lies beside: `transform.npz`, known by its hash.
"""

import json
import os
from typing import Any, NamedTuple

import numpy as np

from configs import base
from data import DataError
from data import NPZ_ERRORS
from data import preprocess
from data import released
from data import store
from nodes import run_directory

_SETTINGS = 'settings'
_TRANSFORM = 'transform.npz'

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
    settings: `data` (name and key), `step`, `run` (its whole configuration), `evaluation`, `label_offset` (one-hot + offset = label).
  """
  images: np.ndarray
  labels: np.ndarray
  transform: preprocess.Transform
  settings: dict[str, Any]


def save(path: str, images: np.ndarray, labels: np.ndarray, step: int, config: dict[str, Any], prepared: store.Prepared) -> None:
  """Writes `distilled.npz` atomically, and its whitening matrix before it; every entry loads with `numpy.load(path)`, no pickles."""
  settings = {'data': {'name': prepared.name, 'key': prepared.key}, 'step': step, 'run': config['run'],
              'evaluation': config['system']['evaluation'], 'label_offset': -1 / prepared.num_classes}
  transform = prepared.transform
  if transform.zca is not None:
    run_directory.write_atomically(_beside(path), lambda file: np.savez(file, zca=transform.zca))
  run_directory.write_atomically(path, lambda file: np.savez(
      file, images=np.asarray(images, np.float32), labels=np.asarray(labels, np.float32), mean=transform.mean, std=transform.std,
      norm=transform.norm, zca_sha256=preprocess.digest(transform), **{_SETTINGS: json.dumps(settings)}))


def load(path: str) -> Distilled:
  """Reads what `save` wrote. Raises DataError."""
  try:
    with np.load(path, allow_pickle=False) as file:
      transform = preprocess.Transform(file['mean'], file['std'], norm=float(file['norm']))
      digest = str(file['zca_sha256'])
      distilled = Distilled(file['images'], file['labels'], transform, json.loads(str(file[_SETTINGS])))
  except NPZ_ERRORS as error:
    raise DataError(f'{path!r} is not a distilled set: {error}') from error
  return distilled._replace(transform=transform._replace(zca=_load_zca(path, digest))) if digest else distilled


def load_released(name: str, cache: str, folder: str = '') -> Distilled:
  """A set that the papers' authors released, with the transform that belongs to it, which their files do not hold.

  The transform is fitted here, on the whole training set; theirs may have been fitted on part of it (see `preprocess.fit`).

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
  config = base.get_config().to_dict()
  run = config['run']
  run['data'].update(name=found.data, dir=folder, zca=found.zca)
  run.update(architecture=found.architecture, images_per_class=len(found.labels) // found.labels.shape[1],
             learn_labels=found.learned_labels)
  prepared = store.prepare(run['data'], cache)
  if prepared.train_images.shape[1:] != found.images.shape[1:] or prepared.num_classes != found.labels.shape[1]:
    raise DataError(f'{name} belongs to {found.data}: images {found.images.shape[1:]}, {found.labels.shape[1]} classes; '
                    f'{folder!r} holds images {prepared.train_images.shape[1:]}, {prepared.num_classes} classes.')
  settings = {'data': {'name': found.data, 'key': prepared.key}, 'step': found.step, 'run': run,
              'evaluation': config['system']['evaluation'], 'label_offset': -1 / prepared.num_classes}
  return Distilled(found.images, found.labels, prepared.transform, settings)


def _load_zca(path: str, digest: str) -> np.ndarray:
  try:
    with np.load(_beside(path), allow_pickle=False) as file:
      zca = file['zca']
  except NPZ_ERRORS as error:
    raise DataError(f'{path!r} was whitened by the matrix in {_beside(path)!r}, which cannot be read: {error}') from error
  if preprocess.digest(preprocess.Transform(None, None, zca)) != digest:
    raise DataError(f'{_beside(path)!r} is not the matrix that {path!r} was whitened by: their hashes differ.')
  return zca


def _beside(path: str) -> str:
  return os.path.join(os.path.dirname(path), _TRANSFORM)
