"""Preprocessing of raw pixels, fitted on the training images: per-channel standardisation, and ZCA
whitening where asked (Nguyen et al. 2021a, KIP, ICLR, https://arxiv.org/abs/2011.00050; Nguyen et
al. 2021b, NeurIPS, https://arxiv.org/abs/2107.13034).
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import NamedTuple

import numpy as np
import scipy.linalg
import threadpoolctl
from absl import logging

from data import DataError

_CHUNK = 4096  # images standardised at a time
# Rows of every product, padded: BLAS rounds a row by the shape of its product, and an image must
# not depend on others.
_BLOCK = 32
_MOST_VALUES = 2**14  # of an image that is whitened: the matrix then takes 2 GiB
_LOG_SECONDS = 10.0


class Transform(NamedTuple):
  """Map from raw pixel values to the space in which kernels see images.

  Standardised images are (x - mean) / std. With ZCA (the notebook of Nguyen et al. 2021b), the
  d = H W D values of a standardised image then lose their own mean, are divided by their own L2
  norm, and are multiplied by a symmetric matrix.

  Attributes:
    mean, std: float64 [D], in the units of the raw pixels.
    zca: float64 [d, d], the whitening matrix; None: standardisation alone.
    norm: mean of the norms that the training images were divided by; 1 without ZCA.
  """

  mean: np.ndarray
  std: np.ndarray
  zca: np.ndarray | None = None
  norm: float = 1.0


def fit(images: np.ndarray, zca_regularisation: float | None = None) -> Transform:
  """Fits the transform to the training images.

  The published notebook whitens by the first 45,000 of the training images, this by all of them.
  50,000 x 3072 took 42 s to fit and 31 s to apply on one core of an AMD EPYC with AVX-512.

  Args:
    images: [N, H, W, D], raw; may be memory-mapped. A constant channel is only centred, a constant
      image becomes 0.
    zca_regularisation: added to the covariance's diagonal, relative to its mean; None: no
      whitening.

  Raises:
    DataError: images too large to whiten, or all constant.
  """
  pixels = images.size // images.shape[-1]
  zero = np.zeros(images.shape[-1])
  mean = sum((_chunk_sum(chunk) for chunk in _chunks(images)), zero) / pixels
  variance = sum((_chunk_sum((chunk - mean) ** 2) for chunk in _chunks(images)), zero) / pixels
  standard = Transform(mean, np.where(variance > 0, np.sqrt(variance), 1.0))
  return standard if zca_regularisation is None else _fit_zca(standard, images, zca_regularisation)


def apply(transform: Transform, images: np.ndarray, threads: int = 1) -> np.ndarray:
  """Preprocesses raw images [N, H, W, D] in float64, and returns float32 [N, H, W, D].

  An image's bits depend neither on the others nor on `threads`.
  """
  prepared = np.empty(images.shape, np.float32)

  def block(rows: slice) -> None:
    prepared[rows] = apply_to_block(transform, images[rows])

  in_blocks(block, len(images), threads)
  return prepared


def apply_to_block(transform: Transform, images: np.ndarray) -> np.ndarray:
  """Preprocesses raw images of one of `in_blocks`' slices, as `apply`; float64."""
  standard = (images.astype(np.float64) - transform.mean) / transform.std
  if transform.zca is None:
    return standard
  return _whiten(transform.zca, _unit_rows(standard)[0]).reshape(images.shape)


def in_blocks(function: Callable[[slice], None], n: int, threads: int) -> None:
  """Calls `function` on `threads` threads with the slices that cut n rows into blocks.

  BLAS has one thread in each.
  """
  with threadpoolctl.threadpool_limits(1), futures.ThreadPoolExecutor(threads) as pool:
    list(pool.map(function, (slice(start, start + _BLOCK) for start in range(0, n, _BLOCK))))


def invert(transform: Transform, images: np.ndarray) -> np.ndarray:
  """Raw pixel values, float64, of preprocessed images [N, H, W, D], neither clipped nor rounded.

  Whitening drops each image's own mean and norm, its brightness and contrast, which cannot be
  restored: every image gets the mean of the training set and its average norm.
  """
  if transform.zca is not None:
    with threadpoolctl.threadpool_limits(1):
      rows = images.reshape(len(images), -1).astype(np.float64)
      standard = transform.norm * scipy.linalg.solve(transform.zca, rows.T, assume_a='pos').T
      images = standard.reshape(images.shape)
  return images * transform.std + transform.mean


def digest(transform: Transform) -> str:
  """SHA-256 of the whitening matrix (C order, little-endian float64); '' without one."""
  if transform.zca is None:
    return ''
  return hashlib.sha256(np.ascontiguousarray(transform.zca, '<f8').data).hexdigest()


def _fit_zca(standard: Transform, images: np.ndarray, regularisation: float) -> Transform:
  """Adds U s^(-1/2) U^T of the regularised covariance U s U^T.

  Directions that n < d images cannot span keep their size ('rank control').
  """
  n, d = len(images), images[0].size
  if d > _MOST_VALUES:
    raise DataError(
      f'run.data.zca: images of {d} values are too large to whiten (a matrix of {d} x {d}); '
      f'at most {_MOST_VALUES}.'
    )
  covariance, norms, done, last = np.zeros((d, d)), 0.0, 0, time.monotonic()
  with threadpoolctl.threadpool_limits(1):
    for chunk in _chunks(images):
      rows, norm = _unit_rows((chunk - standard.mean) / standard.std)
      covariance += rows.T @ rows
      norms += norm.sum()
      done += len(chunk)
      if time.monotonic() > last + _LOG_SECONDS:
        logging.info('ZCA: covariance of %d of %d images.', done, n)
        last = time.monotonic()
    covariance /= n
    covariance[np.diag_indices(d)] += regularisation * np.trace(covariance) / d
    if not np.trace(covariance) > 0:
      raise DataError('run.data.zca: every training image is constant; there is nothing to whiten.')
    logging.info('ZCA: decomposing the covariance, %d x %d.', d, d)
    values, vectors = scipy.linalg.eigh(covariance, driver='evd', overwrite_a=True)  # ascending
    values[: max(d - n, 0)] = 1.0
    root = vectors * values**-0.25
    return standard._replace(zca=root @ root.T, norm=norms / n)


def _unit_rows(standard: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Rows [N, d] of mean 0 and norm 1, and the norms [N], of standardised images [N, H, W, D]."""
  values = standard.reshape(len(standard), -1)
  rows = values - values.mean(axis=1, keepdims=True)
  norm = np.sqrt((rows**2).sum(axis=1))
  # All that is left of a constant image is rounding.
  norm[norm <= 1e-9 * np.sqrt((values**2).sum(axis=1))] = 0.0
  return rows * np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)[:, None], norm


def _whiten(zca: np.ndarray, rows: np.ndarray) -> np.ndarray:
  """Multiplies rows [N, d], at most a block of them, by the matrix."""
  padded = np.zeros((_BLOCK, rows.shape[1]))
  padded[: len(rows)] = rows
  return (padded @ zca)[: len(rows)]


def _chunks(images: np.ndarray) -> Iterator[np.ndarray]:
  return (images[i : i + _CHUNK].astype(np.float64) for i in range(0, len(images), _CHUNK))


def _chunk_sum(chunk: np.ndarray) -> np.ndarray:
  return chunk.reshape(-1, chunk.shape[-1]).sum(axis=0)
