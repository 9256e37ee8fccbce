"""The support set that a run starts from: real images, noise, or a distilled set."""

import json

import numpy as np

from configs import schema
from data import NPZ_ERRORS, DataError, released, sampling, store

REAL, NOISE = 'real', 'noise'
_DEVIATION_IMAGES = 5000  # training images whose deviation noise has


def make(run: schema.Run, prepared: store.Prepared, cache: str) -> tuple[np.ndarray, np.ndarray]:
  """Images float64 [S, H, W, D], preprocessed space, and labels float64 [S, C], centred; class by
  class unless they come from a file.

  Args:
    run: the run's configuration.
    prepared: its data set.
    cache: folder that keeps released files.

  Raises:
    DataError: the file of `run.initial_images` is none, or does not fit the data set.
  """
  kind, size = run.initial_images, run.images_per_class * prepared.num_classes
  if kind == REAL:
    chosen = sampling.class_balanced(
      run.seed, sampling.INITIAL_SUPPORT, 0, prepared.train_labels, size
    )
    return (
      prepared.train_images[chosen].astype(np.float64),
      sampling.centred_one_hot(prepared.train_labels[chosen], prepared.num_classes),
    )
  if kind == NOISE:
    deviation = np.std(prepared.train_images[:_DEVIATION_IMAGES], dtype=np.float64)
    images = np.stack(
      [
        sampling.normal(run.seed, sampling.INITIAL_NOISE, i, prepared.train_images[0].size)
        for i in range(size)
      ]
    )
    classes = np.repeat(np.arange(prepared.num_classes), run.images_per_class)
    return (
      deviation * images.reshape((size,) + prepared.train_images.shape[1:]),
      sampling.centred_one_hot(classes, prepared.num_classes),
    )
  images, labels = (
    _released(kind, run, cache) if released.is_name(kind) else _from_file(kind, prepared)
  )
  shapes = (size,) + prepared.train_images.shape[1:], (size, prepared.num_classes)
  for name, array, shape in zip(('images', 'labels'), (images, labels), shapes):
    if array.shape != shape:
      raise DataError(
        f'run.initial_images={kind!r}: {name} must be {list(shape)} for {prepared.name} and '
        f'run.images_per_class={run.images_per_class}, got {list(array.shape)}.'
      )
    if array.dtype.kind != 'f' or not np.isfinite(array).all():
      raise DataError(f'run.initial_images={kind!r}: {name} must be finite floating-point numbers.')
  return images.astype(np.float64), labels.astype(np.float64)


def _released(name: str, run: schema.Run, cache: str) -> tuple[np.ndarray, np.ndarray]:
  found, data = released.load(name, cache), run.data
  if (found.data, found.zca) != (data.name, data.zca):
    raise DataError(
      f'run.initial_images={name!r} needs run.data.name={found.data} and run.data.zca={found.zca}; '
      f'got {data.name} and {data.zca}.'
    )
  return found.images, found.labels


def _from_file(path: str, prepared: store.Prepared) -> tuple[np.ndarray, np.ndarray]:
  field = f'run.initial_images={path!r}'
  try:
    with np.load(path, allow_pickle=False) as file:
      missing = [name for name in ('images', 'labels') if name not in file]
      if missing:
        raise DataError(
          f'{field} has no array {missing[0]!r}; expected images [S, H, W, D] and labels [S, C].'
        )
      images, labels = file['images'], file['labels']
      key = prepared.key
      if 'settings' in file:  # our own files know their data
        key = json.loads(str(file['settings']))['data']['key']
  except DataError:
    raise
  except (*NPZ_ERRORS, TypeError) as error:  # the last where the settings are no dictionaries
    raise DataError(
      f'{field} must be {REAL}, {NOISE}, or an .npz file of a distilled set: {error}'
    ) from error
  if key != prepared.key:
    raise DataError(
      f'{field} was distilled from other data, or data with other class names or '
      f'preprocessing, than {prepared.name} here (run.data).'
    )
  return images, labels
