"""Admits clients to a run, and knows their hardware, their speed and when each was last heard."""

import json
import threading
import time
from collections.abc import Callable

from absl import logging

from configs import schema

EVALUATOR = 'evaluator'


class Admission:
  """Admits workers whose results are bit-identical to those of earlier ones. Thread safe.

  Attributes:
    fingerprint: of the first worker, in any life of the run.
  """

  def __init__(
    self,
    system: schema.System,
    welcome: Callable[[str, float, str], None] = lambda *_: None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """
    Args:
      system: says how many workers there are meant to be, and whether they may differ.
      welcome: called with the name, pairs a second and implementation of each new worker.
      clock: gives seconds.
    """
    self._system, self._welcome, self._clock = system, welcome, clock
    self._lock = threading.Lock()
    self.fingerprint: dict[str, str] | None = None
    self._start = clock()
    self._heard: dict[str, float] = {}
    self._hellos: dict[str, str] = {}  # with which each worker was admitted
    self._rates: dict[str, float] = {}
    self._unusable: dict[str, str] = {}

  def admit(self, worker: str, hello: str) -> str | None:
    """Admits a worker, or returns the reason for refusing it.

    Args:
      worker: its name.
      hello: JSON with its `fingerprint` {name: value} and measured `pairs_per_second`.
    """
    if self._hellos.get(worker) != hello:
      refusal = self._greet(worker, **json.loads(hello))
      if refusal:
        return refusal
      self._hellos[worker] = hello
    self.hear(worker)
    return None

  def is_admitted(self, worker: str) -> bool:
    return worker in self._hellos

  def rate(self, worker: str) -> float:
    """Pairs a second, as the worker measured them."""
    return self._rates[worker]

  def hear(self, client: str) -> None:
    """Records that a client is alive."""
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
    """Records that a client cannot start or go on, and why."""
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

  def _greet(self, worker: str, fingerprint: dict[str, str], pairs_per_second: float) -> str | None:
    """Takes a new worker's hello, or returns the reason for refusing it."""
    with self._lock:
      if self.fingerprint is None:
        self.fingerprint = fingerprint
      differing = [
        f'{name}: {fingerprint.get(name)} instead of {value}'
        for name, value in self.fingerprint.items()
        if fingerprint.get(name) != value
      ]
      if differing and not self._system.allow_mixed:
        self._unusable[worker] = (
          'results would not be bit-identical to those of earlier workers '
          f'({"; ".join(differing)}). Make them alike, or set system.allow_mixed=True.'
        )
        return self._unusable[worker]
      self._rates[worker] = pairs_per_second
    if worker not in self._heard:
      self._welcome(worker, pairs_per_second, self.fingerprint['implementation'])
    return None
