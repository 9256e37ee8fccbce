"""A checkpoint gives back every bit, or does not exist."""

import os
import resource

import jax
import numpy as np
import optax
import pytest

from artifacts import checkpoints
from distillation.state import SupportState


def _state(step, **kwargs):
  """A state after an update of Adam's, whose arguments are `kwargs`."""
  rng = np.random.default_rng(step)
  parameters = {'images': rng.normal(size=(4, 3, 3, 1)), 'labels': rng.normal(size=(4, 2))}
  optimizer = optax.adam(0.1, **kwargs)
  state = optimizer.update(parameters, optimizer.init(parameters), parameters)[1]
  return SupportState(step, parameters['images'], parameters['labels'], jax.device_get(state))


def _same(a, b):
  return all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def _restore(folder, template):
  restored = checkpoints.Checkpoints(str(folder)).restore(template)
  assert restored is not None
  return restored


@pytest.mark.parametrize('mu_dtype', ['float64', 'bfloat16'])  # NumPy does not know the latter
def test_every_bit_comes_back(tmp_path, mu_dtype):
  store, expected = checkpoints.Checkpoints(str(tmp_path)), _state(7, mu_dtype=mu_dtype)
  assert store.restore(_state(0)) is None
  store.save(expected, {'wall_seconds': 1.5})
  state, meta = _restore(tmp_path, _state(0, mu_dtype=mu_dtype))
  assert state.step == 7 and meta == {'wall_seconds': 1.5}
  assert _same(state, expected) and type(state.optimizer) is type(expected.optimizer)
  assert [np.asarray(leaf).dtype for leaf in jax.tree.leaves(state)] == [
    np.asarray(leaf).dtype for leaf in jax.tree.leaves(expected)
  ]


def test_the_newest_few_are_kept(tmp_path):
  store = checkpoints.Checkpoints(str(tmp_path))
  for step in (0, 2, 10, 9):
    store.save(_state(step), {})
  assert sorted(os.listdir(tmp_path)) == ['00000002', '00000009', '00000010']
  assert _restore(tmp_path, _state(0))[0].step == 10


@pytest.mark.parametrize('damage', ['cut', 'flip', 'delete', 'no digests'])
def test_a_damaged_one_is_passed_over_and_named(tmp_path, caplog, damage):
  store = checkpoints.Checkpoints(str(tmp_path))
  store.save(_state(1), {})
  store.save(_state(2), {})
  newest = str(tmp_path / '00000002')
  victim = os.path.join(newest, 'state.npz')
  assert os.path.getsize(victim) == max(os.path.getsize(path) for path in os.scandir(newest))
  if damage == 'no digests':
    os.remove(os.path.join(newest, 'digests.json'))
  elif damage == 'delete':
    os.remove(victim)
  else:
    content = bytearray(open(victim, 'rb').read())
    if damage == 'flip':
      content[len(content) // 2] ^= 1
    else:
      content = content[:-1]
    open(victim, 'wb').write(content)
  state, _ = _restore(tmp_path, _state(0))
  assert state.step == 1 and _same(state, _state(1))
  assert 'checkpoint of step 2 is damaged' in caplog.text
  store.save(_state(2), {})  # what is damaged is written again
  assert _restore(tmp_path, _state(0))[0].step == 2


def test_one_cut_short_in_the_writing_is_none(tmp_path):
  store = checkpoints.Checkpoints(str(tmp_path))
  store.save(_state(1), {})
  os.makedirs(tmp_path / '00000002.writing')
  assert _restore(tmp_path, _state(0))[0].step == 1


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # zipfile's
def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path):
  store = checkpoints.Checkpoints(str(tmp_path))
  store.save(_state(1), {})
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # bytes that a file may have
  try:
    with pytest.raises(OSError, match='File too large'):
      store.save(_state(2), {})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert os.listdir(tmp_path) == ['00000001']


@pytest.mark.parametrize('other', ['shape', 'dtype', 'less', 'more'])
def test_one_of_another_state_is_passed_over(tmp_path, caplog, other):
  store, state = checkpoints.Checkpoints(str(tmp_path)), _state(2)
  store.save(_state(1), {})
  changes = {
    'shape': {'images': state.images[:3]},
    'dtype': {'labels': state.labels.astype(np.float32)},
    'less': {'optimizer': jax.device_get(optax.sgd(0.1).init(state.images))},
    'more': {'optimizer': (*state.optimizer, np.zeros(2))},
  }
  store.save(state._replace(**changes[other]), {})
  assert _restore(tmp_path, _state(0))[0].step == 1
  assert 'checkpoint of step 2 is damaged' in caplog.text
