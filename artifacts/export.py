"""Distilled sets as PNG files, or as a Hugging Face dataset."""

import csv
import io
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from artifacts import files
from artifacts.distilled_set import Distilled, raw_images
from data import DataError

_LABELS = 'labels.csv'
_FOLDER_NAME_LENGTH = 60  # characters, four bytes each at most: file systems allow 255 bytes


def write_images(distilled: Distilled, folder: str) -> None:
  """Writes FOLDER/CLASS/NUMBER.png, and FOLDER/labels.csv with each file's label vector.

  Raises:
    DataError: PNG files cannot hold the images.
    OSError: a file cannot be written.
  """
  pictures, classes = _pictures(distilled), _classes(distilled)
  folders, lines = _folder_names(distilled.class_names), io.StringIO()
  table = csv.writer(lines, lineterminator='\n')
  table.writerow(['file', *(f'label_{name}' for name in distilled.class_names)])
  for i, (picture, label) in enumerate(zip(pictures, distilled.labels)):
    name = f'{folders[classes[i]]}/{i:05d}.png'
    os.makedirs(os.path.join(folder, os.path.dirname(name)), exist_ok=True)
    picture.save(os.path.join(folder, name))
    table.writerow([name, *(f'{value:.9g}' for value in label)])
  files.write_atomically(os.path.join(folder, _LABELS), lines.getvalue())


def write_dataset(distilled: Distilled, folder: str) -> None:
  """Writes FOLDER/train.parquet, which `datasets.load_dataset(FOLDER)` reads.

  Raises:
    DataError: PNG files cannot hold the images.
    OSError: the file cannot be written.
  """
  import datasets  # here, because it takes seconds

  num_classes = distilled.labels.shape[1]
  features = datasets.Features(
    {
      'image': datasets.Image(),
      'label': datasets.ClassLabel(names=distilled.class_names),
      'pixels': datasets.Array3D(distilled.images.shape[1:], 'float32'),
      'soft_label': datasets.List(datasets.Value('float32'), num_classes),
    }
  )
  os.makedirs(folder, exist_ok=True)
  datasets.Dataset.from_dict(
    {
      'image': _pictures(distilled),
      'label': _classes(distilled),
      'pixels': list(distilled.images),
      'soft_label': distilled.labels.tolist(),
    },
    features=features,
  ).to_parquet(os.path.join(folder, 'train.parquet'))


def _classes(distilled: Distilled) -> list[int]:
  """The class of each image: images are in order of their classes, as many of each."""
  num_images, num_classes = distilled.labels.shape
  return [i * num_classes // num_images for i in range(num_images)]


def _folder_names(class_names: Sequence[str]) -> list[str]:
  """Names of the classes' folders, near to the classes' own.

  They differ, and are allowed, on file systems that ignore case or reserve names too.
  """
  names = []
  for c, class_name in enumerate(class_names):
    name = re.sub(r'[^\w.+() -]', '_', class_name)[:_FOLDER_NAME_LENGTH].strip('. ')
    taken = [_LABELS, *(other.lower() for other in names)]
    while not name or name.lower() in taken or pathlib.PureWindowsPath(name).is_reserved():
      name = f'{c}_{name}'
    names.append(name)
  return names


def _pictures(distilled: Distilled) -> list[Any]:
  """Pillow's images of the raw pixels. Raises DataError where they are neither grey nor RGB."""
  from PIL import Image

  channels = distilled.images.shape[-1]
  if channels not in (1, 3):
    raise DataError(f'PNG files hold 1 or 3 channels; these images have {channels}.')
  return [
    Image.fromarray(image[..., 0] if channels == 1 else image) for image in raw_images(distilled)
  ]
