"""The transforms against their formulas written out, and what must not change a bit of them."""

import os
import subprocess
import sys

import numpy as np
import pytest

from data import DataError, preprocess

ROOT = os.path.join(os.path.dirname(__file__), '..', '..')


def _smooth(n, shape=(5, 4, 3), seed=0):
  """Images whose pixels are correlated, so that whitening has something to do."""
  rng = np.random.default_rng(seed)
  d = int(np.prod(shape))
  rows = rng.normal(size=(n, d)) @ (rng.normal(size=(d, d)) * 0.9 ** np.arange(d))
  return np.clip(128 + 12 * rows, 0, 255).astype(np.uint8).reshape(n, *shape)


def _published(images, regularisation):
  """Whitening function and matrix as in the notebook of Nguyen et al. 2021b (NeurIPS,
  https://arxiv.org/abs/2107.13034), `_get_preprocess_op` with `layer_norm=True`, step by step."""
  mean, std = images.astype(float).mean((0, 1, 2)), images.astype(float).std((0, 1, 2))

  def normal(raw):
    rows = ((raw - mean) / std).reshape(len(raw), -1)
    rows = rows - rows.mean(axis=1)[:, None]
    return rows / np.linalg.norm(rows, axis=1)[:, None]

  rows = normal(images)
  n, d = rows.shape
  covariance = rows.T.dot(rows) / n
  u, s, _ = np.linalg.svd(covariance + regularisation * np.trace(covariance) / d * np.eye(d))
  inverse_root = s ** (-1 / 2)
  if n < d:
    inverse_root[n:] = 1
  matrix = np.einsum('ij,j,kj->ik', u, inverse_root, u)
  return lambda raw: normal(raw).dot(matrix).reshape(raw.shape), matrix


def test_standardisation():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, size=(5000, 3, 3, 2)).astype(np.uint8)
  images[..., 1] //= 3
  transform = preprocess.fit(images)
  np.testing.assert_allclose(transform.mean, images.astype(float).mean((0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(transform.std, images.astype(float).std((0, 1, 2)), rtol=1e-12)
  standard = preprocess.apply(transform, images)
  assert standard.dtype == np.float32
  np.testing.assert_allclose(standard.astype(float).std((0, 1, 2)), 1, rtol=1e-6)
  np.testing.assert_allclose(preprocess.invert(transform, standard), images, atol=1e-4)
  constant = preprocess.fit(np.full((3, 2, 2, 1), 7, np.uint8))
  assert preprocess.apply(constant, np.full((1, 2, 2, 1), 7, np.uint8)).max() == 0


@pytest.mark.parametrize(
  'n, regularisation', [(5000, 0.1), (301, 0.1), (60, 0.1), (23, 0.1), (301, 1e-3)]
)
def test_zca_is_the_published_one(n, regularisation):
  images, others = _smooth(n), _smooth(7, seed=1)
  transform = preprocess.fit(images, regularisation)
  published, matrix = _published(images, regularisation)
  assert transform.zca is not None
  np.testing.assert_allclose(transform.zca, matrix, rtol=1e-9, atol=1e-9)
  for raw in (images, others):
    whitened = preprocess.apply(transform, raw)
    assert whitened.dtype == np.float32
    np.testing.assert_allclose(whitened, published(raw), rtol=1e-5, atol=1e-6)


def test_zca_whitens():
  """Without much regularisation the covariance becomes the identity, except for the mean that each
  image has lost."""
  images = _smooth(4000)
  rows = preprocess.apply(preprocess.fit(images, 1e-6), images).reshape(4000, -1).astype(float)
  values = np.linalg.eigvalsh(rows.T @ rows / len(rows))
  assert values[0] < 1e-3 and abs(values[2:] - 1).max() < 0.02


def test_the_inverse_of_zca():
  images = _smooth(500)
  transform = preprocess.fit(images, 0.1)
  restored = preprocess.invert(transform, preprocess.apply(transform, images))
  standard, back = [
    ((x - transform.mean) / transform.std).reshape(500, -1) for x in (images, restored)
  ]
  centred = standard - standard.mean(axis=1, keepdims=True)
  norms = np.linalg.norm(centred, axis=1, keepdims=True)
  assert transform.norm == pytest.approx(norms.mean(), rel=1e-12)
  # All but each image's own brightness and contrast.
  np.testing.assert_allclose(back, centred * transform.norm / norms, atol=1e-4)


def test_an_image_does_not_depend_on_its_companions():
  images = _smooth(300)
  transform = preprocess.fit(images, 0.1)
  whole = preprocess.apply(transform, images)
  for chosen in ([17], [299, 0], range(40, 297)):
    np.testing.assert_array_equal(
      preprocess.apply(transform, images[list(chosen)]), whole[list(chosen)]
    )


def test_no_bit_depends_on_the_number_of_threads():
  code = (
    'import hashlib, sys; import numpy as np; from data import preprocess; '
    'x = np.random.default_rng(0).integers(0, 256, size=(900, 16, 16, 3)).cumsum(axis=1) // 16; '
    't = preprocess.fit(x, 0.1); y = preprocess.apply(t, x, int(sys.argv[1])); '
    'print(preprocess.digest(t), hashlib.sha256(y).hexdigest())'
  )
  found = {
    subprocess.run(
      [sys.executable, '-c', code, threads],
      cwd=ROOT,
      env={**os.environ, 'OPENBLAS_NUM_THREADS': threads},
      check=True,
      capture_output=True,
      text=True,
      timeout=300,
    ).stdout
    for threads in ('1', '2', '3')
  }
  assert len(found) == 1 and len(found.pop().split()[0]) == 64


def test_constant_images():
  images = _smooth(50)
  images[3] = 77
  standard = np.full((1, 1, 1, 3), 77)
  transform = preprocess.fit(images, 0.1)
  assert transform.zca is not None and np.isfinite(transform.zca).all()
  assert np.isfinite(preprocess.apply(transform, images)).all()
  grey = preprocess.fit(images[..., :1], 0.1)
  assert not preprocess.apply(grey, np.broadcast_to(standard, (1, 5, 4, 3))[..., :1]).any()
  with pytest.raises(DataError, match='every training image is constant'):
    preprocess.fit(np.full((4, 2, 2, 1), 7, np.uint8), 0.1)


def test_images_too_large_to_whiten():
  with pytest.raises(
    DataError, match='images of 16875 values are too large to whiten .* at most 16384'
  ):
    preprocess.fit(np.arange(2 * 75 * 75 * 3).reshape(2, 75, 75, 3), 0.1)
