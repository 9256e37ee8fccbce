"""`distilled.npz`: the distilled set as the papers' authors released theirs (`images`, `labels`), plus all it takes to use it again."""

import json
from typing import Any, NamedTuple

import numpy as np

from data import DataError
from data import NPZ_ERRORS
from data import preprocess
from data import store
from nodes import run_directory

_SETTINGS = 'settings'


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
  """Writes `distilled.npz` atomically; every entry loads with `numpy.load(path)`, no pickles."""
  settings = {'data': {'name': prepared.name, 'key': prepared.key}, 'step': step, 'run': config['run'],
              'evaluation': config['system']['evaluation'], 'label_offset': -1 / prepared.num_classes}
  run_directory.write_atomically(path, lambda file: np.savez(
      file, images=np.asarray(images, np.float32), labels=np.asarray(labels, np.float32),
      mean=prepared.transform.mean, std=prepared.transform.std, **{_SETTINGS: json.dumps(settings)}))


def load(path: str) -> Distilled:
  """Reads what `save` wrote. Raises DataError."""
  try:
    with np.load(path, allow_pickle=False) as file:
      return Distilled(file['images'], file['labels'], preprocess.Transform(file['mean'], file['std']), json.loads(str(file[_SETTINGS])))
  except NPZ_ERRORS as error:
    raise DataError(f'{path!r} is not a distilled set: {error}') from error
