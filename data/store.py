"""Cache of preprocessed data sets: written once by one process of a machine, memory-mapped by all.

A set is a folder of `.npy` files named by a hash of the source's content and by the preprocessing;
the raw training images, which augmentation needs, have a folder of their own. Workers without a
shared disk fetch them from the coordinator, once.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from configs import schema
from data import NPZ_ERRORS, DataError, home, preprocess, sources

_VERSION = 4
_META, _CONTENT = 'meta.json', 'content'
_ARRAYS = ('train_images', 'train_labels', 'test_images', 'test_labels')
_ZCA = 'zca'
_RAW = ('train_images',)
_SCRATCH = 'making-'
CHUNK_BYTES = 2**22
_BATCH = 2048  # images preprocessed at a time
_LOG_SECONDS = 10.0
_Folder = tuple[dict[str, Any], dict[str, np.ndarray]]  # description, arrays


class Prepared(NamedTuple):
  """Preprocessed images and their labels, memory-mapped.

  Attributes:
    key: names source and preprocessing; the same on every machine.
    content: SHA-256 of all that was computed, to the last bit.
    name: the data set's name.
    train_images, test_images: float32 [N, H, W, D], preprocessed.
    train_labels, test_labels: int64 [N].
    num_classes: C.
    transform: from raw pixels to preprocessed ones.
    raw_images: uint8 or float32 [N, H, W, D], the training images before preprocessing; None unless
      they were asked for.
    class_names: C different names: class i is class_names[i].
    remarks: lines for the user about its content; from `prepare` also about its source.
  """

  key: str
  content: str
  name: str
  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  num_classes: int
  transform: preprocess.Transform
  raw_images: np.ndarray | None = None
  class_names: tuple[str, ...] = ()
  remarks: tuple[str, ...] = ()


def cache_folder(configured: str = '') -> str:
  """`configured`, or this project's folder among the user's caches (see `home.settle`)."""
  caches = home.settle(configured)
  return os.path.abspath(configured or os.path.join(caches, 'kip'))


def prepare(data: schema.Data, cache: str, raw: bool = False) -> Prepared:
  """Opens a preprocessed data set; makes it first unless the cache has it.

  Args:
    data: the data set and its preprocessing.
    cache: folder to keep it in.
    raw: with the raw training images.

  Raises:
    DataError: there is no such data set, its content is unusable, or the cache cannot be written.
  """
  source = sources.find(data.name, data.dir, data.size)
  regularisation = float(data.zca_regularisation) if data.zca else None
  recipe = 'standard' if regularisation is None else f'zca{regularisation!r}'
  identity = hashlib.sha256(f'{_VERSION} {source.name} {source.key}'.encode()).hexdigest()[:32]
  key = f'{identity}-{recipe}'
  if (prepared := open_prepared(key, cache, raw)) is not None:
    return prepared._replace(remarks=source.remarks + prepared.remarks)
  logging.info('Reading and preprocessing %s (once; kept in %s).', source.name, cache)
  start = time.monotonic()
  dataset = source.load()
  if raw and _open(_raw_key(key), cache) is None:

    def write(path: str) -> None:
      np.save(os.path.join(path, 'train_images.npy'), dataset.train_images)

    _install(_raw_key(key), cache, {}, _RAW, write)
  if _open(key, cache) is None:
    _preprocess(key, cache, dataset, regularisation)
  logging.info('%s is ready after %.1f s.', source.name, time.monotonic() - start)
  if (prepared := open_prepared(key, cache, raw)) is None:
    raise DataError(f'the data written to {cache!r} cannot be read back; try again.')
  return prepared._replace(remarks=source.remarks + prepared.remarks)


def fetch(
  key: str, cache: str, read: Callable[[str, str, int], bytes], raw: bool = False
) -> Prepared:
  """Opens the prepared set `key`; copies it from another machine unless the cache has it.

  Args:
    key: of `Prepared`.
    cache: this machine's cache folder.
    read: `read(folder, file, offset)` returns a part of that file, b'' at its end, as `read_chunk`.
    raw: with the raw training images.

  Raises:
    DataError: what was read does not match its digests, or the cache folder cannot be used.
  """

  def fetched(folder: str) -> _Folder:
    if (found := _open(folder, cache)) is None:
      _copy(folder, cache, read)
      found = _open(folder, cache)
    if found is None:
      raise DataError(
        f'the data fetched into {cache!r} cannot be read back; start the worker again.'
      )
    return found

  return _prepared(key, fetched(key), fetched(_raw_key(key)) if raw else None)


def read_chunk(
  key: str, cache: str, folder: str, file: str, offset: int, size: int = CHUNK_BYTES
) -> bytes:
  """Reads a part of a file for `fetch`, on the machine that has the set `key`.

  Args:
    key: of `Prepared`.
    cache: this machine's cache folder.
    folder, file: which file.
    offset, size: bytes; fewer are returned at the end of the file.

  Raises:
    ValueError: this is no file of the set.
    DataError: the file is gone.
  """
  files = _META, *(f'{name}.npy' for name in (*_ARRAYS, _ZCA))
  if folder not in (key, _raw_key(key)) or file not in files:
    raise ValueError(f'no file {folder}/{file} in the prepared data set {key}.')
  try:
    with open(os.path.join(cache, folder, file), 'rb') as stream:
      stream.seek(offset)
      return stream.read(size)
  except OSError as error:
    raise DataError(
      f'the prepared data in {os.path.join(cache, folder)} are gone, or were found '
      'damaged and removed: stop the run; its command makes them again and goes on.'
    ) from error


def open_prepared(key: str, cache: str, raw: bool = False) -> Prepared | None:
  """Memory-maps a prepared set; None where the cache has none, or a damaged one."""
  opened = _open(key, cache)
  raw_opened = _open(_raw_key(key), cache) if raw else None
  if opened is None or (raw and raw_opened is None):
    return None
  return _prepared(key, opened, raw_opened)


def _prepared(key: str, opened: _Folder, raw: _Folder | None = None) -> Prepared:
  meta, arrays = opened
  transform = preprocess.Transform(
    np.asarray(meta['mean']), np.asarray(meta['std']), arrays.get(_ZCA), meta['norm']
  )
  return Prepared(
    key=key,
    content=_content(meta),
    name=meta['name'],
    train_images=arrays['train_images'],
    train_labels=arrays['train_labels'],
    test_images=arrays['test_images'],
    test_labels=arrays['test_labels'],
    num_classes=meta['num_classes'],
    transform=transform,
    raw_images=raw and raw[1]['train_images'],
    class_names=tuple(meta['class_names']),
    remarks=tuple(meta['remarks']),
  )


def _copy(folder: str, cache: str, read: Callable[[str, str, int], bytes]) -> None:
  """Copies a folder from another machine, see `fetch`."""
  meta = json.loads(read(folder, _META, 0))
  names = [name for name in (*_ARRAYS, _ZCA) if name in meta['sha256']]

  def write(path: str) -> None:
    for name in names:
      offset = 0
      with open(os.path.join(path, f'{name}.npy'), 'wb') as file:
        while chunk := read(folder, f'{name}.npy', offset):
          file.write(chunk)
          offset += len(chunk)

  description = {k: v for k, v in meta.items() if k not in ('sha256', _CONTENT)}
  _install(folder, cache, description, names, write, expected=meta['sha256'])


def _content(meta: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _raw_key(key: str) -> str:
  """Folder of the raw images of a set's source, the same for every preprocessing."""
  return f'{key.partition("-")[0]}-raw'


def _open(key: str, cache: str) -> _Folder | None:
  """Description and memory-mapped arrays of a folder; None if it is missing or damaged.

  Every file is read through, since mapping it does not show a flipped bit: 0.5 s for CIFAR-10.
  """
  path = os.path.join(cache, key)
  try:
    with open(os.path.join(path, _META), encoding='utf-8') as file:
      meta = json.load(file)
    if meta.pop(_CONTENT, None) != _content(meta):
      raise ValueError(f'{_META} does not have the digest it was written with')
    for name, expected in meta['sha256'].items():
      if sources.digest(os.path.join(path, f'{name}.npy')) != expected:
        raise ValueError(f'{name}.npy does not have the digest it was written with')
    return meta, {
      name: np.load(os.path.join(path, f'{name}.npy'), mmap_mode='r', allow_pickle=False)
      for name in meta['sha256']
    }
  except FileNotFoundError:
    if os.path.isdir(path):
      _discard(path, 'files are missing')
    return None
  except (*NPZ_ERRORS, AttributeError, TypeError) as error:
    # The last two are raised where the description is no dictionary.
    _discard(path, str(error))
    return None


def _discard(path: str, why: str) -> None:
  """Removes a damaged folder."""
  logging.warning('The cached data in %s are damaged (%s): removed, to be made again.', path, why)
  with contextlib.suppress(OSError):  # renamed first: other processes see all of it or nothing
    doomed = tempfile.mkdtemp(prefix=_SCRATCH, dir=os.path.dirname(path))
    os.rename(path, doomed)
    path = doomed
  shutil.rmtree(path, ignore_errors=True)


def _preprocess(key: str, cache: str, dataset: sources.Dataset, zca: float | None) -> None:
  """Makes the folder of a data set; `zca` is the regularisation, None: no whitening."""
  transform = preprocess.fit(dataset.train_images, zca)
  meta = {
    'name': dataset.name,
    'num_classes': dataset.num_classes,
    'mean': transform.mean.tolist(),
    'std': transform.std.tolist(),
    'norm': transform.norm,
    'class_names': dataset.class_names,
    'remarks': dataset.remarks,
  }

  def write(path: str) -> None:
    def file(name: str) -> str:
      return os.path.join(path, f'{name}.npy')

    _write_images(file('train_images'), transform, dataset.train_images, 'train')
    np.save(file('train_labels'), dataset.train_labels)
    _write_images(file('test_images'), transform, dataset.test_images, 'test')
    np.save(file('test_labels'), dataset.test_labels)
    if transform.zca is not None:
      np.save(file(_ZCA), transform.zca)

  _install(key, cache, meta, _ARRAYS if transform.zca is None else (*_ARRAYS, _ZCA), write)


def _write_images(
  path: str, transform: preprocess.Transform, images: np.ndarray, split: str
) -> None:
  """Preprocesses batch by batch into an `.npy` file; `split` names it in the log."""
  rows = np.lib.format.open_memmap(path, mode='w+', dtype=np.float32, shape=images.shape)
  last, threads = time.monotonic(), len(os.sched_getaffinity(0))
  for start in range(0, len(images), _BATCH):
    end = min(start + _BATCH, len(images))
    rows[start:end] = preprocess.apply(transform, images[start:end], threads)
    if time.monotonic() > last + _LOG_SECONDS:
      logging.info('Preprocessed %d of %d %s images.', end, len(images), split)
      last = time.monotonic()
  rows.flush()


def _install(
  key: str,
  cache: str,
  meta: dict[str, Any],
  names: Sequence[str],
  write: Callable[[str], None],
  expected: dict[str, str] | None = None,
) -> None:
  """Writes a folder and renames it into place; the loser of a race discards its copy.

  Args:
    key: name of the folder in the cache.
    cache: the cache folder.
    meta: description of the set, to which the digests of files are added.
    names: arrays that `write` writes.
    write: writes `NAME.npy` for each of them into the folder that it is given.
    expected: digests that the files must have; None: any.

  Raises:
    DataError: the files have other digests, or the cache cannot be written.
  """
  scratch = None
  try:
    os.makedirs(cache, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=_SCRATCH, dir=cache)
    write(scratch)
    digests = {name: sources.digest(os.path.join(scratch, f'{name}.npy')) for name in names}
    if expected not in (None, digests):
      raise DataError(
        'the data fetched from the coordinator do not match their digests; start the worker again.'
      )
    meta = {**meta, 'sha256': digests}
    with open(os.path.join(scratch, _META), 'w', encoding='utf-8') as file:
      json.dump({**meta, _CONTENT: _content(meta)}, file)
    os.rename(scratch, os.path.join(cache, key))
  except OSError as error:
    if not os.path.exists(os.path.join(cache, key, _META)):
      raise DataError(
        f'the cache folder {cache!r} cannot be used: {error.strerror}; choose another by '
        '--config.system.cache_dir.'
      ) from error
  finally:
    if scratch:
      shutil.rmtree(scratch, ignore_errors=True)
