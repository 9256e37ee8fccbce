"""The support state on disk: orbax for the arrays, SHA-256 digests of every file written last, one
rename to publish.

Orbax restores a flipped bit without a word; so a checkpoint without valid digests does not exist.
"""

import hashlib
import json
import os
import re
import shutil
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from absl import logging

import kernels.precision  # noqa: F401
from artifacts import run_directory
from distillation.state import SupportState

_KEEP = 3
_DIGESTS = 'digests.json'


class NoGoodCheckpoint(ValueError):
  """There are checkpoints, and all of them are damaged; the message is one line for the user."""


class Checkpoints:
  """Saves and restores SupportStates in a folder; keeps the newest few."""

  def __init__(self, folder: str):
    self._folder = folder
    self._orbax = ocp.Checkpointer(ocp.StandardCheckpointHandler())

  def save(self, state: SupportState, meta: dict[str, Any]) -> None:
    """Writes a checkpoint, unless a good one of that step is there. `meta` is JSON beside the
    arrays. Raises OSError."""
    path = os.path.join(self._folder, f'{state.step:08d}')
    if os.path.exists(path) and self._damage(path) is None:
      return
    scratch = path + '.writing'
    shutil.rmtree(scratch, ignore_errors=True)
    try:
      os.makedirs(scratch)
      self._orbax.save(os.path.join(scratch, 'state'), args=ocp.args.StandardSave(_tree(state)))
      run_directory.write_atomically(
        os.path.join(scratch, 'meta.json'), run_directory.json_line(meta)
      )
      run_directory.write_atomically(
        os.path.join(scratch, _DIGESTS), run_directory.json_line(_digests(scratch))
      )
      shutil.rmtree(path, ignore_errors=True)
      os.rename(scratch, path)
    except ValueError as error:  # as which orbax reports a disk that is full or gone
      raise OSError(' '.join(str(error).split())[:200]) from error
    finally:
      shutil.rmtree(scratch, ignore_errors=True)
    for step in self._steps()[:-_KEEP]:
      shutil.rmtree(os.path.join(self._folder, f'{step:08d}'))

  def restore(self, template: SupportState) -> tuple[SupportState, dict[str, Any]] | None:
    """The newest good checkpoint and its `meta`; None where there never was one. Says which ones it
    passes over, and why.

    Raises:
      NoGoodCheckpoint: there were, but no good one is left.
    """
    steps = self._steps()
    for step in reversed(steps):
      path = os.path.join(self._folder, f'{step:08d}')
      damage = self._damage(path)
      if damage is not None:
        logging.warning(
          'The checkpoint of step %d is damaged (%s); an earlier one is used.', step, damage
        )
        continue
      tree = self._orbax.restore(
        os.path.join(path, 'state'), args=ocp.args.StandardRestore(_tree(template))
      )
      with open(os.path.join(path, 'meta.json'), encoding='utf-8') as file:
        meta = json.load(file)
      return SupportState(
        int(tree['step']), *(tree[name] for name in ('images', 'labels', 'optimizer'))
      ), meta
    if steps:
      raise NoGoodCheckpoint(
        f'all checkpoints in {self._folder} are damaged (steps {", ".join(map(str, steps))}): restore one of them, '
        'or delete that folder to start from step 0.'
      )
    return None

  def _steps(self) -> list[int]:
    return sorted(int(name) for name in os.listdir(self._folder) if re.fullmatch(r'\d{8,}', name))

  def _damage(self, path: str) -> str | None:
    try:
      with open(os.path.join(path, _DIGESTS), encoding='utf-8') as file:
        expected = json.load(file)
      found = _digests(path)
    except (OSError, ValueError) as error:
      return f'{type(error).__name__}: {error}'
    wrong = sorted(
      name for name in set(expected) | set(found) if expected.get(name) != found.get(name)
    )
    return f'{wrong[0]} is missing or altered' if wrong else None


def _tree(state: SupportState) -> dict[str, Any]:
  return {**state._asdict(), 'step': np.asarray(state.step, np.int64)}


def _digests(path: str) -> dict[str, str]:
  digests = {}
  for folder, _, names in os.walk(path):
    for name in names:
      file_path = os.path.join(folder, name)
      relative = os.path.relpath(file_path, path)
      if relative != _DIGESTS:
        with open(file_path, 'rb') as file:
          digests[relative] = hashlib.sha256(file.read()).hexdigest()
  return digests
