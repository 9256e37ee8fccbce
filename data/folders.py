"""Where in a folder the training and the test set lie: parquet files, or pictures by class."""

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
  """What a folder holds: either parquet files or pictures.

  Attributes:
    parquet: files of train and of test, in order; None where there are pictures.
    pictures: (path, class) of train and of test, in the order of the paths.
    names: of all files, relative: with their content all there is to know.
    remarks: lines for the user.
  """

  parquet: tuple[list[str], list[str]] | None
  pictures: tuple[list[tuple[str, str]], list[tuple[str, str]]] | None
  names: str
  remarks: tuple[str, ...]

  def paths(self) -> list[str]:
    """Of all files."""
    train, test = self.parquet or ([path for path, _ in split] for split in self.pictures)
    return train + test


class _Pictures(NamedTuple):
  """(path, class) of a split, and what was skipped, relative to the folder of the set."""

  files: list[tuple[str, str]]
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
  place, remarks = _place(folder, configuration), []
  train, test = _split(place, 'train'), None
  if not train:
    raise _missing(folder, 'train.parquet')
  for name in TEST_NAMES:
    if (test := _split(place, name)) is not None:
      if name != 'test':
        remarks.append(f"There is no 'test' in run.data.dir: '{name}' is the test set.")
      break
  if type(train) is not type(test):
    raise _missing(place, 'test.parquet' if isinstance(train, list) else 'test')
  if isinstance(train, list):
    return Found((train, test), None, '', tuple(remarks))
  for top, split in ((os.path.join(place, 'train'), train), (os.path.join(place, name), test)):
    if not split.files:
      found = classes.some(split.skipped, 6) or 'nothing'
      raise DataError(f'{top!r} holds no images as CLASS/FILE; found {found}.')
  if skipped := train.skipped + test.skipped:
    remarks.append(
      f'Skipped, being no images of a class: {len(skipped)} ({classes.some(skipped, 6)}).'
    )
  names = [os.path.relpath(path, place) for path, _ in train.files + test.files]
  return Found(None, (train.files, test.files), '\n'.join(names), tuple(remarks))


def _place(folder: str, configuration: str | None) -> str:
  """The folder or the sub-folder that holds `train`; a clone from the hub has 'data' or others."""

  def has_train(path):
    return os.path.isdir(os.path.join(path, 'train')) or _parquet_files(path, 'train')

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
  """A split's pictures or parquet files; None where it has neither. Raises DataError."""
  is_there = os.path.isdir(os.path.join(place, split))
  pictures = _find_pictures(place, split) if is_there else None
  return pictures if pictures and pictures.files else _parquet_files(place, split) or pictures


def _parquet_files(place: str, split: str) -> list[str]:
  """A split's shards. Raises DataError where some are missing, or two forms are there."""
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
  suffixes, files, skipped = images.suffixes(), [], []

  def walk(path, label, above):
    above = {*above, os.path.realpath(path)}
    entries = _entries(path)
    for entry in entries:
      hidden = entry.name.startswith('.')
      is_picture = os.path.splitext(entry.name)[1].lower() in suffixes
      if entry.is_dir() and not hidden and os.path.realpath(entry.path) not in above:  # or a link
        walk(entry.path, label or _text(entry.name), above)
      elif entry.is_file() and not hidden and is_picture and label:
        files.append((entry.path, label))
      else:
        skipped.append(_text(os.path.relpath(entry.path, place)))
    if not entries and label:
      skipped.append(_text(os.path.relpath(path, place)))

  walk(os.path.join(place, split), '', set())
  return _Pictures(sorted(files), sorted(skipped))


def _text(name: str) -> str:
  """A file's name, which may be any bytes, as text that can be printed."""
  return os.fsencode(name).decode(errors='backslashreplace')


def _entries(folder: str) -> list[os.DirEntry]:
  """Raises DataError."""
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
  return (
    classes.some([_text(entry.name) + '/' * entry.is_dir() for entry in _entries(folder)])
    or 'nothing'
  )
