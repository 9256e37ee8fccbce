"""Released sets are fetched once from a server that behaves like the bucket, checked, and refused
with a reason."""

import base64
import hashlib
import http.server
import os
import threading

import numpy as np
import pytest

from data import DataError, released

KIP = 'kip/cifar10/ConvNet_ssize100_zca_nol_noaug_ckpt1000.npz'
LS = 'ls/fashion_mnist/ConvNet3_ssize10_nozca.npz'


@pytest.fixture
def bucket(tmp_path):
  """A folder that a local server offers as the bucket, its URL, and the list of paths that were
  asked for."""
  folder, asked = tmp_path / 'bucket', []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append(self.path[1:])
      path = folder / self.path[1:]
      if not path.exists():
        self.send_error(404)
        return
      content = path.read_bytes()
      self.send_response(200)
      cut = 9 * path.name.startswith('ConvNet3_ssize500')
      self.send_header('Content-Length', str(len(content) + cut))
      md5 = b'another' if path.name.startswith('ConvNet_ssize500') else content
      self.send_header('x-goog-hash', 'crc32c=AAAAAA==')
      self.send_header('x-goog-hash', f'md5={base64.b64encode(hashlib.md5(md5).digest()).decode()}')
      self.end_headers()
      self.wfile.write(content)

    def log_message(self, format, *args):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield folder, f'http://127.0.0.1:{server.server_address[1]}', asked
  server.shutdown()
  server.server_close()


def _offer(folder, name, images, labels):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  np.savez(path, images=images, labels=labels)


def test_fetched_once_and_read_by_its_name(bucket, tmp_path):
  folder, url, asked = bucket
  rng = np.random.default_rng(0)
  images, labels = rng.normal(size=(100, 32, 32, 3)), rng.normal(size=(100, 10))
  _offer(folder, KIP, images, labels)
  _offer(folder, LS, images[:10, :28, :28, :1], labels[:10])
  for _ in range(2):
    found = released.load(KIP, str(tmp_path / 'cache'), url)
    assert found[2:] == ('cifar10', 'convnet', True, False, False, 1000)
    assert found.images.dtype == found.labels.dtype == np.float32
    np.testing.assert_array_equal(found.images, images.astype(np.float32))
    np.testing.assert_array_equal(found.labels, labels.astype(np.float32))
  assert asked == [KIP]
  assert released.load(LS, str(tmp_path / 'cache'), url)[2:] == (
    'fashion_mnist',
    'convnet3',
    False,
    True,
    None,
    0,
  )


def test_what_is_refused(bucket, tmp_path):
  folder, url, _ = bucket
  cache = str(tmp_path / 'cache')
  for name in (
    'nothing',
    'kip/cifar10/ConvNet_ssize100_zca.npz',
    'ls/mnist/ConvNet_ssize10_zca_l_aug_ckpt0.npz',
    f'../{KIP}',
  ):
    with pytest.raises(
      DataError, match='is no name of a released set; they are such as kip/cifar10/'
    ):
      released.load(name, cache, url)
  with pytest.raises(DataError, match='404 Not Found; the released sets are listed in'):
    released.load(KIP, cache, url)
  damaged = 'ls/cifar10/ConvNet_ssize500_zca.npz'
  _offer(folder, damaged, np.zeros((500, 32, 32, 3)), np.zeros((500, 10)))
  with pytest.raises(DataError, match='arrived damaged: its MD5'):
    released.load(damaged, cache, url)
  cut_short = 'ls/cifar10/ConvNet3_ssize500_zca.npz'
  _offer(folder, cut_short, np.zeros((500, 32, 32, 3)), np.zeros((500, 10)))
  with pytest.raises(DataError, match='cannot be fetched: IncompleteRead'):
    released.load(cut_short, cache, url)
  _offer(folder, LS, np.zeros((10, 32, 32, 1)), np.zeros((10, 10)))
  with pytest.raises(
    DataError,
    match=r'expected images \(10, 28, 28, 1\) and labels \(10, 10\) by its name, got \(10, 32, 32',
  ):
    released.load(LS, cache, url)
  path = os.path.join(cache, 'released', LS)
  np.savez(path, images=np.full((10, 28, 28, 1), np.nan), labels=np.zeros((10, 10)))
  with pytest.raises(DataError, match='contains NaN'):
    released.load(LS, cache, url)
  np.savez(path, images=np.zeros((10, 28, 28, 1)))
  with pytest.raises(DataError, match='not a readable distilled set .*remove it'):
    released.load(LS, cache, url)
  with pytest.raises(DataError, match='cannot be fetched: .*put it at .*ConvNet_ssize100_zca'):
    released.load(KIP, cache, 'http://127.0.0.1:1')


@pytest.mark.network
def test_a_real_one(tmp_path):
  found = released.load(KIP, str(tmp_path))
  assert (
    found.images.shape == (100, 32, 32, 3)
    and np.bincount(found.labels.argmax(axis=1)).tolist() == [10] * 10
  )
  np.testing.assert_allclose(np.unique(found.labels), [-0.1, 0.9], atol=1e-6)
