"""Evaluates a distilled set by KRR and finite networks on its whole test set, on all cores.

    python -m programs.evaluate --dataset=runs/digits/distilled.npz
    python -m programs.evaluate --dataset=kip/cifar10/ConvNet_ssize100_zca_nol_noaug_ckpt1000.npz
    python -m programs.evaluate --dataset=FILE.npz --config=FILE --baselines

A `distilled.npz` of ours holds its own settings, and the name of a set that the papers' authors
released (data/released.py) tells them: it is fetched. Another file (`images` [S, H, W, D] in the
preprocessed space, `labels` [S, C]) needs a configuration, of which the data set, the
preprocessing, the kernel, the ridge and the evaluation are used; given to the others, it takes the
place of their settings.

Exit status: 0 done, 1 failed, 2 bad input.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags, logging

from artifacts import distilled_set
from configs import base, schema, validation
from data import DataError, npz, released, store
from distillation import evaluation, krr
from kernels import cpus
from programs import command_line

_DATASET = flags.DEFINE_string(
  'dataset',
  None,
  'Distilled set to evaluate: an .npz file with images and labels, or the name of a released one.',
)
_BASELINES = flags.DEFINE_bool(
  'baselines',
  False,
  'Evaluate as many real images beside it (also: config.system.evaluation.baselines).',
)
_JSON = flags.DEFINE_bool('json', False, 'Print one line of JSON instead of a table.')


class _Set(NamedTuple):
  """Images [S, H, W, D], labels [S, C], and `Distilled.settings`; None in files without."""

  images: np.ndarray
  labels: np.ndarray
  settings: dict[str, Any] | None


def main(argv: Sequence[str]) -> int:
  """Evaluates the file of --dataset; returns the exit status."""
  command_line.log_plainly()
  command_line.parse(argv, '--dataset=FILE --config=FILE --baselines --json')
  path = _DATASET.value
  if not path:
    raise command_line.BadInput(
      '--dataset=FILE is missing: a distilled.npz, or an .npz file with images and labels.'
    )
  try:
    rows = _evaluate(path, _BASELINES.value)
  except krr.NotPositiveDefiniteError as error:
    print(f'The evaluation failed: {error}', file=sys.stderr)
    return 1
  print(json.dumps({'dataset': path, 'rows': rows}) if _JSON.value else _table(path, rows))
  return 0


def _evaluate(path: str, baselines: bool) -> list[dict[str, Any]]:
  """Rows, told apart by `kind`, of the set and of the baselines, if wanted.

  Raises BadInput, ConfigError, DataError, NotPositiveDefiniteError.
  """
  given = (command_line.CONFIG.value or base.get_config()).to_dict()
  cache = store.cache_folder(given['system']['cache_dir'])
  found = _load(path, cache, given['run']['data']['dir'])
  config = _configure(path, given, found.settings)
  prepared = store.prepare(config.run.data, cache)
  validation.validate_image_size(config, prepared.train_images.shape[1:])
  _check_fit(path, found, prepared)
  images, labels, settings = found.images, found.labels, config.system.evaluation
  threads = config.system.worker_threads or cpus.available()
  evaluate = evaluation.Evaluation(config.run, settings, prepared, threads)
  baselines = baselines or settings.baselines
  if baselines:
    try:
      evaluate.real_images(len(images))
    except ValueError as error:
      raise command_line.BadInput(f'no baselines for {path!r}: {error}') from error
  logging.info(
    'Evaluating %d images on the %d test images of %s.',
    len(images),
    len(prepared.test_images),
    prepared.name,
  )
  row = {**evaluate.krr(images, labels), **evaluate.finite_network(images, labels)}
  others = evaluate.baselines(len(images)) if baselines else []
  return [{'kind': 'distilled', **row}, *others]


def _load(path: str, cache: str, folder: str) -> _Set:
  """Reads a file, or fetches a released one.

  Args:
    path: of the file, or the name of a released set.
    cache, folder: as for `distilled_set.load_released`.

  Raises:
    DataError: it cannot be read, or has no images or labels.
  """
  if released.is_name(path):
    distilled = distilled_set.load_released(path, cache, folder)
    return _Set(distilled.images, distilled.labels, distilled.settings)
  arrays = npz.read(path, ('images', 'labels'), optional=('settings',))
  if 'settings' not in arrays:
    return _Set(arrays['images'], arrays['labels'], None)
  distilled = distilled_set.load(path)
  return _Set(distilled.images, distilled.labels, distilled.settings)


def _configure(path: str, given: dict[str, Any], settings: dict[str, Any] | None) -> schema.Config:
  """The configuration given by --config, or else the defaults with the file's own settings.

  Raises BadInput where there are neither, ConfigError.
  """
  if not command_line.CONFIG.value:
    if settings is None:
      raise command_line.BadInput(
        f'{path!r} holds no settings: give --config=FILE for its data set, preprocessing and '
        'architecture.'
      )
    given['run'].update(settings['run'])
    given['system']['evaluation'].update(settings['evaluation'])
  return validation.validate(given)


def _check_fit(path: str, found: _Set, prepared: store.Prepared) -> None:
  """Raises DataError where the distilled set does not belong to this data set."""
  images, labels, settings = found
  if settings and settings['data']['key'] != prepared.key:
    raise DataError(
      f'{path!r} was distilled from {settings["data"]["name"]} with other content or preprocessing '
      f'than that of the {prepared.name} given here (run.data).'
    )
  size, num_classes = prepared.train_images.shape[1:], prepared.num_classes
  if images.ndim != 4 or images.shape[1:] != size or not len(images):
    raise DataError(
      f'{path!r}: images must be [S, {", ".join(map(str, size))}] for {prepared.name}, '
      f'got {list(images.shape)}.'
    )
  if labels.shape != (len(images), num_classes):
    raise DataError(
      f'{path!r}: labels must be [{len(images)}, {num_classes}] for {prepared.name}, '
      f'got {list(labels.shape)}.'
    )
  for name, array in (('images', images), ('labels', labels)):
    if array.dtype.kind != 'f' or not np.isfinite(array).all():
      what = 'NaN or infinity' if array.dtype.kind == 'f' else array.dtype
      raise DataError(f'{path!r}: {name} must be finite floating-point numbers, got {what}.')


def _table(path: str, rows: Sequence[dict[str, Any]]) -> str:
  lines = [f'Test accuracy of {path}', f'{"":30}{"KRR":>10}{"MSE":>10}  finite network']
  for row in rows:
    network = evaluation.network_in_words(row) if 'nn_test_accuracy' in row else 'not trained'
    if row.get('nn_seeds', 1) > 1:
      network += f' ({row["nn_seeds"]} seeds)'
    accuracy, error = 100 * row['krr_test_accuracy'], row['krr_test_mse']
    lines.append(f'{row["kind"]:30}{accuracy:8.2f} %{error:10.5f}  {network}')
    if row.get('nn_selected_on'):
      lines.append(
        f'{"":52}learning-rate factor {row["nn_learning_rate_factor"]:g} and L2 {row["nn_l2"]:g} '
        f'selected on {row["nn_selected_on"]}'
      )
  return '\n'.join(lines)


if __name__ == '__main__':
  command_line.exit_with(main)
