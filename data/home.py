"""Where libraries keep things of their own: below the user's home, or elsewhere if need be."""

import os
import tempfile

from absl import logging


def cache() -> str | None:
  """The user's folder of caches, made or not; None for a user without a home."""
  return os.environ.get('XDG_CACHE_HOME') or _below_home('.cache')


def settle(instead: str = '') -> None:
  """Gives this process and its children folders of caches and of settings that can be written.

  Datasets, Matplotlib and CuPy read these variables when they are imported. What the user has set
  and can be used stays as it is.

  Args:
    instead: where to put them where the user's cannot be written; without it, or where that cannot
      be written either, in a temporary folder.
  """
  found = cache()
  if not _can_be_written(found):
    folder = os.path.abspath(instead) if instead and _can_be_written(instead) else _temporary()
    logging.warning(
      '%s: data and caches are kept in %s.',
      f'{found} cannot be written' if found else 'This user has no home',
      folder,
    )
    os.environ['XDG_CACHE_HOME'] = found = folder
  settings = os.environ.get('XDG_CONFIG_HOME') or _below_home('.config')
  for variable, usual, name in (
    ('MPLCONFIGDIR', settings, 'matplotlib'),
    ('CUPY_CACHE_DIR', _below_home('.cupy'), 'cupy'),
  ):
    if variable not in os.environ and not _can_be_written(usual):
      os.environ[variable] = os.path.join(found, name)


def _below_home(name: str) -> str | None:
  home = os.path.expanduser('~')  # stays as it is for a user that nobody knows
  return os.path.join(home, name) if os.path.isdir(home) else None


def _can_be_written(path: str | None) -> bool:
  """Whether files can be written there, once the folder is made."""
  if path is None:
    return False
  path = os.path.abspath(path)
  while not os.path.lexists(path):
    path = os.path.dirname(path)
  return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def _temporary() -> str:
  """The same folder each time, and nobody else's."""
  folder = os.path.join(tempfile.gettempdir(), f'kip-{os.getuid()}')
  try:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder, follow_symlinks=False).st_uid == os.getuid():
      return folder
  except FileExistsError:
    pass
  return tempfile.mkdtemp(prefix='kip-')
