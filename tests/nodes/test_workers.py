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
from distillation import optimizers, step
from distillation import state as states
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
def working(run, workers=2, threads=1, timing=coordinator_node.TIMING):
  """A coordinator with workers around it, and no program running."""
  stop = threading.Event()
  coordinator = coordinator_node.Coordinator(run.directory.path, run.cache, stop, timing=timing)
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
    stop.set()
    for thread in running:
      thread.join(STOP_TIMEOUT)
      assert not thread.is_alive()


def _stepped(run, coordinator, state):
  """Loss and gradient of a step by the coordinator's workers."""
  return step.loss_and_gradient(state, run.config.run, coordinator.prepared, coordinator.exchange)


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
    state = states.initial(run.config.run, coordinator.prepared, optax.adam(0.04))
    # Away from one-hot labels and from images that are exactly float32.
    noise = np.random.default_rng(0)
    state = state._replace(
      images=state.images + 0.1 * noise.normal(size=state.images.shape),
      labels=state.labels + 0.1 * noise.normal(size=state.labels.shape),
    )
    metrics, gradient = _stepped(run, coordinator, state)
  prepared = store.open_prepared(coordinator.prepared.key, run.cache, raw=more is AUGMENTED)
  loss, d_images, d_labels = _oracle(run.config.run, state, prepared)
  assert metrics.loss == pytest.approx(loss, rel=1e-8)
  # On the diagonal of K_ss Neural Tangents differentiates sqrt(1 - c^2) at c = 1 within rounding:
  # good to 2e-8.
  assert np.abs(gradient.images - d_images).max() <= 5e-8 * np.abs(d_images).max()
  assert np.abs(gradient.labels - d_labels).max() <= 1e-8 * np.abs(d_labels).max()


def _final(run):
  """The last checkpoint's state."""
  config = run.directory.read_saved().config
  optimizer = optimizers.make(config.run.optimizer, config.run.learning_rate)
  template = states.initial(
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
    monkeypatch.setattr(contract.Kernel, 'kept_bytes', kept)
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
      state = states.initial(run.config.run, coordinator.prepared, optax.adam(0.04))
      results.append(_stepped(run, coordinator, state))
  (whole, gradient), (metrics, split), (_, again) = results
  assert metrics.loss == pytest.approx(whole.loss, rel=tolerance)
  assert metrics.accuracy == whole.accuracy
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
    state = states.initial(run.config.run, coordinator.prepared, optax.adam(0.04))
    _stepped(run, coordinator, state)
  assert fetched == [('images', 0, 5), ('images', 5, 6)]


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
  update = states.Update.__call__

  def move(self, state, gradient):
    if state.step == 3:
      stop.set()
    return update(self, state, gradient)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(states.Update, '__call__', move)
    local.distil(run, stop)
  status = run.directory.read_status()
  assert (status['state'], status['step']) == ('stopped', 4)
  run.directory.close()
  for num_steps in (6, 8):
    run = make_run(
      tmp_path / 'cut', {**changes, 'run.num_steps': num_steps, 'system.num_workers': 3}
    )
    local.distil(run, threading.Event())
    assert run.directory.read_status()['state'] == 'finished'
    run.directory.close()
  assert_same_bits(_final(whole), _final(run))
  rows = {row['step']: row for row in run.directory.read_metrics()}
  expected = {row['step']: row for row in whole.directory.read_metrics()}
  assert sorted(rows) == [0, 1, 2, 4, 6, 8]
  for number, row in rows.items():
    for key in ('train_loss', 'train_accuracy', 'krr_test_accuracy', 'krr_test_mse'):
      assert row[key] == expected[number][key], (number, key)
