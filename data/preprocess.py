"""Per-channel standardisation, fitted on the training images (K1, K2)."""

from typing import NamedTuple

import numpy as np

_CHUNK = 4096


class Transform(NamedTuple):
  """Raw pixel values -> the space in which kernels see images: (x - mean) / std.

  Attributes:
    mean, std: float64 [D], in the units of the raw pixels.
  """
  mean: np.ndarray
  std: np.ndarray


def fit(images: np.ndarray) -> Transform:
  """The transform of the training images [N, H, W, D]; a constant channel is only centred."""
  pixels = images.size // images.shape[-1]
  mean = sum(_chunk_sum(chunk) for chunk in _chunks(images)) / pixels
  variance = sum(_chunk_sum((chunk - mean) ** 2) for chunk in _chunks(images)) / pixels
  return Transform(mean, np.where(variance > 0, np.sqrt(variance), 1.0))


def apply(transform: Transform, images: np.ndarray) -> np.ndarray:
  """Raw images [N, H, W, D] -> float32 [N, H, W, D], computed in float64."""
  return np.concatenate([((chunk - transform.mean) / transform.std).astype(np.float32) for chunk in _chunks(images)])


def invert(transform: Transform, images: np.ndarray) -> np.ndarray:
  """Preprocessed images [N, H, W, D] -> raw pixel values, float64, neither clipped nor rounded."""
  return images * transform.std + transform.mean


def _chunks(images):
  return (images[i:i + _CHUNK].astype(np.float64) for i in range(0, len(images), _CHUNK))


def _chunk_sum(chunk):
  return chunk.reshape(-1, chunk.shape[-1]).sum(axis=0)
