"""Lost calls are repeated, lost coordinators given up, errors passed on."""

import threading
import time

import pytest

from nodes import client


class _Flaky:
  def __init__(self, failures):
    self.failures, self.calls = failures, 0

  def add(self, a, b):
    self.calls += 1
    if self.calls <= self.failures:
      raise ConnectionError('gone')
    return a + b

  def broken(self):
    raise ValueError('bad argument')


def _is_connection(error):
  return isinstance(error, ConnectionError)


def _retrying(target, timeout, stop=None, **kwargs):
  return client.Retrying(
    target, timeout, stop or threading.Event(), _is_connection, pause_seconds=0.01, **kwargs
  )


def test_a_lost_call_is_repeated():
  target = _Flaky(3)
  assert _retrying(target, 5).add(2, 3) == 5
  assert target.calls == 4


def test_it_gives_up_after_the_timeout():
  start = time.monotonic()
  with pytest.raises(client.CoordinatorLost, match='has not answered for 0 s: gone'):
    _retrying(_Flaky(10**9), 0.2).add(1, 1)
  assert time.monotonic() - start < 5


def test_it_says_where_it_looked():
  with pytest.raises(client.CoordinatorLost, match='has not answered for 0 s at here:1: gone'):
    _retrying(_Flaky(10**9), 0.1, address='here:1').add(1, 1)


def test_no_try_is_wasted_while_nobody_listens():
  target, looks = _Flaky(1), []

  def listening():
    looks.append(target.calls)
    return len(looks) > 3

  assert _retrying(target, 5, listening=listening).add(2, 3) == 5
  assert target.calls == 2 and looks == [1, 1, 1, 1]


def test_one_that_was_there_is_waited_for_as_long():
  target, methods = _Flaky(0), []
  retrying = _retrying(target, 0.5, answered=methods.append)
  retrying.add(1, 1)
  target.failures = 10**9
  start = time.monotonic()
  with pytest.raises(client.CoordinatorLost):
    retrying.add(1, 1)
  assert time.monotonic() - start >= 0.5 and methods == ['add']


def test_other_errors_are_passed_on():
  with pytest.raises(ValueError, match='bad argument'):
    _retrying(_Flaky(0), 5).broken()


def test_it_stops_waiting_when_told_to():
  stop = threading.Event()
  stop.set()
  with pytest.raises(client.Stopping):
    _retrying(_Flaky(10**9), 60, stop).add(1, 1)
