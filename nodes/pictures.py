"""The picture of a run: support images before and after, a row a class."""

import matplotlib
import numpy as np

from data import preprocess
from nodes import run_directory

_MOST_COLUMNS = 10


def before_and_after(path: str, before: np.ndarray, after: np.ndarray, transform: preprocess.Transform, num_classes: int) -> None:
  """Writes a PNG with the images' pixel values as they were before preprocessing, both halves on the range of the first.

  Args:
    path: of the file, replaced atomically.
    before, after: [S, H, W, D], preprocessed space, class by class; the first ten of each class are shown.
    transform: of the training set.
    num_classes: `C`.
  """
  matplotlib.use('Agg')
  from matplotlib import pyplot
  raw = [preprocess.invert(transform, images) for images in (before, after)]
  low, high = raw[0].min(), raw[0].max()
  shown = [np.clip((images - low) / ((high - low) or 1), 0, 1).reshape((num_classes, -1) + images.shape[1:])[:, :_MOST_COLUMNS]
           for images in raw]
  columns = shown[0].shape[1]
  transposed = columns == 1  # one image a class: classes side by side make a picture of better shape
  grid = (2, num_classes) if transposed else (num_classes, 2 * columns + 1)
  figure, axes = pyplot.subplots(*grid, figsize=(0.8 * grid[1], 0.8 * grid[0] + 0.4), squeeze=False)
  for axis in axes.flat:
    axis.set_axis_off()
  for half, images in enumerate(shown):
    for c in range(num_classes):
      for i in range(columns):
        axis = axes[half, c] if transposed else axes[c, half * (columns + 1) + i]
        image = images[c, i]
        axis.imshow(image if image.shape[-1] == 3 else image.mean(axis=-1), cmap='gray', vmin=0, vmax=1, interpolation='nearest')
  for half, title in enumerate(('before', 'after: distilled')):
    axis = axes[half, 0] if transposed else axes[0, half * (columns + 1)]
    axis.set_title(title, fontsize=9, loc='left')
  run_directory.write_atomically(path, lambda file: figure.savefig(file, format='png', dpi=150, bbox_inches='tight'))
  pyplot.close(figure)
