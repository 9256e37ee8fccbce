"""The report is complete and needs no network; its pictures show what they should."""

import base64
import dataclasses
import html.parser
import io
import json
import os
import shutil
import sys
from typing import Any

import forked
import jax
import matplotlib.figure
import matplotlib.text
import numpy
import pytest
from PIL import Image

from artifacts import distilled_set, paper_results, pictures, report, run_directory, snapshots
from configs import schema
from data import DataError, preprocess
from distillation import evaluation


@pytest.fixture(scope='module', name='finished')
def _finished(make_finished):
  return make_finished(
    {'run.data.zca': True, 'system.evaluation.baselines': True, 'system.snapshot_steps': (0, 1)}
  )


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
  assert (
    all(source.startswith('data:') for source in page.sources)
    and 'http' not in content
    and '<script' not in content
  )
  names = [
    'images.png',
    'images_whitened.png',
    'labels.png',
    'label_covariance.png',
    'accuracy.png',
  ]
  embedded = [
    base64.b64decode(source.partition(',')[2])
    for source in page.sources
    if source.startswith('data:image/png')
  ]
  assert embedded == [open(os.path.join(finished.path, name), 'rb').read() for name in names]
  first, *_, last = finished.read_metrics()
  for expected in (
    f'{100 * first["krr_test_accuracy"]:.2f} %',
    f'{100 * last["krr_test_accuracy"]:.2f} %',
    'real images, solved labels',
    "launch.py '--workdir=a b'",
    'run.targets_per_step',
    'The papers publish no row',
    f'jax {jax.__version__}',
  ):
    assert expected in page.text


def test_tensorboard_has_a_file_a_row(finished):
  assert [int(name.rpartition('.')[2]) for name in sorted(os.listdir(finished.tensorboard))] == [
    0,
    1,
    2,
  ]


def test_the_report_of_another_step_shows_its_images(finished):
  before = open(finished.picture, 'rb').read()
  report.write(finished, finished.read_metrics(), step=1)
  assert open(finished.picture, 'rb').read() != before
  with pytest.raises(
    DataError, match='the snapshot of step 7 cannot be read .* there are those of steps 0, 1, 2'
  ):
    report.write(finished, finished.read_metrics(), step=7)
  report.write(finished, finished.read_metrics())
  assert open(finished.picture, 'rb').read() == before


def test_labels_that_stay_are_not_drawn(make_finished):
  directory = make_finished({'run.learn_labels': False})
  assert not os.path.exists(os.path.join(directory.path, 'labels.png'))
  assert 'Covariance' not in open(directory.report, encoding='utf-8').read()


NAMES = ['cat', 'dog', '<b>cow</b> & calf, much too long']


@pytest.fixture(name='named')
def _named(finished, tmp_path):
  """A copy of a finished run, whose classes have names."""
  directory = run_directory.RunDirectory(str(shutil.copytree(finished.path, tmp_path / 'run')))
  with numpy.load(directory.distilled) as file:
    arrays = {name: file[name] for name in file}
  settings = json.loads(str(arrays['settings']))
  settings['data']['class_names'] = NAMES
  numpy.savez(directory.distilled, **{**arrays, 'settings': json.dumps(settings)})
  return directory


@pytest.fixture(name='drawn')
def _drawn(monkeypatch):
  """All that is written in the pictures that are drawn."""
  found, save = [], matplotlib.figure.Figure.savefig

  def savefig(figure, *args, **kwargs):
    save(figure, *args, **kwargs)
    found.extend(text.get_text() for text in figure.findobj(matplotlib.text.Text))

  monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', savefig)
  return found


def test_classes_have_their_names_in_the_report_and_in_its_pictures(named, drawn):
  report.write(named, named.read_metrics())
  page = _Page(_content(named))
  assert '0 cat, 1 dog, 2 <b>cow</b> & calf, much too long' in page.text
  assert {'class cat', 'class dog', 'class <b>cow</b…', '<b>cow</b> & ca…'} <= set(drawn)
  assert drawn.count('cat') > 3


def _content(directory):
  with open(directory.report, encoding='utf-8') as file:
    return file.read()


@pytest.mark.parametrize(
  'names, expected',
  [
    (['ant', 'bee', 'US$ $1'], ['ant', 'bee', r'US\$ \$1']),
    (['a very long name', 'a very long one', 'x'], ['0 a very lo…', '1 a very lo…', '2 x']),
    (['two\nlines', 'b', 'c'], ['two lines', 'b', 'c']),
    (['猫', '犬', '牛'], ['0', '1', '2']),  # which Matplotlib's own font has not
    ([f'class {c}' for c in range(100)], [str(c) for c in range(10)]),
  ],
)
def test_names_in_pictures_are_readable(drawn, names, expected):
  labels = numpy.eye(len(names))
  pictures.label_bars(labels, labels, names, ('', ''))
  assert {f'class {name}' for name in expected} <= set(drawn)
  for draw in (pictures.label_heat_map, lambda *args: pictures.label_covariance(labels, *args)):
    drawn.clear()
    assert Image.open(io.BytesIO(draw(labels, names))).size > (300, 300)
    assert len(names) == 100 or set(expected) <= set(drawn)
  drawn.clear()
  images = numpy.zeros((len(names), 4, 4, 3))
  transform = preprocess.Transform(numpy.zeros(3), numpy.ones(3))
  pictures.support_images(images, images, names, ('', ''), transform)
  assert ('0–9' if len(names) == 100 else expected[1]) in drawn


def test_a_finite_network_stands_beside_its_width_and_updates(named, drawn, monkeypatch):
  row = {'kind': 'published', 'krr': '75.5', 'network': '62.7', 'nn_width': 1024, 'nn_steps': 5000}
  monkeypatch.setattr(paper_results, 'find', lambda run: row)
  ours = {'nn_test_accuracy': 0.5, 'nn_test_accuracy_std': 0.01}
  first, *others = named.read_metrics()
  first = {**first, **ours, 'nn_width': 128, 'nn_steps': 1000}
  report.write(named, [first, *others[:-1], {**others[-1], **ours}])
  text = _Page(_content(named)).text
  assert '50.00 ± 1.00 % (width 128, 1000 updates)' in text
  assert '62.7 % (width 1024, 5000 updates)' in text
  assert '50.00 ± 1.00 % (width not recorded)' in text  # a row of an earlier version
  assert 'finite network, width 128, 1000 updates; width not recorded' in drawn


@pytest.mark.parametrize(
  'rows',
  [
    [{'step': 0}, {'step': 2}],
    [{'step': 2}],
    [{'step': 1, 'krr_test_accuracy': 0.25, 'wall_seconds': None}],
    [
      {'step': 0, 'krr_test_accuracy': 'high', 'nn_test_accuracy': None},
      {'step': 2, 'nn_test_accuracy': 0.5},
    ],
  ],
)
@pytest.mark.parametrize('baselines', ['[', '{"kind": "x"}', '[{"kind": "x"}]'])
def test_rows_that_lack_something_are_reported_without_it(named, rows, baselines):
  with open(named.baselines, 'w', encoding='utf-8') as file:
    file.write(baselines)
  os.remove(named.report)
  report.write(named, rows)
  text = _Page(_content(named)).text
  names = {0: 'the images it started from (step 0)', 1: 'step 1', 2: 'distilled (step 2)'}
  for row in rows:
    assert text.count(names[row['step']]) == 1
    accuracy = row.get('krr_test_accuracy')
    assert ('25.00 %' if accuracy == 0.25 else 'not known') in text
    assert evaluation.in_words(row).startswith(f'step {row["step"]:6d}')


@pytest.mark.parametrize('damage', ['garbage', 'other shapes'])
def test_a_first_snapshot_that_is_damaged_is_named(named, drawn, damage):
  path = named.snapshot(0)
  if damage == 'garbage':
    os.truncate(path, 100)
  else:
    snapshots.write(named, 0, numpy.zeros((6, 8, 9, 1)), numpy.zeros((6, 3)), {})
  report.write(named, named.read_metrics())
  assert 'The snapshot of step 0 cannot be read' in _content(named)
  assert 'there are those of steps 1, 2.' in _content(named)
  assert 'step 1' in drawn and 'step 0' not in drawn
  for step in (1, 2):
    os.remove(named.snapshot(step))
  report.write(named, named.read_metrics())
  assert 'there is no other.' in _content(named) and 'step 1' not in drawn[len(drawn) // 2 :]


@pytest.mark.parametrize('blocked', ['picture', 'report', 'tensorboard'])
def test_a_run_directory_that_cannot_be_written(named, blocked):
  """A folder where a file should be, or a file where a folder should be."""
  path = getattr(named, blocked)
  shutil.rmtree(path) if blocked == 'tensorboard' else os.remove(path)
  open(path, 'w', encoding='utf-8').close() if blocked == 'tensorboard' else os.mkdir(path)
  done = _command(named)
  assert done.returncode == 2 and done.stderr.count('\n') == 1 and not done.stdout
  assert done.stderr.startswith(f'error: the report of {named.path} cannot be written: ')
  assert path in done.stderr


def _command(directory):
  """`python -m programs.report` on a run's directory."""
  return forked.run([sys.executable, '-m', 'programs.report', f'--workdir={directory.path}'])


def test_the_report_command_makes_what_is_missing(named):
  os.remove(named.report)
  events = sorted(os.listdir(named.tensorboard))
  os.remove(os.path.join(named.tensorboard, events[0]))
  done = _command(named)
  assert (done.returncode, done.stdout) == (0, f'{named.report}\n'), done.stderr
  assert os.path.exists(named.report) and sorted(os.listdir(named.tensorboard)) == events


@pytest.mark.parametrize(
  'images_per_class, num_classes, grid', [(1, 3, (2, 3)), (2, 3, (3, 5)), (12, 2, (2, 21))]
)
def test_a_row_a_class_or_a_column_with_one_image(images_per_class, num_classes, grid):
  """Each class's images have a grey of their own, which the picture's rows or columns show.

  It shows ten images a class at most.
  """
  greys = numpy.linspace(0.0, 1.0, num_classes)
  images = numpy.repeat(greys, images_per_class)[:, None, None, None] * numpy.ones((1, 4, 4, 3))
  names = [str(c) for c in range(num_classes)]
  transform = preprocess.Transform(numpy.zeros(3), numpy.ones(3))
  png = pictures.support_images(images, images[::-1], names, ('', ''), transform)
  picture = numpy.asarray(Image.open(io.BytesIO(png)).convert('L'))
  rows, columns = grid
  assert (picture.shape[0] < picture.shape[1]) == (rows < columns)
  for grey in greys:
    wanted = numpy.abs(picture.astype(int) - round(255 * grey)) <= 1
    assert wanted.sum() > 2 * 40 * 40  # both halves hold it, and a cell is some 80 pixels wide


@pytest.mark.parametrize('library', ['NumPy', 'JAX'])
def test_the_documented_lines_load_the_set(finished, monkeypatch, library):
  monkeypatch.chdir(finished.path)
  found: dict[str, Any] = {'numpy': numpy, 'jax': jax}
  exec(distilled_set.LOADING[library], found)
  expected = distilled_set.load(finished.distilled)
  assert isinstance(found['images'], {'NumPy': numpy.ndarray, 'JAX': jax.Array}[library])
  numpy.testing.assert_array_equal(found['images'], expected.images)
  numpy.testing.assert_array_equal(found['labels'], expected.labels)


def test_published_rows():
  run = schema.Run()
  assert paper_results.find(run) is None
  run = schema.Run(data=schema.Data(name='cifar10', zca=True))
  assert paper_results.find(run) == {
    'kind': 'published at convergence (NeurIPS 2021, Table 1)',
    'krr': '63.4-64.7',
    'network': '49.9',
    'nn_width': 1024,
    'nn_steps': 5000,
  }
  run = schema.Run(data=schema.Data(name='cifar10'))
  assert paper_results.find(run) is None
  run = dataclasses.replace(run, method='label_solve', architecture='fc1', images_per_class=50)
  found = paper_results.find(run)
  assert found is not None and found['krr'] == '46.99'
  assert paper_results.find(dataclasses.replace(run, initial_images='noise')) is None


def test_the_readme_has_the_lines_that_load_a_set():
  root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  with open(os.path.join(root, 'README.md'), encoding='utf-8') as file:
    content = file.read()
  for code in distilled_set.LOADING.values():
    for line in code.splitlines():
      assert f'\n    {line}\n' in content
