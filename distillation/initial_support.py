"""The support set that a run starts from: real images, noise, or a distilled set."""

import json

import numpy as np
from jaxtyping import Float64

from configs import schema
from data import DataError, npz, released, sampling, store

REAL, NOISE = 'real', 'noise'
_DEVIATION_IMAGES = 5000  # noise has the deviation of so many training images


def make(
  run: schema.Run, prepared: store.Prepared, cache: str
) -> tuple[Float64[np.ndarray, 'S H W D'], Float64[np.ndarray, 'S C']]:
  """Images and labels that a run starts from, as `run.initial_images` says.

  Args:
    run: the run's configuration.
    prepared: its data set.
    cache: folder that keeps released files.

  Returns:
    Images in preprocessed space, and centred labels; class by class unless they come from a file.

  Raises:
    DataError: the file cannot be read as a distilled set, or does not fit the data set.
  """
  kind, size = run.initial_images, run.images_per_class * prepared.num_classes
  if kind == REAL:
    classes, stream = prepared.train_labels, sampling.INITIAL_SUPPORT
    chosen = sampling.class_balanced(run.seed, stream, 0, classes, size)
    labels = sampling.centred_one_hot(classes[chosen], prepared.num_classes)
    return prepared.train_images[chosen].astype(np.float64), labels
  shape = prepared.train_images.shape[1:]
  if kind == NOISE:
    deviation = np.std(prepared.train_images[:_DEVIATION_IMAGES], dtype=np.float64)
    num_values, stream = prepared.train_images[0].size, sampling.INITIAL_NOISE
    noise = [sampling.normal(run.seed, stream, i, num_values) for i in range(size)]
    classes = np.repeat(np.arange(prepared.num_classes), run.images_per_class)
    labels = sampling.centred_one_hot(classes, prepared.num_classes)
    return deviation * np.stack(noise).reshape(size, *shape), labels
  if released.is_name(kind):
    images, labels = _released(kind, run, cache)
  else:
    images, labels = _from_file(kind, prepared)
  for name, array, expected in (
    ('images', images, (size, *shape)),
    ('labels', labels, (size, prepared.num_classes)),
  ):
    if array.shape != expected:
      raise DataError(
        f'run.initial_images={kind!r}: {name} must be {list(expected)} for {prepared.name} and '
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
    file = npz.read(path, ('images', 'labels'), optional=('settings',))
    key = prepared.key
    if 'settings' in file:  # our own files know their data
      key = json.loads(str(file['settings']))['data']['key']
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise DataError(
      f'{field} must be {REAL}, {NOISE}, or an .npz file of a distilled set: {error}'
    ) from error
  if key != prepared.key:
    raise DataError(
      f'{field} was distilled from other data, or data with other class names or '
      f'preprocessing, than {prepared.name} here (run.data).'
    )
  return file['images'], file['labels']
