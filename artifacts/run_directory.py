"""A run's folder: its files, written atomically, and the rules for coming back to it."""

import contextlib
import datetime
import fcntl
import json
import os
import shlex
import threading
import time
import uuid
from typing import Any, BinaryIO, Callable, Mapping, NamedTuple

from absl import logging

from configs import schema, validation

FINISHED, FAILED, STOPPED = 'finished', 'failed', 'stopped'
SUBMITTED = 'submitted'  # to a scheduler, which has not started it yet
STARTING, RUNNING, EVALUATING = LIVE = 'starting', 'running', 'evaluating'
EXIT_STATUS = {FINISHED: 0, FAILED: 1, STOPPED: 75}
BAD_INPUT_STATUS = 2
_SCRATCH = '.writing-'
_HANDOVER = 20.0  # seconds that a coordinator's predecessor may take to go
# Seconds within which a process that only looks for a launch, or submits one, is gone again.
_LOOK = 3.0
DISK_PATIENCE, DISK_PAUSE = 60.0, 5.0  # seconds that `persist` tries, and waits between two tries


class RunDirectoryError(ValueError):
  """The run directory cannot be used; the message is one line for the user."""


class Saved(NamedTuple):
  """What config.json holds.

  Attributes:
    config: of the run.
    data_key: of its prepared data, see `store.Prepared`.
  """

  config: schema.Config
  data_key: str

  def to_dict(self) -> dict[str, Any]:
    return {**self.config.to_dict(), 'data_key': self.data_key}

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'Saved':
    """Of what `to_dict` gives, and more. Raises KeyError, TypeError, ValueError."""
    config = {name: values[name] for name in ('run', 'system')}
    return cls(schema.from_dict(schema.Config, config), values['data_key'])


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
    # Of the coordinator of a run on several hosts.
    self.address = os.path.join(self.path, 'address')
    self._generation = os.path.join(self.path, 'generation')
    self._lock = None
    self._earlier_generation = 0  # of the last coordinator before `begin`

  def open(self, config: schema.Config, data_key: str) -> None:
    """Makes the folder, or checks that what it holds is this run; keeps other launches out for as
    long as this process lives.

    Raises:
      RunDirectoryError: not writable, in use, another run's, or past the wanted number of steps.
    """
    try:
      os.makedirs(self.snapshots, exist_ok=True)
      os.makedirs(self.checkpoints, exist_ok=True)
      self._lock = _locked(os.path.join(self.path, '.lock'), _LOOK)
    except BlockingIOError as error:
      raise RunDirectoryError(
        f'--workdir={self.path} is in use by a run that is still going; stop it or choose another.'
      ) from error
    except OSError as error:
      raise RunDirectoryError(
        f'--workdir={self.path} cannot be written: {error.strerror}.'
      ) from error
    with contextlib.ExitStack() as unless_opened:
      unless_opened.callback(self.close)
      with self.claim():
        _sweep(self.path)
        _sweep(self.tensorboard)
        self._check_same_run(config, data_key)
        saved = Saved(config, data_key)
        write_atomically(self.config, json_line(saved.to_dict(), indent=2))
      unless_opened.pop_all()

  def begin(self, state: str = STARTING) -> None:
    """Makes status.json tell of the launch for which this process opened the directory."""
    self._earlier_generation = self._read_generation()
    self.write_status(
      state, step=self.checkpoint_step() or 0, num_steps=self.read_saved().config.run.num_steps
    )

  def _check_same_run(self, config: schema.Config, data_key: str) -> None:
    saved, reached = self.read_config(), self.checkpoint_step()
    if saved is None:
      return
    found = validation.differences(saved.config.run, config.run)
    if saved.data_key != data_key:
      found.append('the content of the data set')
    if found:
      raise RunDirectoryError(
        f'--workdir={self.path} holds another run: {"; ".join(found)}. Choose another --workdir.'
      )
    if reached is not None and config.run.num_steps < reached:
      raise RunDirectoryError(
        f'--workdir={self.path} has come to step {reached}: run.num_steps must be {reached} or '
        f'more, got {config.run.num_steps}; or choose another --workdir.'
      )

  def close(self) -> None:
    """Lets another launch have it."""
    self._lock.close()

  def read_saved(self) -> Saved:
    """The run that is here. Raises RunDirectoryError where there is none."""
    saved = self.read_config()
    if saved is None:
      raise RunDirectoryError(f'{self.config} is missing; start the run by launch.py.')
    return saved

  def read_config(self) -> Saved | None:
    """The run that is here, if any. Raises RunDirectoryError where it cannot be read."""
    try:
      with open(self.config, encoding='utf-8') as file:
        saved = json.load(file)
      return Saved.from_dict(saved)
    except FileNotFoundError:
      return None
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise RunDirectoryError(
        f'{self.config} cannot be read ({error}); restore it, or choose another --workdir.'
      ) from error

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

  def claim(self) -> BinaryIO:
    """Keeps other coordinators from writing here until the result is closed.

    Waits for one that is about to end.

    Raises:
      RunDirectoryError: the other one does not end, or the folder cannot be written.
    """
    try:
      claim = _locked(os.path.join(self.path, '.coordinator'), _HANDOVER)
    except BlockingIOError as error:
      raise RunDirectoryError(
        f'{self.path} has another coordinator that is still going; stop it first.'
      ) from error
    except OSError as error:
      raise RunDirectoryError(f'{self.path} cannot be written ({error.strerror}).') from error
    _sweep(self.snapshots)
    return claim

  def _read_generation(self) -> int:
    """The coordinator's lives so far. Raises RunDirectoryError."""
    try:
      with open(self._generation, encoding='utf-8') as file:
        return int(file.read())
    except FileNotFoundError:
      return 0
    except ValueError:
      return int(time.time())  # what matters is that no earlier life had it
    except OSError as error:
      raise RunDirectoryError(f'{self._generation} cannot be read ({error.strerror}).') from error

  def next_generation(self) -> int:
    """Counts the coordinator's lives, 1 for the first; the caller holds the claim.

    Raises RunDirectoryError.
    """
    generation = self._read_generation() + 1
    try:
      write_atomically(self._generation, str(generation))
    except OSError as error:
      raise RunDirectoryError(f'{self.path} cannot be written ({error.strerror}).') from error
    return generation

  def snapshot(self, step: int) -> str:
    return os.path.join(self.snapshots, f'{step:08d}.npz')

  def snapshot_steps(self) -> list[int]:
    return sorted(
      int(name[:-4])
      for name in os.listdir(self.snapshots)
      if name.endswith('.npz') and name[:-4].isdigit()
    )

  def checkpoint(self, step: int) -> str:
    return os.path.join(self.checkpoints, f'{step:08d}')

  def checkpoint_step(self) -> int | None:
    """The step of the newest checkpoint, good or not; None where there is none."""
    names = os.listdir(self.checkpoints) if os.path.isdir(self.checkpoints) else []
    return max((int(name) for name in names if name.isdigit()), default=None)

  def write_status(self, state: str, **fields: Any) -> None:
    """Records how the run is, and when. Best effort: write errors are logged, not raised."""
    updated = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
    try:
      content = json_line({**fields, 'state': state, 'updated': updated}, indent=2)
      write_atomically(self.status, content)
    except OSError as error:
      logging.warning('%s cannot be written: %s.', self.status, error.strerror)

  def read_status(self) -> dict[str, Any] | None:
    """What `write_status` wrote last; None where it cannot be read.

    `step`, `num_steps`, `generation` (0: no coordinator yet), `wall_seconds`, `workers` and
    `updated` are there whatever was written.
    """
    try:
      with open(self.status, encoding='utf-8') as file:
        status = json.load(file)
      if not isinstance(status['state'], str):
        return None
    except (OSError, ValueError, KeyError, TypeError):
      return None
    return {
      'step': 0,
      'num_steps': 0,
      'generation': 0,
      'wall_seconds': 0.0,
      'workers': {},
      'updated': 'unknown',
      **status,
    }

  def has_ended(self, status: Mapping[str, Any]) -> bool:
    """Whether `status` is the last word of a coordinator that was started after `begin`."""
    return status['state'] not in LIVE and status['generation'] > self._earlier_generation

  def write_command(self, argv: list[str]) -> None:
    """Keeps the command that started this run, or went on with it, last. Raises
    RunDirectoryError."""
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
    """The rows of metrics.jsonl; a line that a crash left unfinished, or that is damaged, is
    none."""
    try:
      with open(self.metrics, 'rb') as file:
        return _rows(file.read())
    except FileNotFoundError:
      return []

  def append_metrics(self, row: dict[str, Any]) -> None:
    """Adds a row to metrics.jsonl unless one of its step is there, and removes what is no row.
    Raises OSError."""
    with open(self.metrics, 'a+b') as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      file.seek(0)
      content = file.read()
      rows = _rows(content)
      if row['step'] not in [other['step'] for other in rows]:
        rows.append(row)
      wanted = ''.join(map(json_line, rows)).encode()
      if wanted.startswith(content):
        file.write(wanted[len(content) :])
        file.flush()
        os.fsync(file.fileno())
      else:  # what is no row makes way
        write_atomically(self.metrics, wanted.decode())


def _locked(path: str, seconds: float) -> BinaryIO:
  """Opens a file and locks it until it is closed.

  Raises BlockingIOError where another process keeps the lock for `seconds`, and OSError.
  """
  end = time.monotonic() + seconds
  file = open(path, 'ab')
  while True:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return file
    except OSError as error:
      if not isinstance(error, BlockingIOError) or time.monotonic() > end:
        file.close()
        raise
    time.sleep(0.05)


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
  """Replaces a file by `content`, text or a function that writes to a binary file: readers see the
  old one or the new one."""
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
