"""A run's folder: paths, locks, and its small files (configuration, status, metrics)."""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from absl import logging

from artifacts import RunDirectoryError, files
from configs import schema, validation
from data import store

# States in status.json. A run that is SUBMITTED waits for a scheduler to start it.
FINISHED, FAILED, STOPPED, SUBMITTED = 'finished', 'failed', 'stopped', 'submitted'
STARTING, RUNNING, EVALUATING = LIVE = 'starting', 'running', 'evaluating'

HANDOVER = 20.0  # seconds that a coordinator waits for its predecessor to end
# Seconds to wait for a process that holds the lock only to look for a launch, or to submit one.
_LOOK = 3.0


class Saved(NamedTuple):
  """The content of config.json.

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
    """Undoes `to_dict`; ignores further values, fields of `system` that other versions have among
    them. Raises KeyError, TypeError, ValueError."""
    known = {field.name for field in dataclasses.fields(schema.System)}
    system = {name: value for name, value in dict(values['system']).items() if name in known}
    config = {'run': values['run'], 'system': system}
    return cls(schema.from_dict(schema.Config, config), store.check_key(values['data_key']))


class RunDirectory:
  """Paths of a run's files, access to the small ones, and the locks.

  Attributes:
    path: of the directory, absolute; the others are paths of files and folders in it.
    picture: of the support images.
    address, secret: the coordinator's and the run's key, of a run on several hosts.
  """

  def __init__(self, path: str):
    self.path = os.path.abspath(path)
    inside = functools.partial(os.path.join, self.path)
    self.checkpoints, self.label_solve = inside('checkpoints'), inside('label_solve')
    self.snapshots, self.tensorboard = inside('snapshots'), inside('tensorboard')
    self.config, self.status = inside('config.json'), inside('status.json')
    self.metrics, self.baselines = inside('metrics.jsonl'), inside('baselines.json')
    self.distilled, self.picture = inside('distilled.npz'), inside('images.png')
    self.report, self.address = inside('report.html'), inside('address')
    self.secret = inside('secret')
    self.generation, self._command = inside('generation'), inside('command.txt')
    self._lock: BinaryIO | None = None
    self._earlier_generation = 0  # of the last coordinator before `begin`

  def open(self, config: schema.Config, data_key: str) -> None:
    """Makes the folder, or checks that it holds this run, and writes config.json.

    Other launches are kept out until `close`, or until this process ends.

    Raises:
      RunDirectoryError: not writable, in use, another run's, or past the wanted number of steps.
    """
    try:
      with _writing(f'--workdir={self.path}'):
        os.makedirs(self.snapshots, exist_ok=True)
        os.makedirs(self.checkpoints, exist_ok=True)
        self._lock = _locked(os.path.join(self.path, '.lock'), _LOOK)
    except BlockingIOError as error:
      raise RunDirectoryError(
        f'--workdir={self.path} is in use by a run that is still going; stop it or choose another.'
      ) from error
    with contextlib.ExitStack() as unless_opened:
      unless_opened.callback(self.close)
      with self.claim():
        files.sweep(self.path)
        files.sweep(self.tensorboard)
        self._check_same_run(config, data_key)
        saved = Saved(config, data_key).to_dict()
        files.write_atomically(self.config, files.json_line(saved, indent=2))
      unless_opened.pop_all()

  def close(self) -> None:
    """Lets other launches open it."""
    if self._lock is not None:
      self._lock.close()

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

  def claim(self, handover: float = HANDOVER) -> BinaryIO:
    """Keeps other coordinators from writing here until the result is closed.

    Args:
      handover: seconds to wait for one that is about to end.

    Raises:
      RunDirectoryError: the other one does not end, or the folder cannot be written.
    """
    try:
      with _writing(self.path):
        claim = _locked(os.path.join(self.path, '.coordinator'), handover)
    except BlockingIOError as error:
      raise RunDirectoryError(
        f'{self.path} has another coordinator that is still going; stop it first.'
      ) from error
    files.sweep(self.snapshots)
    return claim

  def _check_same_run(self, config: schema.Config, data_key: str) -> None:
    """Raises RunDirectoryError unless the run here, if any, is this one, and may end this early."""
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

  def begin(self, state: str = STARTING) -> None:
    """Makes status.json that of the launch for which this process has opened the directory."""
    self._earlier_generation = self._read_generation()
    self.write_status(
      state, step=self.checkpoint_step() or 0, num_steps=self.read_saved().config.run.num_steps
    )

  def read_saved(self) -> Saved:
    """config.json. Raises RunDirectoryError where it is missing or cannot be read."""
    saved = self.read_config()
    if saved is None:
      raise RunDirectoryError(f'{self.config} is missing; start the run by launch.py.')
    return saved

  def read_config(self) -> Saved | None:
    """config.json; None where there is none. Raises RunDirectoryError where it cannot be read."""
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

  def next_generation(self) -> int:
    """Counts the coordinator's lives, 1 for the first; the caller holds the claim.

    Raises RunDirectoryError.
    """
    generation = self._read_generation() + 1
    with _writing(self.path):
      files.write_atomically(self.generation, str(generation))
    return generation

  def _read_generation(self) -> int:
    """Lives of the coordinator so far. Raises RunDirectoryError."""
    try:
      with open(self.generation, encoding='utf-8') as file:
        return int(file.read())
    except FileNotFoundError:
      return 0
    except ValueError:
      return int(time.time())  # what matters is that no earlier life had it
    except OSError as error:
      raise RunDirectoryError(f'{self.generation} cannot be read ({error.strerror}).') from error

  def snapshot(self, step: int) -> str:
    """Path of the snapshot of a step: see snapshots.py."""
    return os.path.join(self.snapshots, f'{step:08d}.npz')

  def checkpoint(self, step: int) -> str:
    """Path of the checkpoint of a step: see checkpoints.py."""
    return os.path.join(self.checkpoints, f'{step:08d}')

  def checkpoint_step(self) -> int | None:
    """The step of the newest checkpoint, good or not; None where there is none."""
    names = os.listdir(self.checkpoints) if os.path.isdir(self.checkpoints) else []
    return max((int(name) for name in names if name.isdigit()), default=None)

  def write_status(self, state: str, **fields: Any) -> None:
    """Writes status.json, with the time. Best effort: write errors are logged, not raised."""
    updated = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
    try:
      content = files.json_line({**fields, 'state': state, 'updated': updated}, indent=2)
      files.write_atomically(self.status, content)
    except OSError as error:
      logging.warning('%s cannot be written: %s.', self.status, error.strerror)

  def read_status(self) -> dict[str, Any] | None:
    """status.json; None where it is missing or damaged.

    It always has `state`, `step`, `num_steps`, `generation` (0: no coordinator yet),
    `wall_seconds`, `workers` and `updated`.
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
    """Whether `status` is the last one of a coordinator that was started after `begin`."""
    return status['state'] not in LIVE and status['generation'] > self._earlier_generation

  def write_command(self, argv: list[str]) -> None:
    """Keeps the command that started or resumed this run last. Raises RunDirectoryError."""
    with _writing(self.path):
      files.write_atomically(self._command, shlex.join(argv) + '\n')

  def read_command(self) -> str | None:
    """The command that started or resumed this run last; None where it is not recorded."""
    try:
      with open(self._command, encoding='utf-8') as file:
        return file.read().strip()
    except OSError:
      return None

  def read_baselines(self) -> list[dict[str, Any]] | None:
    """Rows of baselines.json; None where it is missing or damaged."""
    try:
      with open(self.baselines, encoding='utf-8') as file:
        rows = json.load(file)
    except (OSError, ValueError):
      return None
    whole = isinstance(rows, list) and all(isinstance(row, dict) and 'kind' in row for row in rows)
    return rows if whole else None

  def read_metrics(self) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, without lines that are damaged or that a crash left unfinished."""
    try:
      with open(self.metrics, 'rb') as file:
        return _rows(file.read())
    except FileNotFoundError:
      return []

  def append_metrics(self, row: dict[str, Any]) -> None:
    """Adds a row to metrics.jsonl unless one of its step is there. Raises OSError.

    Removes damaged lines.
    """
    with open(self.metrics, 'a+b') as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      file.seek(0)
      content = file.read()
      rows = _rows(content)
      if row['step'] not in [other['step'] for other in rows]:
        rows.append(row)
      wanted = ''.join(map(files.json_line, rows)).encode()
      if wanted.startswith(content):
        file.write(wanted[len(content) :])
        file.flush()
        os.fsync(file.fileno())
      else:  # there are damaged lines
        files.write_atomically(self.metrics, wanted.decode())


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
  """Raises RunDirectoryError for an OSError inside, but for a lock that another process has."""
  try:
    yield
  except BlockingIOError:
    raise
  except OSError as error:
    raise RunDirectoryError(f'{what} cannot be written: {error.strerror}.') from error


def _locked(path: str, seconds: float) -> BinaryIO:
  """Opens a file and locks it until it is closed.

  Raises BlockingIOError where another process keeps the lock for `seconds`, and OSError.
  """
  end = time.monotonic() + seconds
  file = open(path, 'ab')  # noqa: SIM115 (closing it unlocks it)
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
  """`host:port` in a file such as `RunDirectory.address`; None where there is none yet."""
  try:
    with open(path, encoding='utf-8') as file:
      return file.read().strip()
  except FileNotFoundError:
    return None


def _rows(content: bytes) -> list[dict[str, Any]]:
  """Rows of metrics.jsonl, one a step, from its whole lines."""
  rows = {}
  for line in content.splitlines(keepends=True):
    try:
      row = json.loads(line) if line.endswith(b'\n') else None
    except ValueError:
      row = None
    if isinstance(row, dict) and isinstance(row.get('step'), int):
      rows.setdefault(row['step'], row)
  return list(rows.values())
