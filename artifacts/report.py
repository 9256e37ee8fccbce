"""`report.html`: one page, complete in itself, that tells what a run was and what came of it. Made
at a run's end, and again by

    python -m artifacts.report --workdir=DIR [--step=N]

whose pictures show the snapshot of step N instead of the distilled set. TensorBoard's files that
are missing are made again too.

Exit status: 0 done, 2 bad input or a directory that cannot be written.
"""

import base64
import html
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any, Sequence

import numpy as np
import psutil
from absl import flags, logging

from artifacts import distilled_set, paper_results, run_directory
from configs import validation
from data import DataError, classes, store
from distillation import evaluation
from programs import command_line

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
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f4f4f4; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
img { max-width: 100%; } figure { margin: 1rem 0; }
figcaption { color: #444; font-size: .9rem; } tr.ours td { font-weight: 600; }
"""


def write(
  directory: run_directory.RunDirectory, rows: Sequence[dict[str, Any]], step: int | None = None
) -> None:
  """Draws the pictures and writes the report of a run whose set is distilled.

  Args:
    directory: of the run, with `distilled.npz`; the first snapshot that can be read is shown too.
    rows: of metrics.jsonl; what is missing in one is left out.
    step: of the snapshot whose images and labels are shown; None: the distilled set.

  Raises:
    DataError: `distilled.npz`, or the snapshot of `step`, cannot be read.
    OSError: the files cannot be written.
    ImportError: Matplotlib is not there.
  """
  from artifacts import pictures  # here: so that its lack is told in one line

  saved = directory.read_saved()
  distilled = distilled_set.load(directory.distilled)
  names = distilled.class_names
  shown_step, images, labels = distilled.settings['step'], distilled.images, distilled.labels
  if step is not None:
    shown_step, (images, labels) = step, _snapshot(directory, step, distilled)
  first_step, first_images, first_labels, damage = _first_snapshot(directory, distilled)
  titles = (f'step {first_step}', f'step {shown_step}')
  drawn = []

  def draw(name, caption, png):
    run_directory.write_atomically(os.path.join(directory.path, name), lambda file: file.write(png))
    drawn.append((name, caption, png))

  part = pictures.shown_part(len(images), len(names))
  draw(
    directory.picture,
    f'Support images{part and ": " + part}; preprocessing undone, both on the range of the first.',
    pictures.support_images(first_images, images, names, titles, distilled.transform),
  )
  if distilled.transform.zca is not None:
    draw(
      'images_whitened.png',
      'The same as the kernel sees them: whitened, each on a range of its own.',
      pictures.support_images(first_images, images, names, titles),
    )
  if not np.array_equal(first_labels, labels):
    draw(
      'labels.png',
      'Labels of the first image of each class (of ten classes where there are more than 20), beside those they began as.',
      pictures.label_bars(first_labels, labels, names, titles),
    )
    draw(
      'label_covariance.png',
      'Covariance of the labels, class by class; each has a scale of its own.',
      pictures.label_covariance(first_labels, labels, names),
    )
  draw(
    'accuracy.png',
    "Test accuracy; wall time is the coordinator's, beside which evaluations run.",
    pictures.accuracy(rows),
  )
  page = _page(directory, saved, distilled, rows, drawn, damage)
  run_directory.write_atomically(directory.report, page)


def _snapshot(directory, step, distilled) -> tuple[np.ndarray, np.ndarray]:
  size, num_classes = distilled.images.shape[1:], distilled.labels.shape[1]
  return distilled_set.load_snapshot(directory, step, size, num_classes)


def _first_snapshot(directory, distilled) -> tuple[int, np.ndarray, np.ndarray, list[str]]:
  """Step, images and labels of the first snapshot that can be read, and what ails those before.

  Where there is none: of the distilled set.
  """
  damage = []
  for step in directory.snapshot_steps():
    try:
      return step, *_snapshot(directory, step, distilled), damage
    except DataError as error:
      damage.append(f'{str(error)[0].upper()}{str(error)[1:]}')
  return distilled.settings['step'], distilled.images, distilled.labels, damage


def _page(directory, saved, distilled, rows, drawn, damage) -> str:
  run, settings = saved.config.run, distilled.settings
  num_images, num_classes = distilled.labels.shape
  architecture = run.architecture if isinstance(run.architecture, str) else 'own architecture'
  title = f'{run.method} on {settings["data"]["name"]}: {num_images} images, {architecture}'
  last = max(rows, key=lambda row: row['step'])
  figures = ''.join(f'<p>{html.escape(message)}</p>' for message in damage) + ''.join(
    f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    f'<figcaption>{html.escape(caption)} ({html.escape(os.path.basename(name))})</figcaption></figure>'
    for name, caption, png in drawn
  )
  seconds = _number(last, 'wall_seconds', '.0f', '?')
  shape = ' × '.join(map(str, distilled.images.shape[1:]))
  sections = [
    ('Test accuracy', _results(directory, run, settings['step'], rows)),
    *_classes(distilled.class_names),
    ('Pictures', figures),
    (
      'Use the result',
      f'<p><code>distilled.npz</code>: images [{num_images}, {shape}] in the preprocessed space, labels '
      f'[{num_images}, {num_classes}] (one-hot − 1/{num_classes} where neither learned nor solved for).</p>'
      + ''.join(
        f'<p>{name}</p><pre>{html.escape(code)}</pre>'
        for name, code in distilled_set.LOADING.items()
      ),
    ),
    (
      'How it was made',
      f'<pre>{html.escape(directory.read_command() or "not recorded")}</pre>'
      + _table(
        [
          ('updates', settings['step']),
          ('wall time of the distillation', f'{seconds} s'),
          ('data (name and key)', f'{settings["data"]["name"]}, {saved.data_key}'),
          *_environment(directory),
        ]
      ),
    ),
    ('Evaluations', _metrics(rows)),
    (
      'Configuration',
      _table(
        sorted(
          (path, json.dumps(value))
          for path, value in validation.flatten(saved.config.to_dict()).items()
        )
      ),
    ),
  ]
  body = ''.join(f'<h2>{name}</h2>{content}' for name, content in sections)
  return (
    f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>'
    f'<body><h1>{html.escape(title)}</h1>{body}</body></html>\n'
  )


def _results(directory, run, step, rows) -> str:
  first, last = (choose(rows, key=lambda row: row['step']) for choose in (min, max))
  known = {0: 'the images it started from (step 0)', step: f'distilled (step {step})'}
  name = lambda row: known.get(row['step'], f'step {row["step"]}')
  lines = [] if first is last else [('', name(first), first)]
  lines += [('', row['kind'], row) for row in directory.read_baselines() or []]
  lines.append(('ours', name(last), last))
  cells = [
    (
      kind,
      name,
      _number(row, 'krr_test_accuracy', '.2%', 'not known').replace('%', ' %'),
      _number(row, 'krr_test_mse', '.5f'),
      _network(row),
    )
    for kind, name, row in lines
  ]
  expected = paper_results.find(run)
  if expected:
    network = ''
    if 'network' in expected:
      network = f'{expected["network"]} % ({evaluation.networks_in_words([expected])})'
    cells.append(('', expected['kind'], f'{expected["krr"]} %', '', network))
  body = ''.join(
    f'<tr class="{kind}"><td>{html.escape(name)}</td>'
    + ''.join(f'<td class="number">{html.escape(cell)}</td>' for cell in rest)
    + '</tr>'
    for kind, name, *rest in cells
  )
  note = '' if expected else '<p>The papers publish no row of this setting.</p>'
  return (
    '<table><tr><th></th><th class="number">KRR</th><th class="number">KRR MSE</th><th class="number">finite network</th></tr>'
    f'{body}</table>{note}'
  )


def _metrics(rows) -> str:
  columns = [key for key in _COLUMNS if any(evaluation.has(row, key) for row in rows)]
  head = ''.join(f'<th class="number">{key.replace("_", " ")}</th>' for key in columns)
  cells = lambda row: ''.join(
    f'<td class="number">{_number(row, key, ".5g")}</td>' for key in columns
  )
  body = ''.join(f'<tr>{cells(row)}</tr>' for row in sorted(rows, key=lambda row: row['step']))
  return f'<table><tr>{head}</tr>{body}</table>'


def _classes(class_names: Sequence[str]) -> list[tuple[str, str]]:
  """A section with the classes' names, where they are not their numbers: title and content."""
  names = ', '.join(f'{c} {html.escape(name)}' for c, name in enumerate(class_names))
  return [] if classes.are_numbers(class_names) else [('Classes', f'<p>{names}</p>')]


def _network(row: dict[str, Any]) -> str:
  is_trained = evaluation.has(row, 'nn_test_accuracy')
  return evaluation.network_in_words(row) if is_trained else 'not trained'


def _number(row: dict[str, Any], key: str, form: str, missing: str = '') -> str:
  """A number of a row in the format `form`; `missing` where the row has none of that name."""
  return format(row[key], form) if evaluation.has(row, key) else missing


def _table(pairs) -> str:
  cells = ''.join(
    f'<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>'
    for name, value in pairs
  )
  return f'<table>{cells}</table>'


def _environment(directory) -> list[tuple[str, str]]:
  """Of this process; workers on other machines are named with what they have done."""
  versions = []
  for package in _PACKAGES:
    try:
      versions.append(f'{package} {importlib.metadata.version(package)}')
    except importlib.metadata.PackageNotFoundError:
      pass
  found = [
    ('versions', f'Python {platform.python_version()}, {", ".join(versions)}'),
    (
      'evaluated on',
      f'{_processor()}, {len(os.sched_getaffinity(0))} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, '
      f'{platform.system()} {platform.release()}',
    ),
  ]
  for name, counts in (directory.read_status() or {}).get('workers', {}).items():
    rate = f', {counts["pairs"] / counts["seconds"]:.4g} pairs/s' if counts['seconds'] else ''
    found.append(
      (
        name,
        f'{counts["tasks"]} tasks, {counts["pairs"]} kernel pairs{rate} (since the coordinator last started)',
      )
    )
  return found


def _processor() -> str:
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      names = [line.partition(':')[2].strip() for line in file if line.startswith('model name')]
  except OSError:
    names = []
  return names[0] if names else platform.machine()


def _write_events(directory, rows, saved) -> None:
  from artifacts import tensorboard  # here, because a report needs none

  cache = store.cache_folder(saved.config.system.cache_dir)
  prepared = store.open_prepared(saved.data_key, cache)
  if prepared:
    tensorboard.write_missing(directory, rows, prepared)
  else:
    logging.info("TensorBoard's files stay as they are: the prepared data are not in %s.", cache)


def main(argv: Sequence[str]) -> int:
  """Writes the report of --workdir again; returns the exit status."""
  flags.DEFINE_string('workdir', None, 'Directory of a run that has come to its end.')
  flags.DEFINE_integer(
    'step', None, 'Show the snapshot of this step instead of the distilled set.', lower_bound=0
  )
  command_line.log_plainly()
  try:
    command_line.parse(argv, '--workdir=DIR --step=N')
    if not flags.FLAGS.workdir:
      raise command_line.BadInput('--workdir=DIR is missing: the run directory.')
    directory = run_directory.RunDirectory(flags.FLAGS.workdir)
    rows, saved = directory.read_metrics(), directory.read_config()
    if saved is None or not rows:
      raise command_line.BadInput(
        f'--workdir={flags.FLAGS.workdir} holds no run that has been evaluated.'
      )
    write(directory, rows, flags.FLAGS.step)
    _write_events(directory, rows, saved)
  except (command_line.BadInput, DataError, run_directory.RunDirectoryError) as error:
    print(f'error: {error}', file=sys.stderr)
    return run_directory.BAD_INPUT_STATUS
  except (OSError, ImportError) as error:
    print(f'error: the report of {directory.path} cannot be written: {error}', file=sys.stderr)
    return run_directory.BAD_INPUT_STATUS
  print(directory.report)
  return 0


if __name__ == '__main__':
  command_line.exit_with(main)
