"""Damaged files of a run directory are read as they were, refused in one line, or passed over."""

import json
import os

import jax
import numpy as np
import optax
import pytest
from damage import damaged
from hypothesis import example, given, settings
from hypothesis import strategies as st

from artifacts import checkpoints, distilled_set, files, run_directory
from data import DataError
from distillation.state import SupportState

ROWS = [{'step': step, 'krr_test_accuracy': step / 7} for step in range(4)]
ROW = st.sampled_from(ROWS)


def _state(step):
  rng = np.random.default_rng(step)
  parameters = {'images': rng.normal(size=(2, 3, 3, 1)), 'labels': rng.normal(size=(2, 2))}
  return SupportState(
    step, **parameters, optimizer=jax.device_get(optax.adam(0.1).init(parameters))
  )


def _same(a, b):
  return all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_a_checkpoint_is_whole_or_passed_over(tmp_path):
  store = checkpoints.Checkpoints(str(tmp_path))
  for step in (1, 2):
    store.save(_state(step), {'step': step})
  newest = tmp_path / '00000002'
  whole = {path: path.read_bytes() for path in newest.rglob('*') if path.is_file()}

  @settings(max_examples=150, deadline=None)
  @given(
    st.sampled_from(sorted(filter(whole.get, whole))).flatmap(
      lambda path: st.tuples(st.just(path), damaged(whole[path]))
    )
  )
  def check(damage):
    path, content = damage
    path.write_bytes(content)
    restored = store.restore(_state(0))
    assert restored is not None
    state, meta = restored
    if state.step == 2:  # then the damage was none
      assert content == whole[path] or (
        path.name == 'digests.json' and json.loads(content) == json.loads(whole[path])
      )
    else:
      assert state.step == 1
    assert meta == {'step': state.step} and _same(state, _state(state.step))
    path.write_bytes(whole[path])

  check()


def test_when_no_checkpoint_is_good_it_says_so(tmp_path):
  store = checkpoints.Checkpoints(str(tmp_path))
  for step in (1, 2):
    store.save(_state(step), {})
    os.truncate(tmp_path / f'0000000{step}' / 'meta.json', 1)
  with pytest.raises(
    checkpoints.NoGoodCheckpoint,
    match=r'all checkpoints in .* are damaged \(steps 1, 2\): restore one of them, or',
  ):
    store.restore(_state(0))


@settings(max_examples=200, deadline=None)
@given(
  st.lists(ROW, max_size=4),
  st.integers(0, 40),
  ROW,
  st.one_of(st.just(b''), st.binary(max_size=20)),
)
def test_rows_are_whole_and_single_whatever_was_there(tmp_path_factory, rows, torn, new, damage):
  directory = run_directory.RunDirectory(str(tmp_path_factory.mktemp('run')))
  before = ''.join(map(files.json_line, rows)).encode() + damage + b'\n' * bool(damage)
  content = before + files.json_line(new).encode()[:torn]
  with open(directory.metrics, 'wb') as file:
    file.write(content)
  for _ in range(2):
    directory.append_metrics(new)
    with open(directory.metrics, encoding='utf-8') as file:
      found = [json.loads(line) for line in file]
    assert found == directory.read_metrics()
    assert [row['step'] for row in found] == list(
      dict.fromkeys([*(row['step'] for row in rows), new['step']])
    )
    assert all(row in ROWS for row in found)


@settings(max_examples=100, deadline=None)
@given(
  damage=st.one_of(
    st.binary(max_size=30),
    st.sampled_from([b'[]', b'{}', b'3', b'"x"', b'null', b'{"run": 1, "system": 2}']),
  )
)
@example(damage=b'{"run": 1, "system": 2}')
def test_other_files_are_read_or_refused_in_one_line(tmp_path_factory, damage):
  directory = run_directory.RunDirectory(str(tmp_path_factory.mktemp('run')))
  for path in (directory.config, directory.status, directory.generation):
    with open(path, 'wb') as file:
      file.write(damage)
  with pytest.raises(run_directory.RunDirectoryError, match='config.json cannot be read') as error:
    directory.read_config()
  assert '\n' not in str(error.value)
  assert directory.read_status() is None
  first = directory.next_generation()
  assert directory.next_generation() == first + 1


def test_a_distilled_set_is_read_or_refused(tmp_path):
  path = tmp_path / 'distilled.npz'
  images = np.arange(24, dtype=np.float32).reshape(2, 3, 4, 1)
  np.savez(
    path,
    images=images,
    labels=np.eye(2, dtype=np.float32),
    mean=np.zeros(1),
    std=np.ones(1),
    settings=json.dumps({'step': 3}),
  )
  whole = path.read_bytes()

  @settings(max_examples=200, deadline=None)
  @given(damaged(whole))
  def check(content):
    path.write_bytes(content)
    try:
      found = distilled_set.load(str(path))
    except DataError as error:
      assert 'is not a distilled set' in str(error)
    else:
      assert found.images.tobytes() == images.tobytes() and found.settings == {'step': 3}

  check()
