"""The distributed step against automatic differentiation of the whole loss in float64, and its bits
against itself."""

import contextlib
import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kernels.precision  # noqa: F401
from artifacts import checkpoints
from configs import schema
from data import augment, sampling, store
from distillation import optimizers
from kernels import architectures, contract, reference, registry
from nodes import coordinator as coordinator_node
from nodes import kernel_worker
from nodes.client import Retrying
from programs import local

STOP_TIMEOUT = 60
AUGMENTED = {
  'run.data.zca': True,
  'run.augmentation.fraction': 0.6,
  'run.augmentation.rotation': 15.0,
  'run.augmentation.width_shift': 0.1,
  'run.augmentation.horizontal_flip': True,
  'run.augmentation.channel_shift': 20.0,
}


HALVES = {'run.plan.support_per_task': 4}  # of 6 support images
GAP = {
  'stages': [{'convs': 1, 'pool': True}, {'convs': 1, 'pool': False}],
  'readout': 'global_average_pool',
}


@contextlib.contextmanager
def working(run, workers=2, threads=1):
  """A coordinator with workers around it, and no program running."""
  stop = threading.Event()
  coordinator = coordinator_node.Coordinator(run.directory.path, run.cache, stop)
  nodes = [
    kernel_worker.KernelWorker(Retrying(coordinator, 5, stop), f'w{i}', threads, run.cache, stop)
    for i in range(workers)
  ]
  running = [threading.Thread(target=node.run, daemon=True) for node in nodes]
  for thread in running:
    thread.start()
  try:
    yield coordinator
  finally:
    coordinator._over = True
    for thread in running:
      thread.join(STOP_TIMEOUT)
      assert not thread.is_alive()


_KNOWN = {}  # what the oracle said, by what is asked: neither implementation nor plan matters


def _oracle(run, state, prepared):
  """Loss and gradients of the whole step by jax.value_and_grad over Neural Tangents, which takes
  long to compile."""
  asked = repr(dataclasses.replace(run, implementation='', plan=schema.Plan()))
  if asked not in _KNOWN:
    _KNOWN[asked] = state, _computed(run, state, prepared)
  known, found = _KNOWN[asked]
  assert (
    known.images.tobytes() == state.images.tobytes()
    and known.labels.tobytes() == state.labels.tobytes()
  )
  return found


def _computed(run, state, prepared):
  kernel_fn = reference.network(architectures.get(run.architecture))[2]
  batch = sampling.class_balanced(
    run.seed, sampling.TARGETS, state.step, prepared.train_labels, run.targets_per_step
  )
  x_t = jnp.asarray(
    augment.target_images(run, prepared, state.step, batch, 0, len(batch)), jnp.float64
  )
  y_t = sampling.centred_one_hot(prepared.train_labels[batch], prepared.num_classes)

  def loss(images, labels):
    k_ss, k_ts = (kernel_fn(x, images, get=run.kernel) for x in (images, x_t))
    k = k_ss + run.ridge * jnp.trace(k_ss) / len(images) * jnp.eye(len(images))
    return 0.5 * jnp.mean((k_ts @ jnp.linalg.solve(k, labels) - y_t) ** 2)

  value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state.images, state.labels)
  return float(value), *map(np.asarray, gradients)


EVERYWHERE = [
  ('convnet2', 4, 5, 2, {}),
  ('fc1', 2, 7, 1, {}),
  ('fc1', 2, 7, 2, AUGMENTED),
  ('myrtle5', 6, 33, 1, {}),
]
PLANS = [
  ('convnet2', 4, 5, 2, HALVES),
  ('convnet2', 4, 5, 2, {**HALVES, 'run.kernel': 'nngp'}),
  ('myrtle5', 4, 10, 1, HALVES),
  (GAP, 4, 7, 2, {}),
  (GAP, 5, 7, 1, HALVES),
]


@pytest.mark.parametrize(
  'implementation, architecture, support_tile, target_tile, per_task, more',
  [
    *((name, *case) for name in registry.available() for case in EVERYWHERE),
    *(('auto', *case) for case in PLANS),
  ],
)
def test_gradient_is_that_of_the_whole_loss(
  make_run, tmp_path, implementation, architecture, support_tile, target_tile, per_task, more
):
  run = make_run(
    tmp_path,
    {
      'run.architecture': architecture,
      'run.kernel_dtype': 'float64',
      'run.implementation': implementation,
      'run.plan.support_tile': support_tile,
      'run.plan.target_tile': target_tile,
      'run.plan.target_tiles_per_task': per_task,
      **more,
    },
  )
  with working(run) as coordinator:
    state = coordinator_node.initial_state(run.config.run, coordinator._prepared, optax.adam(0.04))
    # Away from one-hot labels and from images that are exactly float32.
    noise = np.random.default_rng(0)
    state = state._replace(
      images=state.images + 0.1 * noise.normal(size=state.images.shape),
      labels=state.labels + 0.1 * noise.normal(size=state.labels.shape),
    )
    metrics, gradient = coordinator._loss_and_gradient(state)
  prepared = store.open_prepared(coordinator._prepared.key, run.cache, raw=more is AUGMENTED)
  loss, d_images, d_labels = _oracle(run.config.run, state, prepared)
  assert metrics.train_loss == pytest.approx(loss, rel=1e-8)
  # On the diagonal of K_ss Neural Tangents differentiates sqrt(1 - c^2) at c = 1 within rounding:
  # good to 2e-8.
  assert np.abs(gradient.images - d_images).max() <= 5e-8 * np.abs(d_images).max()
  assert np.abs(gradient.labels - d_labels).max() <= 1e-8 * np.abs(d_labels).max()


def test_adam_moves_what_the_configuration_says(make_run, tmp_path):
  """The first update of Adam is the learning rate times the gradient's sign, for images and, if
  learned, for labels."""
  for learn in (True, False):
    run = make_run(
      tmp_path / str(learn),
      {'run.architecture': 'fc1', 'run.learn_labels': learn, 'run.learning_rate': 0.03},
    )
    coordinator = coordinator_node.Coordinator(run.directory.path, run.cache, threading.Event())
    state = coordinator_node.initial_state(
      run.config.run, coordinator._prepared, coordinator._optimizer
    )
    gradient = coordinator_node.Gradient(
      np.where(np.arange(state.images.size).reshape(state.images.shape) % 2, 1.0, -2.0),
      np.ones_like(state.labels),
    )
    moved = coordinator._move(state, gradient)
    assert moved.step == 1
    np.testing.assert_allclose(
      moved.images, state.images - 0.03 * np.sign(gradient.images), rtol=0, atol=1e-9
    )
    np.testing.assert_allclose(
      moved.labels, state.labels - (0.03 if learn else 0), rtol=0, atol=1e-9
    )


def _final(run):
  """The last checkpoint's state."""
  config = run.directory.read_saved().config
  optimizer = optimizers.make(config.run.optimizer, config.run.learning_rate)
  template = coordinator_node.initial_state(
    config.run, store.open_prepared(run.directory.read_saved().data_key, run.cache), optimizer
  )
  state, _ = checkpoints.Checkpoints(run.directory.checkpoints).restore(template)
  return state


def assert_same_bits(a, b):
  assert a.step == b.step
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(
  'architecture, part, dtype, tolerance, more',
  [
    ('convnet2', 1, 'float64', 1e-12, {}),
    ('convnet2', 4, 'float32', 1e-5, {}),
    ('fc1', 5, 'float64', 1e-12, AUGMENTED),
  ],
)
def test_target_tasks_of_parts_of_the_support_add_up_to_those_in_one_pass(
  make_run, tmp_path, monkeypatch, architecture, part, dtype, tolerance, more
):
  """Ragged parts; workers that keep nothing between the halves give the same bits as those that
  do."""
  results = []
  for per_task, kept in ((0, 0), (part, contract.KEPT_BYTES), (part, 0)):
    monkeypatch.setattr(contract, 'KEPT_BYTES', kept)
    run = make_run(
      tmp_path / f'{per_task} {kept}',
      {
        'run.architecture': architecture,
        'run.kernel_dtype': dtype,
        'run.plan.support_per_task': per_task,
        **more,
      },
    )
    with working(run) as coordinator:
      state = coordinator_node.initial_state(
        run.config.run, coordinator._prepared, optax.adam(0.04)
      )
      results.append(coordinator._loss_and_gradient(state))
  (whole, gradient), (metrics, split), (_, again) = results
  assert metrics.train_loss == pytest.approx(whole.train_loss, rel=tolerance)
  assert metrics.train_accuracy == whole.train_accuracy
  for a, b, c in zip(gradient, split, again):
    assert np.abs(a - b).max() <= tolerance * np.abs(a).max()
    assert b.tobytes() == c.tobytes()


def test_a_task_brings_the_images_it_is_about(make_run, tmp_path, monkeypatch):
  """Where tasks are about parts of the support, nothing is fetched but the columns of K_ss, tile by
  tile, once."""
  fetched, fetch = [], coordinator_node.Coordinator.fetch

  def note(self, generation, step, name, start, stop):
    fetched.append((name, start, stop))
    return fetch(self, generation, step, name, start, stop)

  monkeypatch.setattr(coordinator_node.Coordinator, 'fetch', note)
  run = make_run(tmp_path, {'run.architecture': 'fc1', 'run.plan.support_per_task': 4})
  with working(run, workers=1) as coordinator:
    state = coordinator_node.initial_state(run.config.run, coordinator._prepared, optax.adam(0.04))
    coordinator._loss_and_gradient(state)
  assert fetched == [('images', 0, 5), ('images', 5, 6)]


@pytest.mark.parametrize('per_task', [0, 4])
def test_a_worker_alone_makes_the_first_targets_of_a_step_before_it(
  make_run, tmp_path, monkeypatch, per_task
):
  """From the third step on, and none twice; a worker that begins elsewhere makes its own."""
  events, make, begin = (
    [],
    kernel_worker.KernelWorker._make_targets,
    coordinator_node.Coordinator._begin,
  )

  def note(self, *tile):
    events.append(tile)
    return make(self, *tile)

  def note_step(self, state):
    events.append(state.step)
    begin(self, state)

  monkeypatch.setattr(kernel_worker.KernelWorker, '_make_targets', note)
  monkeypatch.setattr(coordinator_node.Coordinator, '_begin', note_step)
  run = make_run(
    tmp_path,
    {
      'run.architecture': 'fc1',
      'run.targets_per_step': 12,
      'run.plan.target_tile': 5,
      'run.plan.target_tiles_per_task': 1,
      'run.plan.support_per_task': per_task,
    },
  )
  with working(run, workers=1) as coordinator:
    state = coordinator_node.initial_state(run.config.run, coordinator._prepared, optax.adam(0.04))
    for step in range(4):
      coordinator._loss_and_gradient(state._replace(step=step))
  tiles = [event for event in events if isinstance(event, tuple)]
  if not per_task:  # parts of the support have the same targets
    assert sorted(tiles) == sorted(
      {(step, *tile) for step in range(4) for tile in ((0, 5), (5, 10), (10, 12))} | {(4, 0, 5)}
    )
  for step in range(4):
    assert (events.index((step, 0, 5)) < events.index(step)) == (step >= 2)
  worker = kernel_worker.KernelWorker(None, 'w', 1, run.cache, threading.Event())
  monkeypatch.setattr(worker, '_make_targets', lambda *tile: tile)
  for tile in ((0, 0, 5), (1, 0, 5), (2, 5, 10), (3, 5, 10), (4, 5, 10), (5, 0, 5)):
    assert worker._first_targets(*tile) == tile


@pytest.mark.parametrize(
  'architecture, more',
  [
    ('convnet2', {}),
    ('fc1', {}),
    ('fc1', AUGMENTED),
    ('convnet2', {'run.plan.support_per_task': 4}),
  ],
  ids=['convnet2', 'fc1', 'augmented', 'parts'],
)
def test_same_bits_whoever_computes(make_run, tmp_path, architecture, more):
  """Five steps of at least 12 ragged tasks a phase: one worker with two threads, two with one, five
  with one."""
  changes = {
    'run.architecture': architecture,
    'run.num_steps': 5,
    'run.images_per_class': 5,
    'run.targets_per_step': 93,
    'run.plan.support_tile': 4,
    'run.plan.target_tile': 5,
    'run.plan.target_tiles_per_task': 1,
    'system.snapshot_steps': (5,),
    **more,
  }
  states = []
  for workers, threads in ((1, 2), (2, 1), (5, 1)):
    run = make_run(
      tmp_path / f'{workers}x{threads}',
      {**changes, 'system.num_workers': workers, 'system.worker_threads': threads},
    )
    local.distil(run, threading.Event())
    assert run.directory.read_status()['state'] == 'finished'
    states.append(_final(run))
  assert states[0].step == 5
  for other in states[1:]:
    assert_same_bits(states[0], other)


def test_same_bits_after_stop_and_resume(make_run, tmp_path):
  """Stopped in the middle of a step and resumed with another number of workers, then told to go on
  further."""
  changes = {'run.architecture': 'fc1', 'run.num_steps': 8}
  whole = make_run(tmp_path / 'whole', changes)
  local.distil(whole, threading.Event())

  stop = threading.Event()
  run = make_run(tmp_path / 'cut', {**changes, 'run.num_steps': 6, 'system.num_workers': 1})
  original = coordinator_node.Coordinator._move

  def move(self, state, gradient):
    if state.step == 3:
      stop.set()
    return original(self, state, gradient)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(coordinator_node.Coordinator, '_move', move)
    local.distil(run, stop)
  status = run.directory.read_status()
  assert (status['state'], status['step']) == ('stopped', 4)
  run.directory._lock.close()
  for num_steps in (6, 8):
    run = make_run(
      tmp_path / 'cut', {**changes, 'run.num_steps': num_steps, 'system.num_workers': 3}
    )
    local.distil(run, threading.Event())
    assert run.directory.read_status()['state'] == 'finished'
    run.directory._lock.close()
  assert_same_bits(_final(whole), _final(run))
  rows = {row['step']: row for row in run.directory.read_metrics()}
  expected = {row['step']: row for row in whole.directory.read_metrics()}
  assert sorted(rows) == [0, 1, 2, 4, 6, 8]
  for step, row in rows.items():
    for key in ('train_loss', 'train_accuracy', 'krr_test_accuracy', 'krr_test_mse'):
      assert row[key] == expected[step][key], (step, key)
