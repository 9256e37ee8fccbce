"""Files of a run directory that were cut, altered or left half-written: what was meant, or nothing,
or one line; never something else."""

import json
import os
import threading

import jax
import numpy as np
import optax
import pytest
from damage import damaged
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts import checkpoints, distilled_set, run_directory
from data import DataError

ROWS = [{'step': step, 'krr_test_accuracy': step / 7} for step in range(4)]
ROW = st.sampled_from(ROWS)


def _state(step):
  rng = np.random.default_rng(step)
  parameters = {'images': rng.normal(size=(2, 3, 3, 1)), 'labels': rng.normal(size=(2, 2))}
  return checkpoints.SupportState(
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
    state, meta = store.restore(_state(0))
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


def test_what_orbax_cannot_write_is_an_os_error_and_leaves_nothing(tmp_path, monkeypatch):
  store = checkpoints.Checkpoints(str(tmp_path))
  store.save(_state(1), {})

  def full(path, **_):
    os.makedirs(path)
    raise ValueError('RESOURCE_EXHAUSTED: Error writing "images/0":\n No space left on device')

  monkeypatch.setattr(store._orbax, 'save', full)
  with pytest.raises(OSError, match='RESOURCE_EXHAUSTED: .* No space left on device'):
    store.save(_state(2), {})
  assert os.listdir(tmp_path) == ['00000001']


@settings(max_examples=200, deadline=None)
@given(
  st.lists(ROW, max_size=4),
  st.integers(0, 40),
  ROW,
  st.one_of(st.just(b''), st.binary(max_size=20)),
)
def test_rows_are_whole_and_single_whatever_was_there(tmp_path_factory, rows, torn, new, damage):
  directory = run_directory.RunDirectory(str(tmp_path_factory.mktemp('run')))
  before = ''.join(map(run_directory.json_line, rows)).encode() + damage + b'\n' * bool(damage)
  content = before + run_directory.json_line(new).encode()[:torn]
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
def test_other_files_are_read_or_refused_in_one_line(tmp_path_factory, damage):
  directory = run_directory.RunDirectory(str(tmp_path_factory.mktemp('run')))
  for path in (directory.config, directory.status, directory._generation):
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


def test_what_a_killed_writer_left_is_swept(tmp_path):
  directory = run_directory.RunDirectory(str(tmp_path))
  os.makedirs(directory.snapshots)
  for folder in (directory.path, directory.snapshots):
    open(os.path.join(folder, '.writing-x'), 'w', encoding='utf-8').close()
  with directory.claim():
    assert os.listdir(directory.snapshots) == []


def test_two_coordinators_do_not_write_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(run_directory, '_HANDOVER', 0.3)
  os.makedirs(tmp_path / 'snapshots')
  with run_directory.RunDirectory(str(tmp_path)).claim():
    with pytest.raises(
      run_directory.RunDirectoryError, match='has another coordinator that is still going'
    ):
      run_directory.RunDirectory(str(tmp_path)).claim()
  run_directory.RunDirectory(str(tmp_path)).claim().close()


@pytest.mark.parametrize(
  'errors, patience, stopped, tries',
  [(0, 60.0, False, 1), (5, 60.0, False, 6), (9, 0.0, False, 1), (9, 60.0, True, 1)],
)
def test_a_write_that_fails_is_tried_again_for_a_while(
  monkeypatch, caplog, errors, patience, stopped, tries
):
  monkeypatch.setattr(run_directory, 'DISK_PATIENCE', patience)
  monkeypatch.setattr(run_directory, 'DISK_PAUSE', 0.001)
  stop, left, written = threading.Event(), [OSError(28, 'No space left on device')] * errors, []

  def write():
    written.append(len(left))
    if left:
      raise left.pop()

  if stopped:
    stop.set()
  if tries > errors:
    run_directory.persist('the row', write, stop)
    told = 'the row cannot be written (No space left on device); trying again for'
    assert caplog.text.count(told) == errors
  else:
    message = r'^the row cannot be written \(No space left on device\)\.$'
    with pytest.raises(run_directory.RunDirectoryError, match=message):
      run_directory.persist('the row', write, stop)
  assert len(written) == tries


@pytest.mark.parametrize(
  'content, rows',
  [
    ('[{"kind": "real", "krr_test_mse": 0.5}]', [{'kind': 'real', 'krr_test_mse': 0.5}]),
    ('[]', []),
    ('{"kind": ', None),
    ('{"kind": "real"}', None),
    ('[{"krr_test_mse": 0.5}]', None),
    ('[3]', None),
    ('null', None),
    ('', None),
  ],
)
def test_baselines_are_whole_or_none(tmp_path, content, rows):
  directory = run_directory.RunDirectory(str(tmp_path))
  assert directory.read_baselines() is None
  (tmp_path / 'baselines.json').write_text(content)
  assert directory.read_baselines() == rows


@pytest.mark.parametrize('fails', ['at once', 'halfway'])
def test_writing_atomically(tmp_path, fails):
  path = str(tmp_path / 'file')
  run_directory.write_atomically(path, 'old')
  (tmp_path / 'plain').touch()
  # Who may read other new files may read these.
  assert os.stat(path).st_mode == os.stat(tmp_path / 'plain').st_mode
  os.remove(tmp_path / 'plain')

  def write(file):
    if fails == 'halfway':
      file.write(b'ne')
    raise OSError(28, 'No space left on device')

  with pytest.raises(OSError, match='No space left'):
    run_directory.write_atomically(path, write)
  assert os.listdir(tmp_path) == ['file'] and open(path, encoding='utf-8').read() == 'old'
