"""Classes: their numbers and their names."""

import re
from typing import Iterable, Sequence

import numpy as np

from data import DataError

_NUMBERS = tuple('0123456789')
# Of the known sets, for files of theirs that name no classes.
KNOWN = {
  'digits': _NUMBERS,
  'mnist': _NUMBERS,
  'svhn_cropped': _NUMBERS,
  'fashion_mnist': (
    'T-shirt/top',
    'Trouser',
    'Pullover',
    'Dress',
    'Coat',
    'Sandal',
    'Shirt',
    'Sneaker',
    'Bag',
    'Ankle boot',
  ),
  'cifar10': (
    'airplane',
    'automobile',
    'bird',
    'cat',
    'deer',
    'dog',
    'frog',
    'horse',
    'ship',
    'truck',
  ),
  'cifar100': tuple(
    """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle
        bowl boy bridge bus butterfly camel can castle caterpillar cattle
        chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
        dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
        lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
        mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
        plain plate poppy porcupine possum rabbit raccoon ray road rocket
        rose sea seal shark shrew skunk skyscraper snail snake spider
        squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
        train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()
  ),
}


def ordered(names: Iterable[str]) -> list[str]:
  """Different names in the order in which classes are numbered: numbers by value, else as text."""
  different = sorted(set(names))
  if all(re.fullmatch(r'-?[0-9]+(\.[0-9]+)?', name) for name in different):
    different.sort(key=float)
  return different


def are_numbers(names: Sequence[str]) -> bool:
  """Whether the names tell nothing that the classes' numbers do not."""
  return list(names) == [str(c) for c in range(len(names))]


def in_words(names: Sequence[str]) -> str:
  """Which class has which number: '4 classes: 0 one, 1 three, 2 two, 3 zero.'"""
  count = len(names)
  if are_numbers(names):
    return f'{count} classes: 0 to {count - 1}.'
  return f'{count} classes: {some([f"{number} {name}" for number, name in enumerate(names)])}.'


def absent(labels: np.ndarray, names: Sequence[str]) -> list[str]:
  """Numbers and names of the classes that have none of the labels [N]."""
  missing = np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)
  return [str(c) if names[c] == str(c) else f'{c} {names[c]}' for c in missing]


def some(words: Sequence[str], most: int = 20) -> str:
  """Words on a line; of more than `most` half as many, and the last."""
  if len(words) > most:
    words = [*words[: most // 2], '…', words[-1]]
  return ', '.join(' '.join(word.split()) for word in words)


def checked(
  name: str, labels: Sequence[np.ndarray], counts: Sequence[int], names: Sequence[str] | None
) -> tuple[list[np.ndarray], tuple[str, ...]]:
  """Train and test labels as numbers, and the names of the classes.

  Args:
    name: of the data set.
    labels: of each split [N] or [N, 1], whole numbers from 0 or text.
    counts: images of each split.
    names: of classes 0, 1, …, at least those that are there; None: the known set's, or numbers.

  Returns:
    int64 [N] of each split, and `C` names.

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
  count = int(present[-1]) + 1  # before int64, which would wrap what is larger
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
    names = list(map(str, range(count)))
  return [array.astype(np.int64) for array in labels], tuple(names[:count])


def _numbered(name: str, train: np.ndarray, test: np.ndarray) -> tuple[list[np.ndarray], list[str]]:
  """Labels that are text as int64 [N], and the names of their classes. Raises DataError."""
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
  return [
    np.array([numbers[label] for label in array.tolist()], np.int64) for array in (train, test)
  ], names
