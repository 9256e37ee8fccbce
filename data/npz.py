"""Reading of .npz files that may be damaged, or something else altogether."""

from collections.abc import Sequence

import numpy as np
from numpy.lib.npyio import NpzFile

from data import NPZ_ERRORS, DataError, one_line


def read(path: str, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
  """Reads arrays of an .npz file.

  Args:
    path: of the file.
    names: arrays that it must hold.
    optional: arrays to read as well where it holds them.

  Raises:
    DataError: it cannot be read, holds pickled objects, or lacks one of `names`.
  """
  try:
    # Not numpy.load, which takes other kinds of files too.
    with open(path, 'rb') as stream, NpzFile(stream) as file:  # pyright: ignore[reportArgumentType]
      missing = [name for name in names if name not in file]
      if missing:
        found = ', '.join(' '.join(name.split()) for name in file) or 'nothing'
        raise DataError(
          f'{path!r}: array {missing[0]!r} is missing; expected {", ".join(names)}, got {found}.'
        )
      return {name: file[name] for name in (*names, *optional) if name in file}
  except DataError:
    raise
  except NPZ_ERRORS as error:
    remedy = ' (save text by .astype(str))' if 'Object arrays' in str(error) else ''
    raise DataError(
      f'{path!r} is not a readable .npz file without pickled objects{remedy}: {one_line(error)}'
    ) from error
