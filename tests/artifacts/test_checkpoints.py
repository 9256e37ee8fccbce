"""A checkpoint gives back every bit, or does not exist."""

import os

import jax
import numpy as np
import optax
import pytest

from artifacts import checkpoints


def _state(step):
  rng = np.random.default_rng(step)
  parameters = {'images': rng.normal(size=(4, 3, 3, 1)), 'labels': rng.normal(size=(4, 2))}
  optimizer = optax.adam(0.1)
  state = optimizer.update(parameters, optimizer.init(parameters), parameters)[1]
  return checkpoints.SupportState(
    step, parameters['images'], parameters['labels'], jax.device_get(state)
  )


def _same(a, b):
  return all(
    np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def _files(folder):
  return sorted(os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)


def test_every_bit_comes_back(tmp_path):
  store = checkpoints.Checkpoints(str(tmp_path))
  assert store.restore(_state(0)) is None
  store.save(_state(7), {'wall_seconds': 1.5})
  state, meta = checkpoints.Checkpoints(str(tmp_path)).restore(_state(0))
  assert state.step == 7 and meta == {'wall_seconds': 1.5}
  assert _same(state, _state(7)) and type(state.optimizer) is type(_state(7).optimizer)


def test_the_newest_few_are_kept(tmp_path):
  store = checkpoints.Checkpoints(str(tmp_path))
  for step in (0, 2, 10, 9):
    store.save(_state(step), {})
  assert sorted(os.listdir(tmp_path)) == ['00000002', '00000009', '00000010']
  assert store.restore(_state(0))[0].step == 10


@pytest.mark.parametrize('damage', ['cut', 'flip', 'delete', 'no digests'])
def test_a_damaged_one_is_passed_over_and_named(tmp_path, caplog, damage):
  store = checkpoints.Checkpoints(str(tmp_path))
  store.save(_state(1), {})
  store.save(_state(2), {})
  newest = str(tmp_path / '00000002')
  victim = max(_files(os.path.join(newest, 'state')), key=os.path.getsize)
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
  state, _ = store.restore(_state(0))
  assert state.step == 1 and _same(state, _state(1))
  assert 'checkpoint of step 2 is damaged' in caplog.text
  store.save(_state(2), {})  # what is damaged is written again
  assert store.restore(_state(0))[0].step == 2


def test_one_cut_short_in_the_writing_is_none(tmp_path):
  store = checkpoints.Checkpoints(str(tmp_path))
  store.save(_state(1), {})
  os.makedirs(tmp_path / '00000002.writing' / 'state')
  assert store.restore(_state(0))[0].step == 1
