"""Writes keras_golden.npz: what Keras' own package does to a few images. Written with
keras-preprocessing 1.1.2, SciPy 1.15.3:

    python tests/data/make_keras_golden.py
"""

import os

import numpy as np
from keras_preprocessing.image import ImageDataGenerator  # pyright: ignore[reportMissingImports]


def main():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, size=(6, 7, 10, 3)).astype(np.uint8)
  changes = {
    'rotation': [0, 0, 25, -140, 8, -3],
    'down': [0, 1.3, 0, 2, -0.7, 20],
    'right': [0, -2.6, 0, 0.4, 3, -1],
    'channel_shift': [0, 0, 0, 40, -60, 300],
    'flip': [0, 0, 0, 1, 0, 1],
  }
  names = {
    'rotation': 'theta',
    'down': 'tx',
    'right': 'ty',
    'channel_shift': 'channel_shift_intensity',
    'flip': 'flip_horizontal',
  }
  generator = ImageDataGenerator(fill_mode='nearest', data_format='channels_last', dtype='float64')
  changed = [
    generator.apply_transform(
      image.astype(np.float64), {names[k]: v[i] for k, v in changes.items()}
    )
    for i, image in enumerate(images)
  ]
  np.savez(
    os.path.join(os.path.dirname(__file__), 'keras_golden.npz'),
    images=images,
    changed=np.stack(changed).astype(np.float32),
    **{k: np.asarray(v, np.float64) for k, v in changes.items()},
  )


if __name__ == '__main__':
  main()
