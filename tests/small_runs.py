"""Helpers for tests on small runs: their data, states, and a coordinator with workers around it."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from artifacts import checkpoints
from data import store
from distillation import optimizers
from distillation import state as states
from nodes import coordinator as coordinator_node
from nodes import kernel_worker
from nodes.client import Retrying
from programs import start

AUGMENTED = {
  'run.data.zca': True,
  'run.augmentation.fraction': 0.6,
  'run.augmentation.rotation': 15.0,
  'run.augmentation.width_shift': 0.1,
  'run.augmentation.horizontal_flip': True,
  'run.augmentation.channel_shift': 20.0,
}
HALVES = {'run.plan.support_per_task': 4}  # of 6 support images
_STOP_SECONDS = 60


def prepared_data(run: start.Run) -> store.Prepared:
  """The run's data, with raw images where it augments them."""
  assert run.directory is not None
  key = run.directory.read_saved().data_key
  prepared = store.open_prepared(key, run.cache, raw=run.config.run.augmentation.is_on)
  assert prepared is not None
  return prepared


def first_state(run: start.Run) -> states.SupportState:
  """The state at step 0."""
  settings = run.config.run
  optimizer = optimizers.make(settings.optimizer, settings.learning_rate)
  return states.initial(settings, prepared_data(run), optimizer)


def moved(state: states.SupportState) -> states.SupportState:
  """A state away from one-hot labels, and from images that are exactly float32."""
  noise = np.random.default_rng(0)
  return state._replace(
    images=state.images + 0.1 * noise.normal(size=state.images.shape),
    labels=state.labels + 0.1 * noise.normal(size=state.labels.shape),
  )


def last_state(run: start.Run) -> states.SupportState:
  """The newest checkpoint's state."""
  assert run.directory is not None
  restored = checkpoints.Checkpoints(run.directory.checkpoints).restore(first_state(run))
  assert restored is not None
  return restored[0]


def assert_same_bits(a: Any, b: Any) -> None:
  """Compares all arrays of two trees."""
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@contextlib.contextmanager
def working(
  run: start.Run,
  workers: int = 2,
  timing: coordinator_node.Timing = coordinator_node.TIMING,
  between: Callable[[Any], Any] = lambda coordinator: coordinator,
) -> Iterator[coordinator_node.Coordinator]:
  """A coordinator with workers of one thread around it, and no program running.

  Args:
    run: what is computed.
    workers: how many.
    timing: of the coordinator.
    between: makes of the coordinator what the workers call.
  """
  assert run.directory is not None
  stop = threading.Event()
  coordinator = coordinator_node.Coordinator(run.directory.path, run.cache, stop, timing=timing)
  client = Retrying(between(coordinator), 5, stop)
  nodes = [kernel_worker.KernelWorker(client, f'w{i}', 1, run.cache, stop) for i in range(workers)]
  threads = [threading.Thread(target=node.run, daemon=True) for node in nodes]
  for thread in threads:
    thread.start()
  try:
    yield coordinator
  finally:
    stop.set()
    for thread in threads:
      thread.join(_STOP_SECONDS)
      assert not thread.is_alive()
