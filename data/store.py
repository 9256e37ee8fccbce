"""The preprocessed data set, on disk once for all processes of a machine: written by one, memory-mapped by all.

A folder of `.npy` files named by a hash of the source's content and of the preprocessing. Workers without a shared disk fetch it from the
coordinator, once.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from typing import Any, Callable, NamedTuple

from absl import logging
import numpy as np

from data import DataError
from data import preprocess
from data import sources

_VERSION = 1
_ARRAYS = ('train_images', 'train_labels', 'test_images', 'test_labels')
CHUNK_BYTES = 2 ** 22


class Prepared(NamedTuple):
  """Preprocessed images and their labels, memory-mapped.

  Attributes:
    key: names the content: source and preprocessing.
    name: the data set's name.
    train_images, test_images: float32 [N, H, W, D], preprocessed.
    train_labels, test_labels: int64 [N].
    num_classes: `C`.
    transform: raw pixels -> preprocessed.
  """
  key: str
  name: str
  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  num_classes: int
  transform: preprocess.Transform


def cache_folder(configured: str = '') -> str:
  """`configured`, or a folder of this project's in the user's cache folder."""
  base = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
  return os.path.abspath(configured or os.path.join(base, 'kip'))


def prepare(name: str, folder: str, cache: str) -> Prepared:
  """The data set `name` (see `sources.find`), preprocessed; from the cache if it is there.

  Raises:
    DataError: no such data set, unusable content, or a cache folder that cannot be written.
  """
  source = sources.find(name, folder)
  key = hashlib.sha256(f'{_VERSION} {source.name} {source.key} standardise'.encode()).hexdigest()[:32]
  prepared = open_prepared(key, cache)
  if prepared is None:
    logging.info('Reading and preprocessing %s (once; kept in %s).', source.name, cache)
    start = time.monotonic()
    dataset = source.load()
    transform = preprocess.fit(dataset.train_images)
    meta = {'name': dataset.name, 'num_classes': dataset.num_classes, 'mean': transform.mean.tolist(), 'std': transform.std.tolist()}
    arrays = (preprocess.apply(transform, dataset.train_images), dataset.train_labels,
              preprocess.apply(transform, dataset.test_images), dataset.test_labels)

    def write(path):
      for array_name, array in zip(_ARRAYS, arrays):
        np.save(os.path.join(path, f'{array_name}.npy'), array)
    _install(key, cache, meta, write)
    logging.info('%s is ready after %.1f s.', source.name, time.monotonic() - start)
    prepared = open_prepared(key, cache)
  return prepared


def fetch(key: str, cache: str, read: Callable[[str, int], bytes]) -> Prepared:
  """The prepared set `key`, copied from elsewhere unless the cache holds it.

  Args:
    key: of `Prepared`.
    cache: this machine's cache folder.
    read: `read(file, offset)` gives up to CHUNK_BYTES of that file, b'' at its end: the coordinator's `read_data`.
  """
  prepared = open_prepared(key, cache)
  if prepared is None:
    meta = json.loads(read('meta.json', 0))

    def write(path):
      for array_name in _ARRAYS:
        offset = 0
        with open(os.path.join(path, f'{array_name}.npy'), 'wb') as file:
          while chunk := read(f'{array_name}.npy', offset):
            file.write(chunk)
            offset += len(chunk)
    _install(key, cache, {k: v for k, v in meta.items() if k != 'sha256'}, write, expected=meta['sha256'])
    prepared = open_prepared(key, cache)
  return prepared


def read_chunk(key: str, cache: str, file: str, offset: int) -> bytes:
  """What `fetch` reads, on the machine that has the data."""
  if file != 'meta.json' and file not in [f'{name}.npy' for name in _ARRAYS]:
    raise ValueError(f'no file {file!r} in a prepared data set.')
  with open(os.path.join(cache, key, file), 'rb') as stream:
    stream.seek(offset)
    return stream.read(CHUNK_BYTES)


def open_prepared(key: str, cache: str) -> Prepared | None:
  """Memory-maps a prepared set; None where the cache has none, or a damaged one."""
  path = os.path.join(cache, key)
  try:
    with open(os.path.join(path, 'meta.json'), encoding='utf-8') as file:
      meta = json.load(file)
    arrays = [np.load(os.path.join(path, f'{name}.npy'), mmap_mode='r', allow_pickle=False) for name in _ARRAYS]
  except FileNotFoundError:
    return None
  except (OSError, ValueError, EOFError) as error:
    logging.warning('The cached data in %s are damaged (%s) and are made again.', path, error)
    shutil.rmtree(path, ignore_errors=True)
    return None
  transform = preprocess.Transform(np.asarray(meta['mean']), np.asarray(meta['std']))
  return Prepared(key, meta['name'], *arrays, meta['num_classes'], transform)


def _install(key: str, cache: str, meta: dict[str, Any], write: Callable[[str], None], expected: dict[str, str] | None = None) -> None:
  """Writes a folder aside and renames it into place; who comes second throws its own away."""
  scratch = None
  try:
    os.makedirs(cache, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix='making-', dir=cache)
    write(scratch)
    digests = {name: sources.digest(os.path.join(scratch, f'{name}.npy')) for name in _ARRAYS}
    if expected not in (None, digests):
      raise DataError('the data fetched from the coordinator do not match their digests; start the worker again.')
    with open(os.path.join(scratch, 'meta.json'), 'w', encoding='utf-8') as file:
      json.dump({**meta, 'sha256': digests}, file)
    os.rename(scratch, os.path.join(cache, key))
  except OSError as error:
    if not os.path.exists(os.path.join(cache, key, 'meta.json')):
      raise DataError(f'the cache folder {cache!r} cannot be used: {error.strerror}; choose another by '
                      '--config.system.cache_dir.') from error
  finally:
    if scratch:
      shutil.rmtree(scratch, ignore_errors=True)
