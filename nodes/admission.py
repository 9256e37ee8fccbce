"""Admits clients to a run, and knows their hardware, their speed and when each was last heard."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from absl import logging

from configs import schema

EVALUATOR = 'evaluator'
# Limits of what clients may say, so that none can fill the memory.
_MAX_CLIENTS = 10_000
_MAX_NAME, _MAX_MESSAGE, _MAX_HELLO = 200, 2000, 2**15  # characters
_RATES = 1e-6, 1e15  # pairs a second: lower ones would make leases that never end
_SHOWN = 4  # files that a refusal names


class Admission:
  """Admits workers whose results are bit-identical to those of earlier ones. Thread safe.

  Attributes:
    fingerprint: what all workers must have in common: at first the coordinator's protocol and code,
      then also the rest of the first worker's, in any life of the run.
  """

  def __init__(
    self,
    system: schema.System,
    welcome: Callable[[str, float, str], None] = lambda *_: None,
    clock: Callable[[], float] = time.monotonic,
    own: Mapping[str, Any] = MappingProxyType({}),
  ):
    """
    Args:
      system: says how many workers there are meant to be, and whether they may differ.
      welcome: called with the name, pairs a second and implementation of each new worker.
      clock: gives seconds.
      own: the coordinator's part of the fingerprint, `hardware.software()`.
    """
    self._system, self._welcome, self._clock = system, welcome, clock
    self._lock = threading.Lock()
    self.fingerprint: dict[str, Any] = dict(own)
    self._start = clock()
    self._names: set[str] = set()  # of all clients
    self._excluded: dict[str, str] = {}  # hellos of workers that are no longer admitted
    self._heard: dict[str, float] = {}
    self._hellos: dict[str, str] = {}  # with which each worker was admitted
    self._rates: dict[str, float] = {}
    self._unusable: dict[str, str] = {}

  def resume(self, fingerprint: Mapping[str, Any]) -> None:
    """Goes on with the fingerprint of an earlier life of the run.

    The coordinator's part is the present one: whoever resumes a run with changed code has chosen
    to, and is told so.
    """
    own = self.fingerprint
    earlier = {'code': fingerprint['code']} if 'code' in fingerprint else {}
    if changed := _differing(earlier, own).get('code'):
      logging.warning(
        'The run goes on with %s than it began with: results may differ in bits from those of a '
        'run that was not interrupted.',
        changed,
      )
    self.fingerprint = {**fingerprint, **own}

  def admit(self, worker: str, hello: str) -> str | None:
    """Admits a worker, or returns the reason for refusing it.

    Args:
      worker: its name.
      hello: JSON with its `fingerprint` {name: value} and measured `pairs_per_second`.

    Raises:
      ValueError: name or hello are none.
    """
    self._check_name(worker)
    if worker not in self._hellos or self._hellos[worker] != hello:
      fingerprint, rate = _read_hello(hello)
      if self._excluded.get(worker) == hello:
        return self._unusable[worker]
      refusal = self._greet(worker, fingerprint, rate)
      if refusal:
        return refusal
      self._hellos[worker] = hello
    self.hear(worker)
    return None

  def exclude(self, worker: str, why: str) -> None:
    """Refuses a worker that was admitted, until it is started again."""
    self.report_unusable(worker, why)
    with self._lock:
      if worker in self._hellos:
        self._excluded[worker] = self._hellos.pop(worker)
        self._rates.pop(worker)

  def is_admitted(self, worker: str) -> bool:
    return worker in self._hellos

  def rate(self, worker: str) -> float:
    """Pairs a second, as the worker measured them."""
    return self._rates[worker]

  def hear(self, client: str) -> None:
    """Records that a client is alive. Raises ValueError where that is no name of one."""
    self._check_name(client)
    self._heard[client] = self._clock()

  def heard_of(self, seconds: float) -> set[str]:
    """Clients heard of within the last `seconds`."""
    now = self._clock()
    return {name for name, at in list(self._heard.items()) if now - at < seconds}

  def workers(self, seconds: float) -> set[str]:
    """Workers heard of within the last `seconds`."""
    return self.heard_of(seconds) - {EVALUATOR}

  def silence(self, client: str) -> float:
    """Seconds since a client was heard of, or since the start."""
    return self._clock() - self._heard.get(client, self._start)

  def report_unusable(self, client: str, message: str) -> None:
    """Records that a client cannot start or go on, and why. Raises ValueError, as `hear`."""
    self._check_name(client)
    message = message[:_MAX_MESSAGE]
    logging.warning('%s cannot work: %s', client, message)
    with self._lock:
      self._unusable[client] = message

  def report_usable(self, client: str) -> None:
    """Withdraws a client's `report_unusable`: it was started again."""
    with self._lock:
      self._unusable.pop(client, None)

  def unusable(self, client: str) -> str | None:
    """Why a client cannot go on, if it cannot."""
    return self._unusable.get(client)

  def every_worker_failed(self) -> str | None:
    """The last worker's error, if as many workers as the run has failed to start, and none did."""
    errors = [message for name, message in list(self._unusable.items()) if name != EVALUATOR]
    failed = len(errors) >= self._system.num_workers and not self._rates
    return errors[-1] if failed else None

  def _check_name(self, client: str) -> None:
    """Raises ValueError where this is no name, or one more than there may be."""
    if client in self._names:
      return
    if not (isinstance(client, str) and client.isprintable() and 0 < len(client) <= _MAX_NAME):
      raise ValueError(f'a name must be 1 to {_MAX_NAME} printable characters')
    if len(self._names) >= _MAX_CLIENTS:
      raise ValueError(f'the coordinator knows {_MAX_CLIENTS} clients already')
    self._names.add(client)

  def _greet(self, worker: str, fingerprint: dict[str, Any], pairs_per_second: float) -> str | None:
    """Takes a new worker's hello, or returns the reason for refusing it."""
    with self._lock:
      differing = _differing(self.fingerprint, fingerprint)
      if 'protocol' in differing:
        self._unusable[worker] = (
          f'it speaks another protocol than the coordinator ({differing["protocol"]}): '
          'let both have the same version of this project.'
        )
        return self._unusable[worker]
      if differing and not self._system.allow_mixed:
        self._unusable[worker] = (
          'results would not be bit-identical to those of the run so far '
          f'({"; ".join(differing.values())}). Make them alike, or set system.allow_mixed=True.'
        )
        return self._unusable[worker]
      self.fingerprint = {**fingerprint, **self.fingerprint}
      self._rates[worker] = pairs_per_second
    if worker not in self._heard:
      self._welcome(worker, pairs_per_second, self.fingerprint['implementation'])
    return None


def _read_hello(hello: str) -> tuple[dict[str, Any], float]:
  """The fingerprint and pairs a second of a worker's hello. Raises ValueError."""
  if not isinstance(hello, str) or len(hello) > _MAX_HELLO:
    raise ValueError(f'a hello must be JSON of at most {_MAX_HELLO} characters')
  try:
    content = json.loads(hello)
    fingerprint, rate = content['fingerprint'], float(content['pairs_per_second'])
    if not _RATES[0] <= rate <= _RATES[1] or not isinstance(fingerprint['implementation'], str):
      raise ValueError('a rate or an implementation that is none')
    if not isinstance(fingerprint.get('code', {}), dict):
      raise ValueError('code that is none')
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise ValueError(f'a hello cannot be used: {error}') from error
  return fingerprint, rate


def _differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, str]:
  """What differs, in words, by the name of the property."""
  found = {}
  for name, value in ours.items():
    other = theirs.get(name)
    if name == 'code':
      files = sorted(
        file for file in {**value, **(other or {})} if (other or {}).get(file) != value.get(file)
      )
      if files:
        more = f' and {len(files) - _SHOWN} more' if len(files) > _SHOWN else ''
        found[name] = f'other code in {", ".join(files[:_SHOWN])}{more}'
    elif other != value:
      found[name] = f'{name}: {other} instead of {value}'
  return found
