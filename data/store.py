"""Cache of preprocessed data sets: written once by one process of a machine, memory-mapped by all.

A set is a folder of `.npy` files named by a hash of the source's content and by the preprocessing;
the raw training images, which augmentation needs, have a folder of their own. Workers without a
shared disk fetch them from the coordinator, once.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from absl import logging

from configs import schema
from data import NPZ_ERRORS, DataError, home, one_line, preprocess, sources
from kernels import cpus

_VERSION = 4
_META, _CONTENT = 'meta.json', 'content'
_ARRAYS = ('train_images', 'train_labels', 'test_images', 'test_labels')
_ZCA = 'zca'
_RAW = ('train_images',)
# Names of folders: SHA-256 of the source, and the recipe of its preprocessing. Peers send them.
_KEY = re.compile(r'[0-9a-f]{32}-(standard|zca\d{1,20}(\.\d{1,20})?(e[+-]\d{1,3})?)', re.ASCII)
_RAW_KEY = re.compile(r'[0-9a-f]{32}-raw')
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


def check_key(key: Any) -> str:
  """Returns `key` if it has the form of `Prepared.key`. Raises DataError."""
  if isinstance(key, str) and _KEY.fullmatch(key):
    return key
  raise DataError(
    f'{str(key)[:80]!r} is no name of prepared data: it must be 32 hexadecimal digits, then '
    "'-standard' or '-zca' and a number."
  )


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
    DataError: what was read is no prepared set, is larger than it says, does not fit on the disk or
      does not match its digests; `key` is no name of one; or the cache folder cannot be used.
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
    with open(os.path.join(_path(cache, folder), file), 'rb') as stream:
      stream.seek(offset)
      return stream.read(size)
  except OSError as error:
    raise DataError(
      f'the prepared data in {_path(cache, folder)} are gone, or were found '
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
  names, meta = _described(folder, _chunk(read, folder, _META, 0))

  def write(path: str) -> None:
    for name in names:
      with open(os.path.join(path, f'{name}.npy'), 'wb') as file:
        _copy_file(folder, name, read, file, cache)

  description = {k: v for k, v in meta.items() if k not in ('sha256', _CONTENT)}
  _install(folder, cache, description, names, write, expected=meta['sha256'])


def _described(folder: str, content: bytes) -> tuple[list[str], dict[str, Any]]:
  """Names of the arrays of a folder that is to be copied, and its meta.json. Raises DataError."""
  names: list[str] = [*(_RAW if _RAW_KEY.fullmatch(folder) else _ARRAYS)]
  if '-zca' in folder:
    names.append(_ZCA)
  try:
    meta = json.loads(content)
    if sorted(meta['sha256']) != sorted(names):
      raise ValueError(f'it lists other files than {", ".join(names)}')
    return names, meta
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise _no_data(f'{folder}/{_META}', one_line(error)) from error


def _copy_file(
  folder: str, name: str, read: Callable[[str, str, int], bytes], file: BinaryIO, cache: str
) -> None:
  """Copies an `.npy` file to `file`, in `cache`, as far as its own header says that it goes.

  Raises DataError.
  """
  source = f'{name}.npy'
  chunk = _chunk(read, folder, source, 0)
  size, offset = _npy_bytes(f'{folder}/{source}', chunk), 0
  free = shutil.disk_usage(cache).free
  if size > free:
    raise DataError(
      f'{folder}/{source} has {size / 1e9:.1f} GB, and the cache folder {cache!r} has room for '
      f'{free / 1e9:.1f} GB: make room, or choose another by --config.system.cache_dir.'
    )
  while chunk:
    offset += len(chunk)
    if offset > size:
      raise _no_data(f'{folder}/{source}', f'it goes on after the {size} bytes of its array.')
    file.write(chunk)
    chunk = _chunk(read, folder, source, offset)


def _npy_bytes(what: str, beginning: bytes) -> int:
  """Size of an `.npy` file by its header, which is in the `beginning`. Raises DataError."""
  stream = io.BytesIO(beginning)
  try:
    if np.lib.format.read_magic(stream) != (1, 0):
      raise ValueError('an unknown version of the format')
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject or min(shape, default=0) < 0:
      raise ValueError(f'an array {shape} of {dtype}')
  except NPZ_ERRORS as error:
    raise _no_data(what, one_line(error)) from error
  return stream.tell() + math.prod(shape) * dtype.itemsize


def _chunk(read: Callable[[str, str, int], bytes], folder: str, file: str, offset: int) -> bytes:
  """A part of a file, from another machine. Raises DataError where it is larger than it may be."""
  chunk = read(folder, file, offset)
  if not isinstance(chunk, bytes) or len(chunk) > CHUNK_BYTES:
    raise _no_data(f'{folder}/{file}', f'a part of it is not at most {CHUNK_BYTES} bytes.')
  return chunk


def _no_data(what: str, why: str) -> DataError:
  return DataError(
    f'the coordinator sends something else than prepared data as {what}: {why} Let both have the '
    'same version of this project.'
  )


def _content(meta: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _path(cache: str, folder: str) -> str:
  """Path of a set's folder, or of its raw images'. Raises DataError where it is no name of one."""
  if not (isinstance(folder, str) and _RAW_KEY.fullmatch(folder)):
    check_key(folder)
  return os.path.join(cache, folder)


def _raw_key(key: str) -> str:
  """Folder of the raw images of a set's source, the same for every preprocessing."""
  return f'{key.partition("-")[0]}-raw'


def _open(key: str, cache: str) -> _Folder | None:
  """Description and memory-mapped arrays of a folder; None if it is missing or damaged.

  Every file is read through, since mapping it does not show a flipped bit: 0.5 s for CIFAR-10.
  """
  path = _path(cache, key)
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
  last, threads = time.monotonic(), cpus.available()
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
  scratch, path = None, _path(cache, key)
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
    os.rename(scratch, path)
  except OSError as error:
    if not os.path.exists(os.path.join(path, _META)):
      raise DataError(
        f'the cache folder {cache!r} cannot be used: {error.strerror}; choose another by '
        '--config.system.cache_dir.'
      ) from error
  finally:
    if scratch:
      shutil.rmtree(scratch, ignore_errors=True)
