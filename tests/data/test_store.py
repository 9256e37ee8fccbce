"""The cache gives back what was put in, to every process and over the wire, and heals."""

import dataclasses
import io
import json
import os

import numpy as np
import pytest

from configs import schema
from data import DataError, preprocess, store


def _write_npz(path, seed=0, n=40):
  x = np.random.default_rng(seed).integers(0, 256, size=(n, 4, 5, 3)).astype(np.uint8)
  y = np.arange(n) % 3
  np.savez(path, x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
  return str(path)


def _data(path, zca=False, regularisation=0.1):
  return schema.Data(name=path, zca=zca, zca_regularisation=regularisation)


def _assert_equal(found, expected):
  """Compares arrays and Nones one by one."""
  for one, other in zip(found, expected):
    assert (one is None) == (other is None) and np.array_equal(one, other)


def _raw(path):
  with np.load(path) as file:
    return file['x_train']


def test_the_cache_gives_back_the_same_and_heals(tmp_path):
  path, cache = _write_npz(tmp_path / 'a.npz'), str(tmp_path / 'cache')
  first = store.prepare(_data(path), cache)
  again = store.prepare(_data(path), cache)
  assert (again.key, again.content) == (first.key, first.content) and isinstance(
    again.train_images, np.memmap
  )
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


def test_zca_is_kept_with_its_images(tmp_path):
  # More images than are preprocessed at a time.
  path, cache = _write_npz(tmp_path / 'a.npz', n=2100), str(tmp_path / 'cache')
  prepared = store.prepare(_data(path, zca=True), cache)
  expected = preprocess.fit(_raw(path), 0.1)
  assert prepared.transform.zca is not None and expected.zca is not None
  np.testing.assert_array_equal(prepared.transform.zca, expected.zca)
  np.testing.assert_array_equal(prepared.transform.mean, expected.mean)
  assert prepared.transform.norm == expected.norm
  np.testing.assert_array_equal(prepared.train_images, preprocess.apply(expected, _raw(path)))
  np.testing.assert_array_equal(prepared.test_images, preprocess.apply(expected, _raw(path)[:3]))
  keys = {
    store.prepare(_data(path, zca, regularisation), cache).key
    for zca, regularisation in ((False, 0.1), (True, 0.1), (True, 0.2), (True, 0.1))
  }
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
def test_data_are_fetched_once_in_chunks_and_checked(tmp_path, zca, raw):
  there, here = str(tmp_path / 'there'), str(tmp_path / 'here')
  prepared = store.prepare(_data(_write_npz(tmp_path / 'a.npz'), zca), there, raw=True)
  calls = []

  def read(folder, file, offset):
    calls.append((folder, file, offset))
    return store.read_chunk(prepared.key, there, folder, file, offset, size=1000)

  fetched = store.fetch(prepared.key, here, read, raw)
  assert (fetched.key, fetched.content, fetched.name) == (
    prepared.key,
    prepared.content,
    prepared.name,
  )
  np.testing.assert_array_equal(fetched.train_images, prepared.train_images)
  np.testing.assert_array_equal(fetched.test_labels, prepared.test_labels)
  _assert_equal(fetched.transform, prepared.transform)
  _assert_equal([fetched.raw_images], [prepared.raw_images if raw else None])
  count = len(calls)
  store.fetch(prepared.key, here, read, raw)
  assert len(calls) == count
  with pytest.raises(DataError, match='do not match their digests'):
    store.fetch(
      prepared.key,
      str(tmp_path / 'third'),
      lambda folder, file, offset: (
        read(folder, file, offset).replace(b'\x02\0\0', b'\x01\0\0')
        if file.startswith('train_labels')
        else read(folder, file, offset)
      ),
    )


def _flip(cache, folder, file, place=-40):
  with open(os.path.join(cache, folder, file), 'r+b') as flipped:
    flipped.seek(place, os.SEEK_END)
    byte = flipped.read(1)[0]
    flipped.seek(-1, os.SEEK_CUR)
    flipped.write(bytes([byte ^ 4]))


@pytest.mark.parametrize(
  'zca, folder, file',
  [
    (False, '', 'train_images.npy'),
    (False, '', 'test_images.npy'),
    (False, '', 'train_labels.npy'),
    (False, '', 'test_labels.npy'),
    (True, '', 'zca.npy'),
    (False, '-raw', 'train_images.npy'),
    (False, '', 'meta.json'),
  ],
)
def test_a_worker_notices_a_flipped_bit_in_its_cache_and_fetches_anew(tmp_path, zca, folder, file):
  there, here = str(tmp_path / 'there'), str(tmp_path / 'here')
  prepared = store.prepare(_data(_write_npz(tmp_path / 'a.npz'), zca), there, raw=True)
  calls = []

  def read(folder, file, offset):
    calls.append((folder, file))
    return store.read_chunk(prepared.key, there, folder, file, offset)

  store.fetch(prepared.key, here, read, raw=True)
  folder = prepared.key.partition('-')[0] + folder if folder else prepared.key
  _flip(here, folder, file)
  assert store.open_prepared(prepared.key, here, raw=True) is None
  calls.clear()
  again = store.fetch(prepared.key, here, read, raw=True)
  assert {called for called, _ in calls} == {folder}
  assert again.content == prepared.content
  for name in ('train_images', 'train_labels', 'test_images', 'test_labels', 'raw_images'):
    np.testing.assert_array_equal(getattr(again, name), getattr(prepared, name))
  _assert_equal(again.transform, prepared.transform)


def test_a_flipped_bit_in_the_one_cache_is_refused_and_the_next_launch_mends_it(tmp_path):
  path, cache = _write_npz(tmp_path / 'a.npz'), str(tmp_path / 'cache')
  prepared = store.prepare(_data(path), cache)
  expected = np.array(prepared.train_images)
  _flip(cache, prepared.key, 'train_images.npy')
  message = 'are gone, or were found damaged and removed: stop the run; its command makes them'
  with pytest.raises(DataError, match=message):
    store.fetch(prepared.key, cache, lambda *place: store.read_chunk(prepared.key, cache, *place))
  np.testing.assert_array_equal(store.prepare(_data(path), cache).train_images, expected)


@pytest.mark.parametrize('file', ['meta.json', 'test_labels.npy'])
def test_files_that_are_missing_are_made_again(tmp_path, file):
  path, cache = _write_npz(tmp_path / 'a.npz'), str(tmp_path / 'cache')
  prepared = store.prepare(_data(path), cache)
  os.unlink(os.path.join(cache, prepared.key, file))
  assert store.prepare(_data(path), cache).content == prepared.content


def test_names_and_remarks_are_kept_and_fetched(tmp_path):
  x = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3)).astype(np.uint8)
  y = np.array(['10', '9', '8'] * 2)
  np.savez(tmp_path / 'a.npz', x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
  there, here = str(tmp_path / 'there'), str(tmp_path / 'here')
  for _ in range(2):
    prepared = store.prepare(_data(str(tmp_path / 'a.npz')), there)
    assert prepared.class_names == ('8', '9', '10')
    assert prepared.remarks == ('Classes without a test image: 0 8.',)
  fetched = store.fetch(
    prepared.key, here, lambda *place: store.read_chunk(prepared.key, there, *place)
  )
  assert (fetched.class_names, fetched.remarks) == (prepared.class_names, prepared.remarks)


def test_a_size_has_a_cache_of_its_own(tmp_path):
  path, cache = _write_npz(tmp_path / 'a.npz'), str(tmp_path / 'cache')
  keys = set()
  for size, shape in ((0, (4, 5, 3)), (4, (4, 4, 3)), (2, (2, 2, 3))):
    prepared = store.prepare(dataclasses.replace(_data(path), size=size), cache, raw=True)
    assert prepared.train_images.shape[1:] == prepared.test_images.shape[1:] == shape
    assert prepared.raw_images is not None and prepared.raw_images.shape[1:] == shape
    keys.add(prepared.key)
  assert len(keys) == 3 and store.prepare(_data(path), cache).train_images.shape[1:] == (4, 5, 3)


def test_only_a_prepared_set_can_be_read(tmp_path):
  prepared = store.prepare(_data(_write_npz(tmp_path / 'a.npz')), str(tmp_path))
  for folder, file in (
    (prepared.key, '../secret'),
    ('..', 'meta.json'),
    (prepared.key, 'other.npy'),
  ):
    with pytest.raises(ValueError, match='no file'):
      store.read_chunk(prepared.key, str(tmp_path), folder, file, 0)


KEY = 32 * 'a' + '-standard'


@pytest.mark.parametrize(
  'key',
  ['../../x', 'x', f'{KEY}/..', f'{KEY}\n', KEY[1:], f'/{KEY}', f'{KEY[:32]}-zca', '', None, 7],
)
def test_a_key_that_is_none_touches_no_file(tmp_path, key):
  """Neither a folder of another's nor a new one; and nothing is asked of the peer."""
  cache, other = tmp_path / 'a' / 'cache', tmp_path / 'x'
  cache.mkdir(parents=True)
  other.mkdir()
  (other / 'precious').touch()
  before = sorted(tmp_path.rglob('*'))
  calls = []
  for use in (
    lambda: store.fetch(key, str(cache), lambda *place: calls.append(place) or b''),
    lambda: store.open_prepared(key, str(cache)),
    lambda: store.check_key(key),
  ):
    with pytest.raises(DataError, match='is no name of prepared data: it must be 32 hexadecimal'):
      use()
  assert sorted(tmp_path.rglob('*')) == before and not calls


@pytest.mark.parametrize('regularisation', [None, 0.1, 1e-9, 12345.678, 1e9])
def test_keys_of_all_recipes_are_good(tmp_path, regularisation):
  data = _data(_write_npz(tmp_path / 'a.npz'), regularisation is not None, regularisation or 0.1)
  key = store.prepare(data, str(tmp_path / 'cache')).key
  assert store.check_key(key) == key


def _npy(array, **changes):
  """The beginning of an .npy file, its header changed."""
  stream = io.BytesIO()
  header = {**np.lib.format.header_data_from_array_1_0(array), **changes}
  np.lib.format.write_array_header_1_0(stream, header)
  return stream.getvalue()


LABELS = np.zeros(3, np.int64)
META = {'sha256': dict.fromkeys(('train_images', 'train_labels', 'test_images', 'test_labels'), '')}


@pytest.mark.parametrize(
  'meta, content, message',
  [
    ([], b'', 'as a*-standard/meta.json: list indices must be'),
    ('[' * 10**5, b'', 'as a*-standard/meta.json: maximum recursion depth'),
    (' ' * (store.CHUNK_BYTES + 1), b'', 'a part of it is not at most 4194304 bytes'),
    ({'sha256': {'../../x': ''}}, b'', 'it lists other files than train_images, train_labels, '),
    (META, 7, 'a part of it is not at most 4194304 bytes'),
    (META, b'', 'train_images.npy: .*magic string'),
    (META, bytes(store.CHUNK_BYTES + 1), 'a part of it is not at most 4194304 bytes'),
    (META, _npy(LABELS) + bytes(30), 'it goes on after the 152 bytes of its array'),
    (META, _npy(LABELS, descr='O') + bytes(24), r'an array \(3,\) of object'),
    (META, _npy(LABELS, shape=(-1, -(10**9))), r'an array \(-1, -1000000000\) of int64'),
    (
      META,
      _npy(LABELS, shape=(2**20, 2**40)),
      'has 9223372036.9 GB, and the cache folder .* make room',
    ),
  ],
)
def test_a_peer_that_sends_something_else_is_cut_off(tmp_path, meta, content, message):
  """One that sends for ever, too: every call gets the same bytes."""
  calls = []

  def read(folder, file, offset):
    calls.append(offset)
    assert len(calls) < 100
    sent = meta if isinstance(meta, str) else json.dumps(meta)
    return sent.encode() if file == 'meta.json' else content

  with pytest.raises(DataError, match=message.replace('a*', 'a{32}')):
    store.fetch(KEY, str(tmp_path / 'cache'), read)
  assert list(tmp_path.rglob('*')) in ([], [tmp_path / 'cache'])


def test_an_unwritable_cache(tmp_path):
  (tmp_path / 'cache').write_text('a file, not a folder')
  with pytest.raises(DataError, match='cannot be used.*system.cache_dir'):
    store.prepare(_data(_write_npz(tmp_path / 'a.npz')), str(tmp_path / 'cache'))
