"""`distilled.npz`: the distilled set as the papers' authors released theirs (`images`, `labels`), plus all it takes to use it again.

A whitening matrix is as large as a hundred CIFAR-10 images are small (75 MB), so it lies beside: `transform.npz`, known by its hash.
"""

import json
import os
from typing import Any, NamedTuple

import numpy as np

from data import DataError
from data import preprocess
from data import sources
from data import store
from nodes import run_directory

_SETTINGS = 'settings'
_TRANSFORM = 'transform.npz'


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
  except sources.UNREADABLE_NPZ as error:
    raise DataError(f'{path!r} is not a distilled set: {error}') from error
  return distilled._replace(transform=transform._replace(zca=_load_zca(path, digest))) if digest else distilled


def _load_zca(path: str, digest: str) -> np.ndarray:
  try:
    with np.load(_beside(path), allow_pickle=False) as file:
      zca = file['zca']
  except sources.UNREADABLE_NPZ as error:
    raise DataError(f'{path!r} was whitened by the matrix in {_beside(path)!r}, which cannot be read: {error}') from error
  if preprocess.digest(preprocess.Transform(None, None, zca)) != digest:
    raise DataError(f'{_beside(path)!r} is not the matrix that {path!r} was whitened by: their hashes differ.')
  return zca


def _beside(path: str) -> str:
  return os.path.join(os.path.dirname(path), _TRANSFORM)
