"""The cache gives back what was put in, to every process and over the wire, and heals."""

import os

import numpy as np
import pytest

from data import DataError
from data import preprocess
from data import store


def _write_npz(path, seed=0):
  x = np.random.default_rng(seed).integers(0, 256, size=(40, 4, 5, 3)).astype(np.uint8)
  y = np.arange(40) % 3
  np.savez(path, x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
  return str(path)


def _data(path, zca=False, regularisation=0.1):
  return {'name': path, 'dir': '', 'zca': zca, 'zca_regularisation': regularisation}


def _raw(path):
  with np.load(path) as file:
    return file['x_train']


def test_the_cache_gives_back_the_same_and_heals(tmp_path):
  path, cache = _write_npz(tmp_path / 'a.npz'), str(tmp_path / 'cache')
  first = store.prepare(_data(path), cache)
  again = store.prepare(_data(path), cache)
  assert (again.key, again.content) == (first.key, first.content) and isinstance(again.train_images, np.memmap)
  np.testing.assert_array_equal(again.train_images, first.train_images)
  assert again.raw_images is None and again.transform.zca is None
  file = os.path.join(cache, first.key, 'train_images.npy')
  expected = np.array(first.train_images)
  open(file, 'wb').write(open(file, 'rb').read()[:-40])
  np.testing.assert_array_equal(store.prepare(_data(path), cache).train_images, expected)
  with open(file, 'r+b') as flipped:
    flipped.seek(-40, os.SEEK_END)
    byte = flipped.read(1)[0]
    flipped.seek(-1, os.SEEK_CUR)
    flipped.write(bytes([byte ^ 4]))
  assert store.open_prepared(first.key, cache) is None
  np.testing.assert_array_equal(store.prepare(_data(path), cache).train_images, expected)
  other = store.prepare(_data(_write_npz(tmp_path / 'b.npz', seed=1)), cache)
  assert other.key != first.key and other.content != first.content


def test_zca_is_kept_with_its_images(tmp_path, monkeypatch):
  path, cache = _write_npz(tmp_path / 'a.npz'), str(tmp_path / 'cache')
  monkeypatch.setattr(store, '_PIECE', 7)
  prepared = store.prepare(_data(path, zca=True), cache)
  expected = preprocess.fit(_raw(path), 0.1)
  np.testing.assert_array_equal(prepared.transform.zca, expected.zca)
  np.testing.assert_array_equal(prepared.transform.mean, expected.mean)
  assert prepared.transform.norm == expected.norm
  np.testing.assert_array_equal(prepared.train_images, preprocess.apply(expected, _raw(path)))
  np.testing.assert_array_equal(prepared.test_images, preprocess.apply(expected, _raw(path)[:3]))
  keys = {store.prepare(_data(path, *zca), cache).key for zca in ((False,), (True,), (True, 0.2), (True, 0.1))}
  assert len(keys) == 3


def test_raw_images_are_shared_by_all_preprocessings(tmp_path):
  path, cache = _write_npz(tmp_path / 'a.npz'), str(tmp_path / 'cache')
  store.prepare(_data(path), cache)
  assert not [name for name in os.listdir(cache) if name.endswith('raw')]
  for zca in (False, True):
    prepared = store.prepare(_data(path, zca), cache, raw=True)
    assert isinstance(prepared.raw_images, np.memmap)
    np.testing.assert_array_equal(prepared.raw_images, _raw(path))
  assert len([name for name in os.listdir(cache) if name.endswith('raw')]) == 1


@pytest.mark.parametrize('zca', [False, True])
@pytest.mark.parametrize('raw', [False, True])
def test_data_are_fetched_once_in_chunks_and_checked(tmp_path, monkeypatch, zca, raw):
  monkeypatch.setattr(store, 'CHUNK_BYTES', 1000)
  there, here = str(tmp_path / 'there'), str(tmp_path / 'here')
  prepared = store.prepare(_data(_write_npz(tmp_path / 'a.npz'), zca), there, raw=True)
  calls = []

  def read(folder, file, offset):
    calls.append((folder, file, offset))
    return store.read_chunk(prepared.key, there, folder, file, offset)

  fetched = store.fetch(prepared.key, here, read, raw)
  assert (fetched.key, fetched.content, fetched.name) == (prepared.key, prepared.content, prepared.name)
  np.testing.assert_array_equal(fetched.train_images, prepared.train_images)
  np.testing.assert_array_equal(fetched.test_labels, prepared.test_labels)
  for there_value, here_value in zip(prepared.transform, fetched.transform):
    np.testing.assert_array_equal(here_value, there_value)
  if raw:
    np.testing.assert_array_equal(fetched.raw_images, prepared.raw_images)
  else:
    assert fetched.raw_images is None
  count = len(calls)
  store.fetch(prepared.key, here, read, raw)
  assert len(calls) == count
  with pytest.raises(DataError, match='do not match their digests'):
    store.fetch(prepared.key, str(tmp_path / 'third'), lambda folder, file, offset: read(folder, file, offset).replace(b'\x01', b'\x02')
                if file.startswith('train_labels') else read(folder, file, offset))


def test_only_a_prepared_set_can_be_read(tmp_path):
  prepared = store.prepare(_data(_write_npz(tmp_path / 'a.npz')), str(tmp_path))
  for folder, file in ((prepared.key, '../secret'), ('..', 'meta.json'), (prepared.key, 'other.npy')):
    with pytest.raises(ValueError, match='no file'):
      store.read_chunk(prepared.key, str(tmp_path), folder, file, 0)


def test_an_unwritable_cache(tmp_path):
  (tmp_path / 'cache').write_text('a file, not a folder')
  with pytest.raises(DataError, match='cannot be used.*system.cache_dir'):
    store.prepare(_data(_write_npz(tmp_path / 'a.npz')), str(tmp_path / 'cache'))
