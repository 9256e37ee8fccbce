"""Numbers and names of classes."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from data import DataError

_NUMBERS = '0 1 2 3 4 5 6 7 8 9'
_FASHION = 'T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot'
_CIFAR10 = 'airplane automobile bird cat deer dog frog horse ship truck'
_CIFAR100 = """
  apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle
  bowl boy bridge bus butterfly camel can castle caterpillar cattle
  chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
  dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
  lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
  mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
  plain plate poppy porcupine possum rabbit raccoon ray road rocket
  rose sea seal shark shrew skunk skyscraper snail snake spider
  squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
  train trout tulip turtle wardrobe whale willow_tree wolf woman worm"""
# Of the known sets, for files of theirs that name no classes.
KNOWN = {
  'digits': _NUMBERS.split(),
  'mnist': _NUMBERS.split(),
  'svhn_cropped': _NUMBERS.split(),
  'fashion_mnist': _FASHION.split(','),
  'cifar10': _CIFAR10.split(),
  'cifar100': _CIFAR100.split(),
}


def ordered(names: Iterable[str]) -> list[str]:
  """Different names in the order of class numbers: by value if all are numbers, else as text."""
  different = sorted(set(names))
  if all(re.fullmatch(r'-?[0-9]+(\.[0-9]+)?', name) for name in different):
    different.sort(key=float)
  return different


def are_numbers(names: Sequence[str]) -> bool:
  """Whether each class's name is its number."""
  return list(names) == [str(c) for c in range(len(names))]


def in_words(names: Sequence[str]) -> str:
  """Lists numbers and names: '4 classes: 0 one, 1 three, 2 two, 3 zero.'"""
  count = len(names)
  if are_numbers(names):
    return f'{count} classes: 0 to {count - 1}.'
  return f'{count} classes: {some([f"{number} {name}" for number, name in enumerate(names)])}.'


def absent(labels: np.ndarray, names: Sequence[str]) -> list[str]:
  """Numbers and names of the classes that do not occur in labels [N]."""
  missing = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
  return [str(c) if names[c] == str(c) else f'{c} {names[c]}' for c in missing]


def some(words: Sequence[str], most: int = 20) -> str:
  """Joins words by commas; of more than `most`, the first half as many, and the last."""
  if len(words) > most:
    words = [*words[: most // 2], '…', words[-1]]
  return ', '.join(' '.join(word.split()) for word in words)


def checked(
  name: str, labels: Sequence[np.ndarray], counts: Sequence[int], names: Sequence[str] | None
) -> tuple[list[np.ndarray], tuple[str, ...]]:
  """Checks train and test labels, and numbers those that are text.

  Args:
    name: of the data set.
    labels: of train and test, each [N] or [N, 1], whole numbers from 0 or text.
    counts: images of each split.
    names: of classes 0, 1, …, at least those that are there; None: the known set's, or numbers.

  Returns:
    Labels of train and test, each int64 [N], and C names.

  Raises:
    DataError: these are no such labels, or a class has no training image.
  """
  labels = [array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array for array in labels]
  for split, array, count in zip(('train', 'test'), labels, counts):
    if array.shape != (count,) or array.dtype.kind not in 'iuUS':
      raise DataError(
        f'{name}: {split} labels must be {count} whole numbers, '
        f'got {array.dtype} of shape {array.shape}.'
      )
  if any(array.dtype.kind in 'US' for array in labels):
    labels, names = _numbered(name, *labels)
  present = np.unique(labels[0])
  count = int(present[-1]) + 1  # before int64 would wrap larger numbers
  for split, array in zip(('train', 'test'), labels):
    if array.min() < 0 or int(array.max()) >= count:
      raise DataError(
        f'{name}: {split} labels must lie between 0 and '
        f'{count - 1 if count > 0 else "C - 1"}, got {array.min()} to {array.max()}.'
      )
  if count < 2:
    raise DataError(f'{name}: at least two classes are needed, got {count}.')
  if len(present) < count:
    missing = np.flatnonzero(present != np.arange(len(present), dtype=present.dtype))[0]
    raise DataError(
      f'{name}: labels must be 0 to C - 1 with every class present; '
      f'class {missing} has no training image.'
    )
  names = names or KNOWN.get(name, ())
  if len(names) < count:
    names = [str(c) for c in range(count)]
  return [array.astype(np.int64) for array in labels], tuple(names[:count])


def _numbered(name: str, train: np.ndarray, test: np.ndarray) -> tuple[list[np.ndarray], list[str]]:
  """Numbers text labels: int64 [N] of each split, and the names of classes. Raises DataError."""
  if train.dtype.kind not in 'US' or test.dtype.kind not in 'US':
    raise DataError(
      f'{name}: train labels are {train.dtype}, test labels {test.dtype}; '
      'both must be text, or whole numbers.'
    )
  try:
    train, test = (
      np.char.decode(array, 'utf-8') if array.dtype.kind == 'S' else array
      for array in (train, test)
    )
  except UnicodeDecodeError as error:
    raise DataError(f'{name}: labels are bytes, but not UTF-8 text ({error.reason}).') from error
  names = ordered(train.tolist())
  numbers = {label: number for number, label in enumerate(names)}
  for split, array in (('train', train), ('test', test)):
    for i in np.flatnonzero(array == ''):
      raise DataError(f'{name}: {split} label {i} is empty.')
  for label in sorted(set(test.tolist()) - set(names)):
    raise DataError(f'{name}: class {label!r} has no training image.')
  numbered = [
    np.array([numbers[each] for each in split.tolist()], np.int64) for split in (train, test)
  ]
  return numbered, names
