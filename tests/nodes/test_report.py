"""The report holds what the run says and needs no network; the pictures have the size and content that their arguments ask for."""

import base64
import html.parser
import io
import os
import threading

import jax
import numpy
from PIL import Image
import pytest

from configs import base
from nodes import export
from nodes import pictures
from nodes import published
from nodes import report
from programs import local


@pytest.fixture(scope='module', name='make_small')
def _make_small(npz, cache, tmp_path_factory):
  """A function (changes) -> directory of a finished run of two updates on blobs."""
  from data import store
  from nodes import run_directory
  from programs import start

  def make(changes):
    config = base.get_config()
    config.update_from_flattened_dict({'run.architecture': 'fc1', 'run.data.name': npz, 'run.num_steps': 2, 'run.images_per_class': 2,
                                       'run.targets_per_step': 33, 'system.cache_dir': cache, 'system.evaluation.nn_steps': 0,
                                       'system.num_workers': 2, **changes})
    config = config.to_dict()
    prepared = store.prepare(config['run']['data'], cache)
    directory = run_directory.RunDirectory(str(tmp_path_factory.mktemp('run')))
    directory.open(config, prepared.key)
    directory.write_command(['python', 'launch.py', '--workdir=a b'])
    local.distil(start.Run(config, directory, cache), threading.Event())
    assert directory.read_status()['state'] == run_directory.FINISHED
    return directory
  return make


@pytest.fixture(scope='module', name='finished')
def _finished(make_small):
  return make_small({'run.data.zca': True, 'system.evaluation.baselines': True, 'system.snapshot_steps': (0, 1)})


class _Page(html.parser.HTMLParser):
  """Tags must close in order; keeps attributes that could load something, and all text."""

  def __init__(self, text):
    super().__init__()
    self.sources, self.text, self._open = [], '', []
    self.feed(text)
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.sources += [value for name, value in attrs if name in ('src', 'href', 'srcset')]
    if tag not in ('meta', 'link', 'img'):
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_the_report_is_complete_in_itself(finished):
  with open(finished.report, encoding='utf-8') as file:
    content = file.read()
  page = _Page(content)
  assert all(source.startswith('data:') for source in page.sources) and 'http' not in content and '<script' not in content
  names = ['images.png', 'images_whitened.png', 'labels.png', 'label_covariance.png', 'accuracy.png']
  embedded = [base64.b64decode(source.partition(',')[2]) for source in page.sources if source.startswith('data:image/png')]
  assert embedded == [open(os.path.join(finished.path, name), 'rb').read() for name in names]
  first, *_, last = finished.read_metrics()
  for expected in (f'{100 * first["krr_test_accuracy"]:.2f} %', f'{100 * last["krr_test_accuracy"]:.2f} %', 'real images, solved labels',
                   "launch.py '--workdir=a b'", 'run.targets_per_step', 'The papers publish no row', f'jax {jax.__version__}'):
    assert expected in page.text


def test_tensorboard_has_a_file_a_row(finished):
  assert [int(name.rpartition('.')[2]) for name in sorted(os.listdir(finished.tensorboard))] == [0, 1, 2]


def test_the_report_of_another_step_shows_its_images(finished):
  before = open(finished.picture, 'rb').read()
  report.write(finished, finished.read_metrics(), step=1)
  assert open(finished.picture, 'rb').read() != before
  with pytest.raises(report.DataError, match='the snapshot of step 7 cannot be read .* there are those of steps 0, 1, 2'):
    report.write(finished, finished.read_metrics(), step=7)
  report.write(finished, finished.read_metrics())
  assert open(finished.picture, 'rb').read() == before


def test_labels_that_stay_are_not_drawn(make_small):
  directory = make_small({'run.learn_labels': False})
  assert not os.path.exists(os.path.join(directory.path, 'labels.png'))
  assert 'Covariance' not in open(directory.report, encoding='utf-8').read()


@pytest.mark.parametrize('images_per_class, num_classes, grid', [(1, 3, (2, 3)), (2, 3, (3, 5)), (12, 2, (2, 21))])
def test_a_row_a_class_or_a_column_with_one_image(images_per_class, num_classes, grid):
  """A class's images are of one grey; the picture's rows (columns) show each class's grey, and ten images a class at most."""
  greys = numpy.linspace(0.0, 1.0, num_classes)
  images = numpy.repeat(greys, images_per_class)[:, None, None, None] * numpy.ones((1, 4, 4, 3))
  picture = numpy.asarray(Image.open(io.BytesIO(pictures.support_images(
      images, images[::-1], [str(c) for c in range(num_classes)], ('', ''), report.export.preprocess.Transform(numpy.zeros(3), numpy.ones(3))))).convert('L'))
  rows, columns = grid
  assert (picture.shape[0] < picture.shape[1]) == (rows < columns)
  for c, grey in enumerate(greys):
    wanted = numpy.abs(picture.astype(int) - round(255 * grey)) <= 1
    assert wanted.sum() > 2 * 40 * 40  # both halves hold it, and a cell is some 80 pixels wide


@pytest.mark.parametrize('library', ['NumPy', 'JAX'])
def test_the_documented_lines_load_the_set(finished, monkeypatch, library):
  monkeypatch.chdir(finished.path)
  found = {'numpy': numpy, 'jax': jax}
  exec(export.LOADING[library], found)  # pylint: disable=exec-used
  expected = export.load(finished.distilled)
  assert isinstance(found['images'], {'NumPy': numpy.ndarray, 'JAX': jax.Array}[library])
  numpy.testing.assert_array_equal(found['images'], expected.images)
  numpy.testing.assert_array_equal(found['labels'], expected.labels)


def test_published_rows():
  run = base.get_config().to_dict()['run']
  assert published.find(run) is None
  run['data'].update(name='cifar10', zca=True)
  assert published.find(run) == {'kind': 'published at convergence (NeurIPS 2021, Table 1)', 'krr': '63.4-64.7', 'network': '49.9',
                                 'nn_width': 1024, 'nn_steps': 5000}
  run['data'].update(zca=False)
  assert published.find(run) is None
  run.update(method='label_solve', architecture='fc1', images_per_class=50)
  assert published.find(run)['krr'] == '46.99'
  assert published.find({**run, 'initial_images': 'noise'}) is None


def test_the_readme_has_the_lines_that_load_a_set():
  root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  with open(os.path.join(root, 'README.md'), encoding='utf-8') as file:
    content = file.read()
  for line in export.LOADING.values():
    assert f'\n    {line}\n' in content
