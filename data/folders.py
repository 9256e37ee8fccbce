"""Finds the training and the test set in a folder: parquet files, or pictures by class.

`datasets`' imagefolder is no substitute: it sorts class names as text (1, 10, 2), takes the nearest
folder for the class, and neither counts nor names what it skips.
"""

import glob
import os
import re
from typing import NamedTuple

from data import DataError, classes, images

TEST_NAMES = ('test', 'val', 'valid', 'validation')  # the first that is there is the test set
EXPECTED = (
  'train.parquet and test.parquet in the Hugging Face schema, '
  'or images as train/CLASS/FILE and test/CLASS/FILE'
)


class Found(NamedTuple):
  """A training and a test set in a folder.

  Attributes:
    train, test: paths of parquet files or of pictures, in order.
    labels: the class of each picture of train and of test; None where there are parquet files.
    names: of all pictures, relative to the folder, on lines: with their content all there is to
      know.
    remarks: lines for the user.
  """

  train: list[str]
  test: list[str]
  labels: tuple[list[str], list[str]] | None
  names: str
  remarks: tuple[str, ...]


class _Pictures(NamedTuple):
  """A split's pictures, the class of each, and what was skipped, relative to the set's folder."""

  paths: list[str]
  labels: list[str]
  skipped: list[str]


def find(folder: str, configuration: str | None) -> Found:
  """Looks for a training and a test set in a folder, or in its one sub-folder that holds them.

  Args:
    folder: to look in.
    configuration: the sub-folder to choose where there are several.

  Raises:
    DataError: nothing usable there; the message says what was found instead.
  """
  if not os.path.isdir(folder):
    raise DataError(f'run.data.dir: no folder {folder!r}; expected one that holds {EXPECTED}.')
  place = _place(folder, configuration)
  train = _split(place, 'train')
  if train is None:
    raise _missing(folder, 'train.parquet')
  name, test = _find_test(place)
  remarks = []
  if name != 'test':
    remarks.append(f"There is no 'test' in run.data.dir: '{name}' is the test set.")
  if isinstance(train, list) and isinstance(test, list):
    return Found(train, test, None, '', tuple(remarks))
  if isinstance(train, list) or not isinstance(test, _Pictures):
    raise _missing(place, 'test.parquet' if isinstance(train, list) else 'test')
  for split, pictures in (('train', train), (name, test)):
    if not pictures.paths:
      found = classes.some(pictures.skipped, 6) or 'nothing'
      raise DataError(
        f'{os.path.join(place, split)!r} holds no images as CLASS/FILE; found {found}.'
      )
  if skipped := train.skipped + test.skipped:
    remarks.append(
      f'Skipped, being no images of a class: {len(skipped)} ({classes.some(skipped, 6)}).'
    )
  names = '\n'.join(os.path.relpath(path, place) for path in train.paths + test.paths)
  return Found(train.paths, test.paths, (train.labels, test.labels), names, tuple(remarks))


def _find_test(place: str) -> tuple[str, list[str] | _Pictures | None]:
  """The name of the test set and what it has, as `_split`; ('test', None) where there is none."""
  for name in TEST_NAMES:
    if (found := _split(place, name)) is not None:
      return name, found
  return 'test', None


def _place(folder: str, configuration: str | None) -> str:
  """The folder or the sub-folder that holds `train`; a clone from the hub has 'data' or others."""

  def has_train(path: str) -> bool:
    return os.path.isdir(os.path.join(path, 'train')) or bool(_parquet_files(path, 'train'))

  if has_train(folder):
    return folder
  inside = [entry.path for entry in _entries(folder) if entry.is_dir() and has_train(entry.path)]
  chosen = [path for path in inside if os.path.basename(path) == configuration] or inside
  if len(chosen) > 1:
    raise DataError(
      f'run.data.dir: {folder!r} holds several data sets; '
      f'choose one of {classes.some(list(map(repr, inside)))}.'
    )
  return chosen[0] if chosen else folder


def _split(place: str, split: str) -> list[str] | _Pictures | None:
  """A split's pictures or parquet files; None where it has no folder and no files.

  Raises:
    DataError: as `_parquet_files`.
  """
  is_there = os.path.isdir(os.path.join(place, split))
  pictures = _find_pictures(place, split) if is_there else None
  return pictures if pictures and pictures.paths else _parquet_files(place, split) or pictures


def _parquet_files(place: str, split: str) -> list[str]:
  """A split's parquet files, in order.

  Raises:
    DataError: some are missing, or they are named in two ways.
  """
  found = {}
  for pattern in (f'{split}.parquet', f'{split}-*.parquet', f'{split}/*.parquet'):
    paths = sorted(filter(os.path.isfile, glob.glob(os.path.join(glob.escape(place), pattern))))
    if paths:
      found[pattern] = paths
  if len(found) > 1:
    raise DataError(f'{place!r} holds {" and ".join(found)}; keep one of them.')
  for paths in found.values():
    shards = re.search(r'-of-([0-9]+)\.parquet$', paths[0])
    if shards and len(paths) != int(shards[1]):
      raise DataError(
        f'{place!r} holds {len(paths)} of the {int(shards[1])} files '
        f'{split}-*-of-{shards[1]}.parquet.'
      )
    return paths
  return []


def _find_pictures(place: str, split: str) -> _Pictures:
  """All pictures below a split's folder, in the order of their paths."""
  suffixes, files, skipped = images.suffixes(), [], []

  def walk(path: str, label: str, above: set[str]) -> None:
    above = {*above, os.path.realpath(path)}
    entries = _entries(path)
    for entry in entries:
      hidden = entry.name.startswith('.')
      is_picture = os.path.splitext(entry.name)[1].lower() in suffixes
      if entry.is_dir() and not hidden and os.path.realpath(entry.path) not in above:  # no loops
        walk(entry.path, label or _text(entry.name), above)
      elif entry.is_file() and not hidden and is_picture and label:
        files.append((entry.path, label))
      else:
        skipped.append(_text(os.path.relpath(entry.path, place)))
    if not entries and label:
      skipped.append(_text(os.path.relpath(path, place)))

  walk(os.path.join(place, split), '', set())
  files.sort()
  return _Pictures([path for path, _ in files], [label for _, label in files], sorted(skipped))


def _text(name: str) -> str:
  """A file's name, which may be any bytes, as printable text."""
  return os.fsencode(name).decode(errors='backslashreplace')


def _entries(folder: str) -> list[os.DirEntry]:
  """A folder's entries by name. Raises DataError where it cannot be read."""
  try:
    with os.scandir(folder) as entries:
      return sorted(entries, key=lambda entry: entry.name)
  except OSError as error:
    raise DataError(f'{folder!r} cannot be read: {error.strerror}.') from error


def _missing(folder: str, file: str) -> DataError:
  return DataError(
    f"run.data.dir: '{folder}/{file}' is missing; found {_content(folder)}; expected {EXPECTED}."
  )


def _content(folder: str) -> str:
  names = [_text(entry.name) + '/' * entry.is_dir() for entry in _entries(folder)]
  return classes.some(names) or 'nothing'
