"""A run's folder: its files, written atomically, and the rules for coming back to it."""

import contextlib
import fcntl
import json
import os
import shlex
import threading
import time
from typing import Any, Callable, Mapping
import uuid

from absl import logging

from configs import base

FINISHED, FAILED, STOPPED, RUNNING = 'finished', 'failed', 'stopped', 'running'
EXIT_STATUS = {FINISHED: 0, FAILED: 1, STOPPED: 75}
BAD_INPUT_STATUS = 2
_SCRATCH = '.writing-'
_HANDOVER = 20.0  # seconds that a coordinator's predecessor may take to go
DISK_PATIENCE, DISK_PAUSE = 60.0, 5.0  # seconds that `persist` tries, and waits between two tries


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
    self.tensorboard = os.path.join(self.path, 'tensorboard')
    self.report = os.path.join(self.path, 'report.html')
    self._command = os.path.join(self.path, 'command.txt')
    self.address = os.path.join(self.path, 'address')  # of the coordinator of a run on several hosts
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
    _sweep(self.path)
    _sweep(self.tensorboard)
    saved = self.read_config()
    if saved is not None:
      found = base.differences(saved, config)
      if saved['data_key'] != data_key:
        found.append('the content of the data set')
      if found:
        raise RunDirectoryError(f'--workdir={self.path} holds another run: {"; ".join(found)}. Choose another --workdir.')
    write_atomically(self.config, json_line({**config, 'data_key': data_key}, indent=2))

  def close(self) -> None:
    """Lets another launch have it."""
    self._lock.close()

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

  def is_in_use(self) -> bool:
    """Whether a launch has this directory open."""
    try:
      with open(os.path.join(self.path, '.lock'), encoding='utf-8') as file:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
    except OSError:
      pass
    return False

  @contextlib.contextmanager
  def claimed(self):
    """Inside, no other coordinator writes here; waits for one that is about to end. Raises RunDirectoryError."""
    with open(os.path.join(self.path, '.coordinator'), 'w', encoding='utf-8') as file:
      end = time.monotonic() + _HANDOVER
      while True:
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
          break
        except BlockingIOError as error:
          if time.monotonic() > end:
            raise RunDirectoryError(f'{self.path} has another coordinator that is still going; stop it first.') from error
        time.sleep(0.1)
      _sweep(self.snapshots)
      yield

  def next_generation(self) -> int:
    """Counts the coordinator's lives: 1 for the first. Raises RunDirectoryError."""
    try:
      with open(self._generation, encoding='utf-8') as file:
        generation = int(file.read()) + 1
    except FileNotFoundError:
      generation = 1
    except ValueError:
      generation = int(time.time())  # what matters is that no earlier life had it
    except OSError as error:
      raise RunDirectoryError(f'{self._generation} cannot be read ({error.strerror}).') from error
    try:
      write_atomically(self._generation, str(generation))
    except OSError as error:
      raise RunDirectoryError(f'{self.path} cannot be written ({error.strerror}).') from error
    return generation

  def snapshot(self, step: int) -> str:
    return os.path.join(self.snapshots, f'{step:08d}.npz')

  def snapshot_steps(self) -> list[int]:
    return sorted(int(name[:-4]) for name in os.listdir(self.snapshots) if name.endswith('.npz') and name[:-4].isdigit())

  def write_status(self, state: str, **fields: Any) -> None:
    """Says how the run is. What it is about must not fail for want of saying so: an error is only logged."""
    try:
      write_atomically(self.status, json_line({'state': state, **fields}, indent=2))
    except OSError as error:
      logging.warning('%s cannot be written: %s.', self.status, error.strerror)

  def read_status(self) -> dict[str, Any] | None:
    """What `write_status` wrote last; None where it cannot be read."""
    try:
      with open(self.status, encoding='utf-8') as file:
        status = json.load(file)
    except (OSError, ValueError):
      return None
    return status if isinstance(status, dict) else None

  def write_command(self, argv: list[str]) -> None:
    """Keeps the command that started this run, or went on with it, last. Raises RunDirectoryError."""
    try:
      write_atomically(self._command, shlex.join(argv) + '\n')
    except OSError as error:
      raise RunDirectoryError(f'{self.path} cannot be written ({error.strerror}).') from error

  def read_command(self) -> str | None:
    """What `write_command` wrote last, if anything."""
    try:
      with open(self._command, encoding='utf-8') as file:
        return file.read().strip()
    except OSError:
      return None

  def read_baselines(self) -> list[dict[str, Any]] | None:
    """The rows of baselines.json; None where it is missing or damaged."""
    try:
      with open(self.baselines, encoding='utf-8') as file:
        rows = json.load(file)
    except (OSError, ValueError):
      return None
    whole = isinstance(rows, list) and all(isinstance(row, dict) and 'kind' in row for row in rows)
    return rows if whole else None

  def read_metrics(self) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a line that a crash left unfinished, or that is damaged, is none."""
    try:
      with open(self.metrics, 'rb') as file:
        return _rows(file.read())
    except FileNotFoundError:
      return []

  def append_metrics(self, row: dict[str, Any]) -> None:
    """Adds a row to metrics.jsonl unless one of its step is there, and removes what is no row. Raises OSError."""
    with open(self.metrics, 'a+b') as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      file.seek(0)
      content = file.read()
      rows = _rows(content)
      if row['step'] not in [other['step'] for other in rows]:
        rows.append(row)
      wanted = ''.join(map(json_line, rows)).encode()
      if wanted.startswith(content):
        file.write(wanted[len(content):])
        file.flush()
        os.fsync(file.fileno())
      else:  # what is no row makes way
        write_atomically(self.metrics, wanted.decode())


def read_address(path: str) -> str | None:
  """`host:port` in a file that `RunDirectory.address` names; None where there is none yet."""
  try:
    with open(path, encoding='utf-8') as file:
      return file.read().strip()
  except FileNotFoundError:
    return None


def json_line(value: Any, indent: int | None = None) -> str:
  return json.dumps(value, indent=indent) + '\n'


def _rows(content: bytes) -> list[dict[str, Any]]:
  rows = {}
  for line in content.splitlines(keepends=True):
    try:
      row = json.loads(line) if line.endswith(b'\n') else None
    except ValueError:
      row = None
    if isinstance(row, dict) and isinstance(row.get('step'), int):
      rows.setdefault(row['step'], row)
  return list(rows.values())


def _sweep(folder: str) -> None:
  """Removes what writers left behind that were killed."""
  for name in os.listdir(folder) if os.path.isdir(folder) else ():
    if name.startswith(_SCRATCH):
      os.unlink(os.path.join(folder, name))


def persist(what: str, write: Callable[[], None], stop: threading.Event) -> None:
  """Calls `write`; where that fails, again for a minute: a full disk may be emptied.

  Args:
    what: what is written, for messages.
    write: may be called several times.
    stop: when it is set, the next failure is the last.

  Raises:
    RunDirectoryError: it could not be written, with the reason.
  """
  end = time.monotonic() + DISK_PATIENCE
  while True:
    try:
      write()
      return
    except OSError as error:
      reason, left = error.strerror or error, end - time.monotonic()
      if left <= 0 or stop.is_set():
        raise RunDirectoryError(f'{what} cannot be written ({reason}).') from error
      logging.warning('%s cannot be written (%s); trying again for %.0f s.', what, reason, left)
    pause = time.monotonic() + DISK_PAUSE
    while time.monotonic() < pause and not stop.is_set():
      time.sleep(0.05)  # Event.wait can deadlock with a signal handler that sets the event


def write_atomically(path: str, content: 'str | Callable[[Any], None]') -> None:
  """Replaces a file by `content`, text or a function that writes to a binary file: readers see the old one or the new one."""
  # Not tempfile's, which none but the owner may read.
  scratch = os.path.join(os.path.dirname(path), f'{_SCRATCH}{uuid.uuid4().hex}')
  with open(scratch, 'xb') as file, contextlib.ExitStack() as unless_replaced:
    unless_replaced.callback(os.unlink, scratch)
    if callable(content):
      content(file)
    else:
      file.write(content.encode())
    file.flush()
    os.fsync(file.fileno())
    os.replace(scratch, path)
    unless_replaced.pop_all()
