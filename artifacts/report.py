"""`report.html`: one page, complete in itself, with a run's results, pictures and origin."""

import base64
import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
import psutil

from artifacts import distilled_set, files, hardware, paper_results, run_directory, snapshots
from configs import validation
from data import DataError, classes
from distillation import evaluation
from kernels import cpus

_COLUMNS = (
  'step',
  'krr_test_accuracy',
  'krr_test_mse',
  'nn_test_accuracy',
  'nn_width',
  'nn_steps',
  'train_loss',
  'train_accuracy',
  'wall_seconds',
  'kernel_pairs_per_second',
)
_PACKAGES = ('numpy', 'jax', 'jaxlib', 'neural-tangents', 'optax', 'dm-launchpad')
_TEMPLATES = jinja2.Environment(
  loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
)
_Row = dict[str, Any]  # of metrics.jsonl or baselines.json


class _Support(NamedTuple):
  """Images [S, H, W, D], preprocessed space, and labels [S, C] after `step` updates."""

  step: int
  images: np.ndarray
  labels: np.ndarray


class _Figure(NamedTuple):
  """A picture of the report, which is a file of the run directory too."""

  file_name: str
  caption: str
  png: bytes

  @property
  def base64(self) -> str:
    return base64.b64encode(self.png).decode()


def write(
  directory: run_directory.RunDirectory, rows: Sequence[dict[str, Any]], step: int | None = None
) -> None:
  """Draws the pictures and writes the report of a run whose set is distilled.

  Args:
    directory: of the run, with `distilled.npz`; the first snapshot that can be read is shown too.
    rows: of metrics.jsonl; numbers that one lacks are left out.
    step: of the snapshot whose images and labels are shown; None: the distilled set.

  Raises:
    DataError: `distilled.npz`, or the snapshot of `step`, cannot be read.
    OSError: the files cannot be written.
    ImportError: Matplotlib cannot be imported.
  """
  saved = directory.read_saved()
  distilled = distilled_set.load(directory.distilled)
  final = _Support(distilled.settings['step'], distilled.images, distilled.labels)
  shown = final if step is None else _snapshot(directory, step, distilled)
  first, damage = _first_snapshot(directory, distilled)
  figures = _draw(first or final, shown, distilled, rows)
  for figure in figures:
    files.write_atomically(os.path.join(directory.path, figure.file_name), figure.png)
  page = _page(directory, saved, distilled, rows, figures, damage)
  files.write_atomically(directory.report, page)


def _snapshot(
  directory: run_directory.RunDirectory, step: int, distilled: distilled_set.Distilled
) -> _Support:
  """The support set of a snapshot. Raises DataError."""
  shape, num_classes = distilled.images.shape[1:], distilled.labels.shape[1]
  snapshot = snapshots.read_checked(directory, step, shape, num_classes)
  return _Support(step, snapshot.images, snapshot.labels)


def _first_snapshot(
  directory: run_directory.RunDirectory, distilled: distilled_set.Distilled
) -> tuple[_Support | None, list[str]]:
  """The first snapshot that can be read, and what is wrong with those before it, in sentences."""
  damage = []
  for step in snapshots.steps(directory):
    try:
      return _snapshot(directory, step, distilled), damage
    except DataError as error:
      message = str(error)
      damage.append(message[0].upper() + message[1:])
  return None, damage


def _draw(
  first: _Support, last: _Support, distilled: distilled_set.Distilled, rows: Sequence[dict]
) -> list[_Figure]:
  """The report's figures: `last` beside `first`, and the accuracies of rows of metrics.jsonl."""
  from artifacts import pictures  # here, so that an ImportError of Matplotlib's becomes one line

  names, transform = distilled.class_names, distilled.transform
  titles = f'step {first.step}', f'step {last.step}'
  part = pictures.shown_part(len(last.images), len(names))
  figures = [
    _Figure(
      'images.png',
      f'Support images{part and ": " + part}; preprocessing undone, both on the range of the '
      'first.',
      pictures.support_images(first.images, last.images, names, titles, transform),
    )
  ]
  if transform.zca is not None:
    figures.append(
      _Figure(
        'images_whitened.png',
        'The same as the kernel sees them: whitened, each on a range of its own.',
        pictures.support_images(first.images, last.images, names, titles),
      )
    )
  if not np.array_equal(first.labels, last.labels):
    figures += [
      _Figure(
        'labels.png',
        'Labels of the first image of each class (of ten classes where there are more than 20), '
        'beside those they began as.',
        pictures.label_bars(first.labels, last.labels, names, titles),
      ),
      _Figure(
        'label_covariance.png',
        'Covariance of the labels, class by class; each has a scale of its own.',
        pictures.label_covariance(first.labels, last.labels, names),
      ),
    ]
  accuracy = _Figure(
    'accuracy.png',
    "Test accuracy; wall time is the coordinator's, beside which evaluations run.",
    pictures.accuracy(rows),
  )
  return [*figures, accuracy]


def _page(
  directory: run_directory.RunDirectory,
  saved: run_directory.Saved,
  distilled: distilled_set.Distilled,
  rows: Sequence[_Row],
  figures: Sequence[_Figure],
  damage: Sequence[str],
) -> str:
  """The report's HTML, with `figures` and messages about snapshots that cannot be read."""
  run, name, step = saved.config.run, distilled.settings['data']['name'], distilled.settings['step']
  num_images, num_classes = distilled.labels.shape
  architecture = run.architecture if isinstance(run.architecture, str) else 'own architecture'
  rows = sorted(rows, key=lambda row: row['step'])
  columns = [key for key in _COLUMNS if any(evaluation.has(row, key) for row in rows)]
  published = paper_results.find(run)
  return _TEMPLATES.get_template('report.html.jinja').render(
    title=f'{run.method} on {name}: {num_images} images, {architecture}',
    results=_results(rows, directory.read_baselines() or [], step, published),
    is_published=published is not None,
    class_names=[] if classes.are_numbers(distilled.class_names) else distilled.class_names,
    damage=damage,
    figures=figures,
    num_images=num_images,
    num_classes=num_classes,
    image_shape=distilled.images.shape[1:],
    loading=distilled_set.LOADING,
    command=directory.read_command() or 'not recorded',
    origin=[
      ('updates', step),
      ('wall time of the distillation', f'{_number(rows[-1], "wall_seconds", ".0f", "?")} s'),
      ('data (name and key)', f'{name}, {saved.data_key}'),
      *_software_and_machine(),
      *_workers(directory),
    ],
    columns=[key.replace('_', ' ') for key in columns],
    evaluations=[[_number(row, key, '.5g') for key in columns] for row in rows],
    configuration=sorted(
      (path, json.dumps(value))
      for path, value in validation.flatten(saved.config.to_dict()).items()
    ),
  )


def _results(
  rows: Sequence[_Row], baselines: Sequence[_Row], step: int, published: _Row | None
) -> list[tuple[str, str, str, str, str]]:
  """Lines of the table of test accuracies: the first row, baselines, the last row, the papers'.

  Args:
    rows: of metrics.jsonl, in order.
    baselines: rows of baselines.json.
    step: of the distilled set.
    published: a row of `paper_results`.

  Returns:
    Of each line: CSS class, name, KRR accuracy, KRR error, accuracy of the finite network.
  """
  known = {0: 'the images it started from (step 0)', step: f'distilled (step {step})'}
  names = [known.get(row['step'], f'step {row["step"]}') for row in rows]
  named = [('', names[0], rows[0])] if len(rows) > 1 else []
  named += [('', row['kind'], row) for row in baselines]
  named.append(('ours', names[-1], rows[-1]))
  lines = [
    (
      kind,
      name,
      _number(row, 'krr_test_accuracy', '.2%', 'not known').replace('%', ' %'),
      _number(row, 'krr_test_mse', '.5f'),
      evaluation.network_in_words(row)
      if evaluation.has(row, 'nn_test_accuracy')
      else 'not trained',
    )
    for kind, name, row in named
  ]
  if published:
    network = ''
    if 'network' in published:
      network = f'{published["network"]} % ({evaluation.networks_in_words([published])})'
    lines.append(('', published['kind'], f'{published["krr"]} %', '', network))
  return lines


def _number(row: _Row, key: str, form: str, missing: str = '') -> str:
  """A number of a row in the format `form`; `missing` where the row has none of that name."""
  return format(row[key], form) if evaluation.has(row, key) else missing


def _software_and_machine() -> list[tuple[str, str]]:
  """Versions and hardware of this process, which evaluates."""
  versions = [f'Python {platform.python_version()}']
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions.append(f'{package} {importlib.metadata.version(package)}')
  machine = (
    hardware.cpu_model(),
    f'{cpus.available()} cores',
    f'{psutil.virtual_memory().total / 2**30:.0f} GiB',
    f'{platform.system()} {platform.release()}',
  )
  return [('versions', ', '.join(versions)), ('evaluated on', ', '.join(machine))]


def _workers(directory: run_directory.RunDirectory) -> list[tuple[str, str]]:
  """The number of tasks and kernel pairs that each worker has computed, and its speed."""
  lines = []
  for name, counts in (directory.read_status() or {}).get('workers', {}).items():
    rate = f', {counts["pairs"] / counts["seconds"]:.4g} pairs/s' if counts['seconds'] else ''
    done = f'{counts["tasks"]} tasks, {counts["pairs"]} kernel pairs{rate}'
    lines.append((name, f'{done} (since the coordinator last started)'))
  return lines
