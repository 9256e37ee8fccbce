"""A damaged data file is read as it was meant, or refused in one line; so are odd names and
places."""

import os

import datasets
import numpy as np
import pytest
from damage import damaged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import schema
from data import DataError, sources, store

QUIETLY = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def _outcome(load):
  """The result of `load()`, or None after a refusal, which must be one line."""
  try:
    return load()
  except DataError as error:
    assert '\n' not in str(error)
    return None


def _assert_sound(dataset):
  """Whatever was read has the promised form."""
  if dataset is not None:
    assert (
      dataset.train_images.ndim == dataset.test_images.ndim == 4
      and np.isfinite(dataset.train_images).all()
    )
    assert set(dataset.train_labels) == set(range(dataset.num_classes))


def test_npz(tmp_path):
  path = tmp_path / 'a.npz'
  images = np.arange(6 * 12, dtype=np.uint8).reshape(6, 4, 3)
  np.savez(path, x_train=images, y_train=np.arange(6) % 3, x_test=images, y_test=np.arange(6) % 3)
  whole = path.read_bytes()

  @settings(max_examples=400, deadline=None)
  @given(damaged(whole))
  def check(content):
    path.write_bytes(content)
    _assert_sound(_outcome(lambda: sources.find(str(path)).load()))

  check()


@settings(max_examples=200, deadline=None, suppress_health_check=QUIETLY)
@given(data=st.data())
def test_npz_of_odd_arrays(tmp_path, data):
  dtypes = st.sampled_from(['u1', 'i2', 'f4', 'f8', '?', 'c8', 'U3', 'M8[s]', 'S2'])
  shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)
  arrays = {
    key: np.zeros(data.draw(shapes), data.draw(dtypes))
    for key in sources.NPZ_KEYS
    if data.draw(st.integers(0, 9))
  }
  path = str(tmp_path / 'odd.npz')
  np.savez(path, **arrays)
  _assert_sound(_outcome(lambda: sources.find(path).load()))


def test_parquet(tmp_path, monkeypatch):
  datasets.disable_progress_bars()
  images = [Image.fromarray(np.full((3, 4), i, np.uint8)) for i in range(6)]
  features = datasets.Features({'image': datasets.Image(), 'label': datasets.Value('int64')})
  rows = datasets.Dataset.from_dict({'image': images, 'label': [0, 1, 2] * 2}, features=features)
  for split in ('train', 'test'):
    rows.to_parquet(str(tmp_path / f'{split}.parquet'))
  whole = (tmp_path / 'train.parquet').read_bytes()

  @settings(max_examples=60, deadline=None)
  @given(damaged(whole))
  def check(content):
    (tmp_path / 'train.parquet').write_bytes(content)
    _assert_sound(_outcome(lambda: sources.find('x', str(tmp_path)).load()))

  check()


@settings(max_examples=200, deadline=None)
@given(name=st.text(max_size=12), folder=st.text(max_size=12))
def test_any_name_is_found_or_refused(name, folder):
  _outcome(lambda: sources.find(name, folder))
  _outcome(lambda: sources.find(name + '.npz'))


def test_the_cache_is_whole_or_made_again(tmp_path, npz):
  of = schema.Data(name=npz, zca=True)
  prepared = store.prepare(of, str(tmp_path))
  folder = tmp_path / prepared.key
  expected = {
    name: np.array(getattr(prepared, name))
    for name in ('train_images', 'train_labels', 'test_images', 'test_labels')
  }
  whole = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
  del prepared

  @settings(max_examples=60, deadline=None)
  @given(st.data())
  def check(data):
    name = data.draw(st.sampled_from(sorted(whole)))
    (folder / name).write_bytes(data.draw(damaged(whole[name])))
    again = store.prepare(of, str(tmp_path))
    for array, value in expected.items():
      np.testing.assert_array_equal(getattr(again, array), value)

  check()


@pytest.mark.parametrize(
  'make',
  [lambda path: path.mkdir(), lambda path: path.symlink_to(path), lambda path: os.mkfifo(path)],
)
def test_what_is_no_file(tmp_path, make):
  make(tmp_path / 'a.npz')
  with pytest.raises(DataError, match='no file'):
    sources.find(str(tmp_path / 'a.npz'))
