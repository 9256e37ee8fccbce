"""Test-wide settings, and a small real run to test on."""

import os
import threading

from programs import placement

# Before NumPy and JAX start, as in the program's own processes.
os.environ.update(placement.launcher_environment())

import compiled
import jaxtyping

# Types, shapes and dtypes of distillation/, which must not be imported before, are checked at every
# call of its functions.
jaxtyping.install_import_hook('distillation', 'shape_checker.check')

import numpy as np
import pytest
from PIL import Image

from artifacts import run_directory
from configs import base, validation
from data import store
from programs import local, start


@pytest.fixture(scope='module')
def compiled_as_for_users():
  """See `compiled.as_for_users`."""
  with compiled.as_for_users():
    yield


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
  """A cache folder of this test session's own."""
  return str(tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='session')
def npz(tmp_path_factory):
  """Path of a data set of blobs whose place tells the class.

  3 classes, 8x9x2 pixels, 96 training and 25 test images.
  """
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:8, :9]

  def draw(n):
    labels = np.arange(n) % 3
    centres = np.array([[2, 2], [5, 6], [2, 6]])[labels] + rng.normal(size=(n, 2))
    blobs = np.exp(-((y - centres[:, :1, None]) ** 2 + (x - centres[:, 1:, None]) ** 2) / 6)
    noisy = blobs[..., None] * [1.0, 0.6] + 0.2 * rng.normal(size=(n, 8, 9, 2))
    return (255 * np.clip(noisy, 0, 1)).astype(np.uint8), labels

  path = str(tmp_path_factory.mktemp('data') / 'blobs.npz')
  (x_train, y_train), (x_test, y_test) = draw(96), draw(25)
  np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
  return path


@pytest.fixture
def released_mnist(tmp_path):
  """A set of 10 images in the format of the authors' released ones, and a stand-in for MNIST.

  (name of the set, folder of the data, cache that holds the set).
  """
  name = 'ls/mnist/ConvNet_ssize10_nozca.npz'
  folder, cache = tmp_path / 'mnist', str(tmp_path / 'cache')
  rng = np.random.default_rng(0)
  for split in ('train', 'test'):
    for i in range(20):
      path = folder / split / str(i % 10)
      path.mkdir(parents=True, exist_ok=True)
      Image.fromarray(rng.integers(0, 256, size=(28, 28)).astype(np.uint8)).save(path / f'{i}.png')
  path = os.path.join(cache, 'released', name)
  os.makedirs(os.path.dirname(path))
  np.savez(path, images=rng.normal(size=(10, 28, 28, 1)), labels=np.eye(10) - 0.1)
  return name, str(folder), cache


@pytest.fixture(scope='session')
def make_run(npz, cache):
  """A function (workdir, {field: value}) -> start.Run on the blobs.

  6 support images, 33 targets, and tiles that divide neither.
  """

  def make(workdir, changes=None):
    config = base.get_config()
    small = {
      'run.architecture': 'convnet2',
      'run.data.name': npz,
      'run.num_steps': 3,
      'run.images_per_class': 2,
      'run.targets_per_step': 33,
      'run.plan.support_tile': 4,
      'run.plan.target_tile': 5,
      'run.plan.target_tiles_per_task': 2,
      'system.num_workers': 2,
      'system.evaluation.nn_steps': 0,
      'system.final_evaluation_timeout': 120.0,
    }
    for path, value in {**small, **(changes or {})}.items():
      node = config
      *parents, leaf = path.split('.')
      for parent in parents:
        node = node[parent]
      with node.ignore_type():
        node[leaf] = value
    config = validation.validate(config.to_dict())
    prepared = store.prepare(config.run.data, cache, raw=config.run.augmentation.is_on)
    config = start.resolve(config, prepared, config.system.num_workers)
    directory = run_directory.RunDirectory(str(workdir))
    directory.open(config, prepared.key)
    return start.Run(config, directory, cache)

  return make


@pytest.fixture(scope='session')
def make_finished(make_run, cache, tmp_path_factory):
  """A function {field: value} -> the directory of a finished run of two updates on the blobs."""

  def make(changes):
    fc1 = {'run.architecture': 'fc1', 'run.num_steps': 2, 'system.cache_dir': cache}
    run = make_run(tmp_path_factory.mktemp('run'), {**fc1, **changes})
    run.directory.write_command(['python', 'launch.py', '--workdir=a b'])
    local.distil(run, threading.Event())
    status = run.directory.read_status()
    assert status is not None and status['state'] == run_directory.FINISHED
    return run.directory

  return make
