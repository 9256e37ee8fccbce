"""A run's folder: its files, written atomically, and the rules for coming back to it."""

import fcntl
import json
import os
import tempfile
from typing import Any, Callable, Mapping

from configs import base

FINISHED, FAILED, STOPPED, RUNNING = 'finished', 'failed', 'stopped', 'running'
EXIT_STATUS = {FINISHED: 0, FAILED: 1, STOPPED: 75}
BAD_INPUT_STATUS = 2


class RunDirectoryError(ValueError):
  """The run directory cannot be used; the message is one line for the user."""


class RunDirectory:
  """Names and rules of the files of one run."""

  def __init__(self, path: str):
    self.path = os.path.abspath(path)
    self.checkpoints = os.path.join(self.path, 'checkpoints')
    self.label_solve = os.path.join(self.path, 'label_solve')
    self.snapshots = os.path.join(self.path, 'snapshots')
    self.config = os.path.join(self.path, 'config.json')
    self.status = os.path.join(self.path, 'status.json')
    self.metrics = os.path.join(self.path, 'metrics.jsonl')
    self.baselines = os.path.join(self.path, 'baselines.json')
    self.distilled = os.path.join(self.path, 'distilled.npz')
    self.picture = os.path.join(self.path, 'images.png')
    self._generation = os.path.join(self.path, 'generation')
    self._lock = None

  def open(self, config: Mapping[str, Any], data_key: str) -> None:
    """Makes the folder, or checks that what it holds is this run; keeps other launches out for as long as this process lives.

    Raises:
      RunDirectoryError: not writable, in use, or another run's.
    """
    try:
      os.makedirs(self.snapshots, exist_ok=True)
      os.makedirs(self.checkpoints, exist_ok=True)
      self._lock = open(os.path.join(self.path, '.lock'), 'w', encoding='utf-8')
    except OSError as error:
      raise RunDirectoryError(f'--workdir={self.path} cannot be written: {error.strerror}.') from error
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise RunDirectoryError(f'--workdir={self.path} is in use by a run that is still going; stop it or choose another.') from error
    saved = self.read_config()
    if saved is not None:
      found = base.differences(saved, config)
      if saved['data_key'] != data_key:
        found.append('the content of the data set')
      if found:
        raise RunDirectoryError(f'--workdir={self.path} holds another run: {"; ".join(found)}. Choose another --workdir.')
    write_atomically(self.config, json_line({**config, 'data_key': data_key}, indent=2))

  def read_config(self) -> dict[str, Any] | None:
    """`run`, `system` and `data_key` of the run that is here, if any."""
    try:
      with open(self.config, encoding='utf-8') as file:
        saved = json.load(file)
      if not isinstance(saved, dict) or not {'run', 'system', 'data_key'} <= set(saved):
        raise ValueError('fields are missing')
      return saved
    except FileNotFoundError:
      return None
    except (OSError, ValueError) as error:
      raise RunDirectoryError(f'{self.config} cannot be read ({error}); restore it, or choose another --workdir.') from error

  def next_generation(self) -> int:
    """Counts the coordinator's lives: 1 for the first."""
    try:
      with open(self._generation, encoding='utf-8') as file:
        generation = int(file.read()) + 1
    except FileNotFoundError:
      generation = 1
    write_atomically(self._generation, str(generation))
    return generation

  def snapshot(self, step: int) -> str:
    return os.path.join(self.snapshots, f'{step:08d}.npz')

  def snapshot_steps(self) -> list[int]:
    return sorted(int(name[:-4]) for name in os.listdir(self.snapshots) if name.endswith('.npz') and name[:-4].isdigit())

  def write_status(self, state: str, **fields: Any) -> None:
    write_atomically(self.status, json_line({'state': state, **fields}, indent=2))

  def read_status(self) -> dict[str, Any] | None:
    try:
      with open(self.status, encoding='utf-8') as file:
        return json.load(file)
    except (OSError, ValueError):
      return None

  def read_metrics(self) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a crash left unfinished is not one."""
    try:
      with open(self.metrics, encoding='utf-8') as file:
        return [json.loads(line) for line in file if line.endswith('\n')]
    except FileNotFoundError:
      return []


def json_line(value: Any, indent: int | None = None) -> str:
  return json.dumps(value, indent=indent) + '\n'


def write_atomically(path: str, content: 'str | Callable[[Any], None]') -> None:
  """Replaces a file by `content`, text or a function that writes to a binary file: readers see the old one or the new one."""
  handle, scratch = tempfile.mkstemp(dir=os.path.dirname(path), prefix='.writing-')
  try:
    with os.fdopen(handle, 'wb') as file:
      if callable(content):
        content(file)
      else:
        file.write(content.encode())
      file.flush()
      os.fsync(file.fileno())
    os.replace(scratch, path)
  except OSError:
    os.unlink(scratch)
    raise
