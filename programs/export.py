"""Writes a distilled set as PNG files or as a Hugging Face dataset.

    python -m programs.export DIR/distilled.npz --to=FOLDER --format=images

makes FOLDER/CLASS/FILE.png (raw pixel values, rounded to 8 bits) and labels.csv; --format=dataset
a Hugging Face dataset folder: `datasets.load_dataset(FOLDER)` gives `image` (the same PNG), `label`
(a ClassLabel, by name), and exact `pixels` [H, W, D] and `soft_label` [C].

Instead of DIR/distilled.npz, give the name of a set that the papers' authors released
(data/released.py): it is fetched, as is the data set it was distilled from, unless --config=FILE
--config.run.data.dir=FOLDER says where that is.

Exit status: 0 done, 2 bad input or a folder that cannot be written.
"""

import os
from collections.abc import Sequence

from absl import flags

from artifacts import distilled_set, export
from configs import base
from data import released, store
from programs import command_line

_WRITERS = {'images': export.write_images, 'dataset': export.write_dataset}
_USAGE = f'DIR/distilled.npz --to=FOLDER --format={"|".join(_WRITERS)}'

_TO = flags.DEFINE_string('to', None, 'Folder to write to; it must be empty or not there.')
_FORMAT = flags.DEFINE_string(
  'format',
  'images',
  'images: FOLDER/CLASS/FILE.png and labels.csv; dataset: a Hugging Face dataset folder.',
)


def main(argv: Sequence[str]) -> int:
  """Writes a distilled set in another format; returns the exit status."""
  paths = [argument for argument in argv[1:] if not argument.startswith('-')]
  command_line.parse([argument for argument in argv if argument not in paths[:1]], _USAGE)
  folder, wanted = _TO.value, _FORMAT.value
  if len(paths) != 1 or not folder:
    raise command_line.BadInput(f'expected {_USAGE}.')
  if wanted not in _WRITERS:
    raise command_line.BadInput(f'--format must be one of {", ".join(_WRITERS)}; got {wanted!r}.')
  if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
    raise command_line.BadInput(f'--to={folder} is there and not an empty folder; choose another.')
  config = command_line.CONFIG.value or base.get_config()
  cache = store.cache_folder(config.system.cache_dir)
  try:
    if released.is_name(paths[0]):
      distilled = distilled_set.load_released(paths[0], cache, config.run.data.dir)
    else:
      distilled = distilled_set.load(paths[0])
    _WRITERS[wanted](distilled, folder)
  except OSError as error:
    raise command_line.BadInput(str(error)) from error
  print(f'{len(distilled.images)} images in {folder}')
  return 0


if __name__ == '__main__':
  command_line.exit_with(main)
