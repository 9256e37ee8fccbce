"""Folders for caches and settings: below the user's home, or elsewhere where there is none."""

import os
import tempfile

from absl import logging


def cache() -> str | None:
  """The user's folder of caches, which may not exist yet; None for a user without a home."""
  return os.environ.get('XDG_CACHE_HOME') or _below_home('.cache')


def settle(instead: str = '') -> str:
  """Gives this process and its children folders of caches and settings that can be written.

  Datasets, Matplotlib and CuPy read these variables when they are imported. A folder that the user
  has set stays as it is if it can be written.

  Args:
    instead: folder to use where the user's cannot be written; where it cannot either, a temporary
      one is used.

  Returns:
    The folder of caches.
  """
  found = cache()
  if found is None or not _can_be_written(found):
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
  return found


def _below_home(name: str) -> str | None:
  home = os.path.expanduser('~')  # stays '~' for a user without an entry in the system's list
  return os.path.join(home, name) if os.path.isdir(home) else None


def _can_be_written(path: str | None) -> bool:
  """Whether files can be written in a folder, which may not exist yet."""
  if path is None:
    return False
  path = os.path.abspath(path)
  while not os.path.lexists(path):
    path = os.path.dirname(path)
  return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def _temporary() -> str:
  """A temporary folder of this user's alone, if possible the same each time."""
  folder = os.path.join(tempfile.gettempdir(), f'kip-{os.getuid()}')
  try:
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.stat(folder, follow_symlinks=False).st_uid == os.getuid():
      return folder
  except FileExistsError:
    pass
  return tempfile.mkdtemp(prefix='kip-')
