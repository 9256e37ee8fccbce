"""Pictures of a run, as in the papers: support images, labels, the labels' covariance, accuracy. Colours of Okabe and Ito, for all eyes."""

import io
from typing import Any, Sequence

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from data import preprocess

_MOST_COLUMNS = 10  # images a class
_MOST_LABELS = 20  # label vectors shown as bars
_DPI = 150  # a figure's inch is about one of a page: text of 8 or 9 points stays legible in print
_BLUE, _ORANGE, _GREY = '#0072B2', '#D55E00', '#999999'
_CURVES = (('krr_test_accuracy', 'KRR', _BLUE, 'o'), ('nn_test_accuracy', 'finite network', _ORANGE, 's'))


def support_images(before: np.ndarray, after: np.ndarray, num_classes: int, titles: Sequence[str],
                   transform: preprocess.Transform | None = None) -> bytes:
  """A PNG of two sets of images, a row a class (with one image a class: a column a class).

  Args:
    before, after: [S, H, W, D], preprocessed space, class by class; the first ten of each class are shown.
    num_classes: `C`.
    titles: of the two.
    transform: undone for display, both sets on the range of the first; None: as kernels see them, each image on a range of its own,
      symmetric about 0.
  """
  if transform is not None:
    before, after = (preprocess.invert(transform, images) for images in (before, after))
    low, high = before.min(), before.max()
    shown = [(images - low) / ((high - low) or 1) for images in (before, after)]
  else:
    shown = [0.5 + images / (2 * np.abs(images).max(axis=(1, 2, 3), keepdims=True) + 1e-12) for images in (before, after)]
  shown = [np.clip(images, 0, 1).reshape((num_classes, -1) + images.shape[1:])[:, :_MOST_COLUMNS] for images in shown]
  columns = shown[0].shape[1]
  transposed = columns == 1
  grid = (2, num_classes) if transposed else (num_classes, 2 * columns + 1)
  figure = matplotlib.figure.Figure(figsize=(0.7 * grid[1] + 0.4, 0.7 * grid[0] + 0.5))
  axes = figure.subplots(*grid, squeeze=False, gridspec_kw={'wspace': 0.08, 'hspace': 0.25 if transposed else 0.08})
  for axis in axes.flat:
    axis.set_axis_off()
  for half, images in enumerate(shown):
    for c in range(num_classes):
      for i in range(columns):
        axis = axes[half, c] if transposed else axes[c, half * (columns + 1) + i]
        image = images[c, i]
        axis.imshow(image if image.shape[-1] == 3 else image.mean(axis=-1), cmap='gray', vmin=0, vmax=1, interpolation='nearest')
      if half == 0:
        place, alignment = ((0.5, 1.05), ('center', 'bottom')) if transposed else ((-0.15, 0.5), ('right', 'center'))
        axis = axes[0, c] if transposed else axes[c, 0]
        axis.text(*place, str(c), transform=axis.transAxes, ha=alignment[0], va=alignment[1], fontsize=8)
    axis = axes[half, 0] if transposed else axes[0, half * (columns + 1)]
    if transposed:
      axis.text(-0.15, 0.5, titles[half], transform=axis.transAxes, ha='right', va='center', fontsize=9)
    else:
      axis.set_title(titles[half], fontsize=9, loc='left')
  return _png(figure)


def label_bars(before: np.ndarray, after: np.ndarray, num_classes: int) -> bytes:
  """A PNG of label vectors beside those they began as: of the first image of each class, of twenty classes at most.

  Args:
    before, after: [S, C], class by class.
    num_classes: `C`.
  """
  chosen = np.arange(num_classes)[:_MOST_LABELS] * (len(after) // num_classes)
  columns = min(5, len(chosen))
  rows = -(-len(chosen) // columns)
  figure = matplotlib.figure.Figure(figsize=(1.7 * columns, 1.25 * rows + 0.5), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
  for axis in axes.flat[len(chosen):]:
    axis.set_axis_off()
  classes = np.arange(num_classes)
  for axis, c, i in zip(axes.flat, range(num_classes), chosen):
    axis.bar(classes - 0.2, before[i], 0.4, color=_GREY, label='at step 0')
    axis.bar(classes + 0.2, after[i], 0.4, color=_BLUE, label='now')
    axis.axhline(0, color='black', linewidth=0.5)
    axis.set_title(f'class {c}', fontsize=8, pad=2)
    axis.tick_params(labelsize=7)
    if num_classes <= 10:
      axis.set_xticks(classes)
  figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside upper right', ncols=2, fontsize=8, frameon=False)
  return _png(figure)


def label_covariance(before: np.ndarray, after: np.ndarray) -> bytes:
  """A PNG of the covariance [C, C] of two sets of labels [S, C] over their images; each has a scale of its own."""
  figure = matplotlib.figure.Figure(figsize=(6.5, 3), layout='constrained')
  for axis, labels, title in zip(figure.subplots(1, 2), (before, after), ('original labels', 'learned labels')):
    covariance = np.cov(labels, rowvar=False)
    limit = np.abs(covariance).max() or 1
    image = axis.imshow(covariance, cmap='PuOr', vmin=-limit, vmax=limit, interpolation='nearest')
    axis.set_title(title, fontsize=9)
    axis.set_xlabel('class', fontsize=8)
    axis.tick_params(labelsize=7)
    figure.colorbar(image, ax=axis, shrink=0.85).ax.tick_params(labelsize=7)
  return _png(figure)


def accuracy(rows: Sequence[dict[str, Any]]) -> bytes:
  """A PNG of test accuracy against step and against wall time, from the rows of metrics.jsonl."""
  rows = sorted(rows, key=lambda row: row['step'])
  figure = matplotlib.figure.Figure(figsize=(6.5, 2.8), layout='constrained')
  axes = figure.subplots(1, 2, sharey=True)
  for axis, x, name in ((axes[0], 'step', 'update'), (axes[1], 'wall_seconds', 'wall time (s)')):
    for key, label, colour, marker in _CURVES:
      found = [row for row in rows if key in row]
      if found:
        axis.errorbar([row[x] for row in found], [100 * row[key] for row in found],
                      [100 * row.get('nn_test_accuracy_std', 0.0) if key.startswith('nn') else 0.0 for row in found],
                      color=colour, marker=marker, markersize=4, linewidth=1.2, capsize=0, label=label)
    axis.set_xlabel(name, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
  axes[0].set_xscale('symlog', linthresh=1)  # snapshots lie closer at the beginning, and there is a step 0
  axes[0].set_xlim(left=-0.1)
  axes[0].xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
  axes[0].set_ylabel('test accuracy (%)', fontsize=9)
  axes[0].legend(fontsize=8, frameon=False)
  return _png(figure)


def _png(figure: matplotlib.figure.Figure) -> bytes:
  stream = io.BytesIO()
  figure.savefig(stream, format='png', dpi=_DPI, bbox_inches='tight')
  return stream.getvalue()
