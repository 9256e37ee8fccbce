"""Checkpoints of a run's state: a folder each, published by one rename.

STEP/state.npz      the arrays, named by their place in the state, no pickles
STEP/meta.json      JSON that goes with them
STEP/digests.json   SHA-256 of these two; without it there is no checkpoint
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from absl import logging

from artifacts import files
from data import NPZ_ERRORS

_KEEP = 3
_STATE, _META, _DIGESTS = _FILES = 'state.npz', 'meta.json', 'digests.json'
_BLOCK = 2**20  # bytes hashed at a time
_DAMAGE = (*NPZ_ERRORS, TypeError)  # what the reading of damaged files raises


class NoGoodCheckpoint(ValueError):
  """There are checkpoints, and all of them are damaged; the message is one line for the user."""


class _Counted(Protocol):
  """A JAX tree of NumPy arrays and whole numbers, one of which counts its steps."""

  @property
  def step(self) -> int: ...


_State = TypeVar('_State', bound=_Counted)


class Checkpoints:
  """Saves and restores states, such as SupportState, in a folder; keeps the newest three."""

  def __init__(self, folder: str):
    self._folder = folder

  def save(self, state: _Counted, meta: dict[str, Any]) -> None:
    """Writes a checkpoint, unless a good one of that step is there.

    Args:
      state: a tree of arrays and whole numbers.
      meta: JSON that `restore` gives back with it.

    Raises:
      OSError: it cannot be written; nothing of it is left.
    """
    path = self._path(state.step)
    with contextlib.suppress(*_DAMAGE):
      _check(path)
      return
    arrays = dict(zip(_names(state), map(np.asarray, jax.tree.leaves(state))))
    scratch = f'{path}.writing'
    state_path, meta_path, digests_path = (os.path.join(scratch, name) for name in _FILES)
    shutil.rmtree(scratch, ignore_errors=True)
    try:
      os.makedirs(scratch)
      files.write_atomically(state_path, lambda file: np.savez(file, **arrays))
      files.write_atomically(meta_path, files.json_line(meta))
      files.write_atomically(digests_path, files.json_line(_digests(scratch)))
      shutil.rmtree(path, ignore_errors=True)
      os.rename(scratch, path)
    finally:
      shutil.rmtree(scratch, ignore_errors=True)
    for step in self._steps()[:-_KEEP]:
      shutil.rmtree(self._path(step))

  def restore(self, template: _State) -> tuple[_State, dict[str, Any]] | None:
    """Reads the newest checkpoint that is not damaged, and logs those it passes over.

    Args:
      template: a state with the same structure, shapes and dtypes.

    Returns:
      The state and its `meta`; None where there are no checkpoints.

    Raises:
      NoGoodCheckpoint: all of them are damaged.
    """
    steps = self._steps()
    for step in reversed(steps):
      try:
        _check(self._path(step))
        return _read(self._path(step), template)
      except _DAMAGE as error:
        logging.warning(
          'The checkpoint of step %d is damaged (%s: %s); an earlier one is used.',
          step,
          type(error).__name__,
          error,
        )
    if steps:
      raise NoGoodCheckpoint(
        f'all checkpoints in {self._folder} are damaged (steps {", ".join(map(str, steps))}): '
        'restore one of them, or delete that folder to start from step 0.'
      )
    return None

  def _path(self, step: int) -> str:
    return os.path.join(self._folder, f'{step:08d}')

  def _steps(self) -> list[int]:
    return sorted(int(name) for name in os.listdir(self._folder) if re.fullmatch(r'\d{8,}', name))


def _check(path: str) -> None:
  """Raises one of _DAMAGE unless the files of a checkpoint are what was written."""
  with open(os.path.join(path, _DIGESTS), encoding='utf-8') as file:
    expected = json.load(file)
  for name, digest in _digests(path).items():
    if expected[name] != digest:
      raise ValueError(f'{name} is altered')


def _read(path: str, template: _State) -> tuple[_State, dict[str, Any]]:
  """The state and `meta` of a checkpoint. Raises one of _DAMAGE where it does not fit."""
  leaves, structure = jax.tree.flatten(template)
  names = _names(template)
  with np.load(os.path.join(path, _STATE), allow_pickle=False) as file:
    if sorted(file.files) != sorted(names):
      raise ValueError(f'arrays {", ".join(file.files)} instead of {", ".join(names)}')
    found = [_like(leaf, file[name]) for name, leaf in zip(names, leaves)]
  with open(os.path.join(path, _META), encoding='utf-8') as file:
    meta = json.load(file)
  return jax.tree.unflatten(structure, found), meta


def _like(leaf: Any, array: np.ndarray) -> Any:
  """`array` as the whole number or array that `leaf` is. Raises ValueError where it is another."""
  if isinstance(leaf, int):
    return int(array)
  if array.dtype.kind == 'V':  # as which NumPy keeps JAX's own dtypes, such as bfloat16
    array = array.view(leaf.dtype)
  if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
    raise ValueError(f'{array.dtype}{array.shape} instead of {leaf.dtype}{leaf.shape}')
  return array


def _names(state: Any) -> list[str]:
  """A name for each leaf, such as 'optimizer/0/mu/images'."""
  places, _ = jax.tree_util.tree_flatten_with_path(state)
  return [jax.tree_util.keystr(place, simple=True, separator='/') for place, _ in places]


def _digests(path: str) -> dict[str, str]:
  """SHA-256 of the files of a checkpoint, by their names. Raises OSError."""
  digests = {}
  for name in (_STATE, _META):
    digest = hashlib.sha256()
    with open(os.path.join(path, name), 'rb') as file:
      while block := file.read(_BLOCK):
        digest.update(block)
    digests[name] = digest.hexdigest()
  return digests
