"""Distilled sets that the authors of Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034)
released, by their names in a public bucket (listed in their notebook `dataset.ipynb`).

A file's MD5 comes with the file, from the server alone: a downloader that checks against a list of
known hashes (pooch) would leave most of `_download` to be written here.
"""

import base64
import hashlib
import http.client
import os
import re
import tempfile
import urllib.error
import urllib.request
from typing import NamedTuple

import numpy as np
from absl import logging

from data import DataError, npz

BUCKET = 'https://storage.googleapis.com/kip-datasets'
_NAME = re.compile(
  r'(?P<method>kip|ls)/(?P<data>mnist|fashion_mnist|svhn_cropped|cifar10|cifar100)/'
  r'(?P<architecture>ConvNet3?)_ssize(?P<size>\d+)_(?P<zca>zca|nozca)'
  r'(_(?P<labels>l|nol)_(?P<augmentation>aug|noaug)_ckpt(?P<step>\d+))?\.npz'
)
_EXAMPLES = (
  'kip/cifar10/ConvNet_ssize100_zca_nol_noaug_ckpt1000.npz or ls/mnist/ConvNet_ssize10_nozca.npz'
)
_TIMEOUT = 60.0  # seconds without an answer


class Released(NamedTuple):
  """A released set, and what its name says.

  Attributes:
    images: float32 [S, H, W, D], preprocessed space.
    labels: float32 [S, C], centred.
    data: name of the data set it was distilled from.
    architecture: name of the kernel's architecture.
    zca: whether the space is whitened.
    learned_labels: whether its labels were learned, or solved for.
    augmented: whether its targets were augmented; None for Label Solve.
    step: Adam updates.
  """

  images: np.ndarray
  labels: np.ndarray
  data: str
  architecture: str
  zca: bool
  learned_labels: bool
  augmented: bool | None
  step: int


def is_name(text: str) -> bool:
  """Whether `text` begins like a released set's name, and is no file on this machine."""
  return text.startswith(('kip/', 'ls/')) and not os.path.exists(text)


def load(name: str, cache: str, bucket: str = BUCKET) -> Released:
  """Loads a released set, which is fetched once, and checks it against its name.

  Args:
    name: path in the bucket, such as `kip/cifar10/ConvNet_ssize100_zca_nol_noaug_ckpt1000.npz`
      (`l`, `nol`: labels learned or not).
    cache: folder to keep it in.
    bucket: URL to fetch it from.

  Raises:
    DataError: no such name, no network and not in the cache, or content that does not fit the name.
  """
  found = _NAME.fullmatch(name)
  if not found or (found['method'] == 'kip') != bool(found['step']):
    raise DataError(f'{name!r} is no name of a released set; they are such as {_EXAMPLES}.')
  path = os.path.join(cache, 'released', name)
  if not os.path.exists(path):
    _download(name, path, bucket)
  try:
    file = npz.read(path, ('images', 'labels'))
    images, labels = (np.asarray(file[key], np.float32) for key in ('images', 'labels'))
  except ValueError as error:
    raise DataError(
      f'{path!r} is not a readable distilled set ({error}); remove it to fetch it again.'
    ) from error
  size, num_classes = int(found['size']), 100 if found['data'] == 'cifar100' else 10
  shape = (28, 28, 1) if found['data'].endswith('mnist') else (32, 32, 3)
  if images.shape != (size, *shape) or labels.shape != (size, num_classes):
    raise DataError(
      f'{path!r}: expected images {(size, *shape)} and labels {(size, num_classes)} by its name, '
      f'got {images.shape} and {labels.shape}.'
    )
  if not (np.isfinite(images).all() and np.isfinite(labels).all()):
    raise DataError(f'{path!r} contains NaN or infinity.')
  kip = found['method'] == 'kip'
  return Released(
    images,
    labels,
    found['data'],
    found['architecture'].lower(),
    found['zca'] == 'zca',
    found['labels'] != 'nol',
    found['augmentation'] == 'aug' if kip else None,
    int(found['step'] or 0),
  )


def _download(name: str, path: str, bucket: str) -> None:
  """Fetches a file, and renames it into place once its length and MD5 are what the server says."""
  url = f'{bucket}/{name}'
  logging.info('Fetching %s.', url)
  try:
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
      content, hashes = answer.read(), ','.join(answer.headers.get_all('x-goog-hash') or [])
  except urllib.error.HTTPError as error:
    raise DataError(
      f'{url}: {error.code} {error.reason}; the released sets are listed in '
      f'{bucket}/kip/kip.csv and {bucket}/ls/ls.csv.'
    ) from error
  except (OSError, ValueError, http.client.HTTPException) as error:
    raise DataError(
      f'{url} cannot be fetched: {error}. With the file at hand, put it at {path}.'
    ) from error
  md5 = re.search(r'md5=([\w+/=]+)', hashes)
  if md5 and base64.b64encode(hashlib.md5(content).digest()).decode() != md5[1]:
    raise DataError(f'{url} arrived damaged: its MD5 is not the one the server gives; try again.')
  try:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=os.path.dirname(path))
    with os.fdopen(handle, 'wb') as file:
      file.write(content)
    os.replace(scratch, path)
  except OSError as error:
    raise DataError(
      f'{path!r} cannot be written: {error.strerror}; choose another folder by '
      '--config.system.cache_dir.'
    ) from error
