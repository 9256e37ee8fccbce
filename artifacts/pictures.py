"""Pictures of a run, as in the papers: support images, labels, their covariance, accuracy.

Their colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

import io
from collections.abc import Sequence
from typing import Any

from data import home

home.settle()  # before Matplotlib looks for its folder

import matplotlib.axes
import matplotlib.axis
import matplotlib.figure
import matplotlib.font_manager
import matplotlib.ticker
import numpy as np

from data import preprocess
from data.classes import are_numbers
from distillation import evaluation

_MOST_COLUMNS, _MOST_ROWS = 10, 20  # of a grid of images
_FEW_CLASSES = 20  # more of them need wider axes for their bars, and numbers instead of names
_LONG, _SHORT = 16, 10  # letters of a class's name beside a row, and above a column
_DPI = 200  # a figure's inch is about one of a page: text of 8 or 9 points stays legible in print
_WIDTH, _CELL = 1340, 120  # pixels: a page's text, and the largest image, are this wide
_GAP = 4  # pixels between images
_BLUE, _ORANGE, _LIGHT_GREY = '#0072B2', '#D55E00', '#BBBBBB'
_CURVES = (
  ('krr_test_accuracy', 'KRR', _BLUE, 'o', '-'),
  ('nn_test_accuracy', 'finite network', _ORANGE, 's', ':'),
)


def grid(
  images: np.ndarray,
  num_classes: int,
  transform: preprocess.Transform | None = None,
  like: np.ndarray | None = None,
  width: int = _WIDTH,
) -> np.ndarray:
  """Arranges images in one picture, a row a class, or ten classes a row where each has one image.

  It holds the first 20 classes and 10 images of each at most; of one image a class, all.

  Args:
    images: [S, H, W, D], preprocessed space, class by class.
    num_classes: `C`.
    transform: undone for display, all images on one range; None: images as kernels see them, each
      on a range of its own, symmetric about 0.
    like: [., H, W, D], images that set the range, with `transform`; None: `images`.
    width: of the picture, about, in pixels; images are magnified by whole numbers.

  Returns:
    float [h, w, 3] from 0 to 1.
  """
  rows, columns = _shape(len(images) // num_classes, num_classes)
  shown = _chosen(images, num_classes)
  if transform is None:
    shown = 0.5 + shown / (2 * np.abs(shown).max(axis=(1, 2, 3), keepdims=True) + 1e-12)
  else:
    pixels = preprocess.invert(transform, images if like is None else like)
    low, high = pixels.min(), pixels.max()
    shown = np.clip((preprocess.invert(transform, shown) - low) / ((high - low) or 1), 0, 1)
  if shown.shape[-1] != 3:
    shown = shown.mean(axis=-1, keepdims=True)
  height, across = shown.shape[1:3]
  scale = max(1, round(min(_CELL, width / columns) / across))
  down, right = scale * height + _GAP, scale * across + _GAP
  canvas = np.ones((rows * down - _GAP, columns * right - _GAP, 3))
  for i, image in enumerate(shown):
    y, x = i // columns * down, i % columns * right
    magnified = image.repeat(scale, axis=0).repeat(scale, axis=1)
    canvas[y : y + down - _GAP, x : x + right - _GAP] = magnified
  return canvas


def support_images(
  before: np.ndarray,
  after: np.ndarray,
  class_names: Sequence[str],
  titles: Sequence[str],
  transform: preprocess.Transform | None = None,
) -> bytes:
  """Draws two sets of images, each as a `grid`, side by side; single rows above one another.

  Args:
    before, after: the sets, [S, H, W, D], preprocessed space, class by class.
    class_names: `C` of them.
    titles: of the two.
    transform: undone for display, both sets on the range of the first; None: as kernels see them.

  Returns:
    A PNG.
  """
  num_classes = len(class_names)
  images_per_class = len(before) // num_classes
  rows, columns = _shape(images_per_class, num_classes)
  is_strip = images_per_class == rows == 1
  width = _WIDTH if is_strip else _WIDTH // 2
  range_images = _chosen(before, num_classes)
  grids = [grid(images, num_classes, transform, range_images, width) for images in (before, after)]
  height, width = grids[0].shape[:2]
  left, top, apart = 130 if is_strip else 90, 50, 50  # pixels: for the text, and between the two
  if is_strip:
    size = left + width, top + 2 * height + _GAP
    corners = (left, 0), (left, height + _GAP)
    above, beside = _shortened(class_names, _SHORT), []
  else:
    size = left + 2 * width + apart, top + height
    corners = (left, 0), (left + width + apart, 0)
    above, beside = [str(c) for c in range(columns)], _shortened(class_names, _LONG)[:rows]
    if images_per_class == 1:
      beside = [f'{columns * r}–{min(columns * (r + 1), num_classes) - 1}' for r in range(rows)]
  figure = matplotlib.figure.Figure(figsize=(size[0] / _DPI, size[1] / _DPI))
  for half, (picture, (x, y)) in enumerate(zip(grids, corners)):
    axis = figure.add_axes(
      (x / size[0], 1 - (top + y + height) / size[1], width / size[0], height / size[1])
    )
    axis.imshow(picture, extent=(0, width, height, 0), interpolation='nearest')
    axis.tick_params(length=0, labelsize=8, pad=3, labelbottom=False)
    axis.tick_params(labeltop=is_strip and not half, labelleft=not is_strip and not half)
    axis.set_xticks((np.arange(columns) + 0.5) * (width + _GAP) / columns, above)
    axis.set_yticks((np.arange(len(beside)) + 0.5) * (height + _GAP) / rows, beside)
    axis.spines[:].set_visible(False)
    if is_strip:
      axis.text(-12, height / 2, titles[half], ha='right', va='center', fontsize=9)
    else:
      axis.set_title(titles[half], fontsize=9, loc='left', pad=5)
  return _png(figure)


def _chosen(images: np.ndarray, num_classes: int) -> np.ndarray:
  """The images [., H, W, D] of a `grid`, in its order."""
  if len(images) == num_classes:
    return images
  rows, columns = _shape(len(images) // num_classes, num_classes)
  by_class = images.reshape(num_classes, -1, *images.shape[1:])
  return by_class[:rows, :columns].reshape(-1, *images.shape[1:])


def _shape(images_per_class: int, num_classes: int) -> tuple[int, int]:
  """Rows and columns of a `grid`."""
  if images_per_class == 1:
    return -(-num_classes // _MOST_COLUMNS), min(num_classes, _MOST_COLUMNS)
  return min(num_classes, _MOST_ROWS), min(images_per_class, _MOST_COLUMNS)


def label_bars(
  before: np.ndarray, after: np.ndarray, class_names: Sequence[str], titles: Sequence[str]
) -> bytes:
  """Draws label vectors beside those they began as, of the first image of each class.

  Of more than twenty classes it draws the first ten.

  Args:
    before, after: [S, C], class by class.
    class_names: `C` of them.
    titles: of the two.

  Returns:
    A PNG.
  """
  num_classes, names = len(class_names), _shortened(class_names, _SHORT)
  few = num_classes <= _FEW_CLASSES
  upright = num_classes <= 10 and max(map(len, names)) > 2
  chosen = np.arange(min(num_classes, _FEW_CLASSES if few else 10)) * (len(after) // num_classes)
  columns = min(5 if few else 2, len(chosen))
  rows = -(-len(chosen) // columns)
  is_ragged = rows > 1 and len(chosen) < rows * columns  # then names stand below two of the rows
  height = 1.1 * rows + 0.5 + (0.6 * (1 + is_ragged) if upright else 0.0)
  figure = matplotlib.figure.Figure(figsize=(6.7 if few else 8.0, height), layout='constrained')
  axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
  for axis in axes.flat[len(chosen) :]:
    axis.set_axis_off()
  classes = np.arange(num_classes)
  for i, (axis, first) in enumerate(zip(axes.flat, chosen)):
    axis.bar(classes, before[first], 0.9, color=_LIGHT_GREY, label=titles[0])
    axis.bar(classes, after[first], 0.45, color=_BLUE, label=titles[1])
    axis.axhline(0, color='black', linewidth=0.5)
    axis.set_title(f'class {names[i]}', fontsize=8, pad=2)
    axis.tick_params(labelsize=7, labelbottom=i + columns >= len(chosen))
    axis.spines[['top', 'right']].set_visible(False)
    if num_classes <= 10:
      axis.set_xticks(classes, names, rotation=90 if upright else 0)
  handles, labels = axes[0, 0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside upper right', ncols=2, fontsize=8, frameon=False)
  return _png(figure)


def _shortened(class_names: Sequence[str], length: int) -> list[str]:
  """Cuts names to about `length` letters, and keeps them different.

  Returns numbers where there are too many classes, or letters that Matplotlib's font lacks.
  """
  numbers = [str(c) for c in range(len(class_names))]
  font = matplotlib.font_manager.get_font(matplotlib.font_manager.findfont('DejaVu Sans'))
  plain = [' '.join(name.split()) for name in class_names]
  if len(plain) > _FEW_CLASSES or not set(map(ord, ''.join(plain))) <= font.get_charmap().keys():
    return numbers
  short = [name if len(name) <= length else name[: length - 1] + '…' for name in plain]
  if len(set(short)) < len(short):
    short = [f'{c} {name}' for c, name in zip(numbers, short)]
  return [name.replace('$', r'\$') for name in short]  # a dollar sign begins a formula


def shown_part(num_images: int, num_classes: int) -> str:
  """The part of a set of images that `grid` shows, in words; '' for all of it."""
  images_per_class = num_images // num_classes
  if images_per_class == 1:
    return ''
  rows, columns = _shape(images_per_class, num_classes)
  if rows == num_classes and columns == images_per_class:
    return ''
  classes = f'of the first {rows} classes ' if rows < num_classes else ''
  return f'{classes}the first {columns} of {images_per_class} images each'


def label_heat_map(labels: np.ndarray, class_names: Sequence[str]) -> bytes:
  """Draws labels [S, C], a row an image, a column a class; returns a PNG."""
  figure = matplotlib.figure.Figure(figsize=(3.2, 2.8), layout='constrained')
  axis = figure.subplots()
  _heat_map(figure, axis, labels, aspect='auto')
  _name(axis.xaxis, class_names, rotation=90)
  axis.set_xlabel('class', fontsize=8)
  axis.set_ylabel('image', fontsize=8)
  return _png(figure)


def label_covariance(before: np.ndarray, after: np.ndarray, class_names: Sequence[str]) -> bytes:
  """Draws the covariances [C, C] of labels [S, C] over their images; returns a PNG.

  Each has a scale of its own.
  """
  figure = matplotlib.figure.Figure(figsize=(6.5, 3), layout='constrained')
  for axis, labels, title in zip(
    figure.subplots(1, 2), (before, after), ('original labels', 'learned labels')
  ):
    _heat_map(figure, axis, np.cov(labels, rowvar=False))
    _name(axis.xaxis, class_names, rotation=90)
    _name(axis.yaxis, class_names)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel('class', fontsize=8)
  return _png(figure)


def _name(axis: matplotlib.axis.Axis, class_names: Sequence[str], **kwargs: Any) -> None:
  """Names the ticks of an axis that has one class after the other."""
  if len(class_names) <= _FEW_CLASSES and not are_numbers(class_names):
    axis.set_ticks(range(len(class_names)), _shortened(class_names, _SHORT), **kwargs)


def _heat_map(
  figure: matplotlib.figure.Figure, axis: matplotlib.axes.Axes, values: np.ndarray, **kwargs: Any
) -> None:
  """Draws a matrix in colours that are symmetric about 0."""
  limit = np.abs(values).max() or 1
  image = axis.imshow(
    values, cmap='PuOr', vmin=-limit, vmax=limit, interpolation='nearest', **kwargs
  )
  for side in (axis.xaxis, axis.yaxis):
    side.set_major_locator(matplotlib.ticker.MaxNLocator(10, integer=True))
  axis.tick_params(labelsize=7)
  figure.colorbar(image, ax=axis, shrink=0.85).ax.tick_params(labelsize=7)


def accuracy(rows: Sequence[dict[str, Any]]) -> bytes:
  """Draws test accuracy against step and wall time, from rows of metrics.jsonl; returns a PNG."""
  rows = sorted(rows, key=lambda row: row['step'])
  figure = matplotlib.figure.Figure(figsize=(6.5, 2.8), layout='constrained')
  axes = figure.subplots(1, 2, sharey=True)
  for axis, x, name in ((axes[0], 'step', 'step'), (axes[1], 'wall_seconds', 'wall time (s)')):
    for key, label, colour, marker, line in _CURVES:
      found = [row for row in rows if evaluation.has(row, key) and evaluation.has(row, x)]
      if not found:
        continue
      is_network = key.startswith('nn')
      networks = f', {evaluation.networks_in_words(found)}' if is_network else ''
      deviation = 'nn_test_accuracy_std' if is_network else ''
      axis.errorbar(
        [row[x] for row in found],
        [100 * row[key] for row in found],
        [100 * row.get(deviation, 0.0) for row in found],
        color=colour,
        marker=marker,
        markersize=4,
        linestyle=line,
        linewidth=1.2,
        label=label + networks,
      )
    axis.set_xlabel(name, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
  # Snapshots lie closer at the beginning, and there is a step 0.
  axes[0].set_xscale('symlog', linthresh=1)
  axes[0].set_xlim(left=-0.1)
  axes[0].xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
  axes[0].set_ylabel('test accuracy (%)', fontsize=9)
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside upper left', ncols=2, fontsize=8, frameon=False)
  return _png(figure)


def _png(figure: matplotlib.figure.Figure) -> bytes:
  stream = io.BytesIO()
  figure.savefig(stream, format='png', dpi=_DPI, bbox_inches='tight')
  return stream.getvalue()
