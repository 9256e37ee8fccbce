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


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(client, '_PAUSE', 0.01)


def test_a_lost_call_is_repeated():
  target = _Flaky(3)
  assert client.Retrying(target, 5, threading.Event(), _is_connection).add(2, 3) == 5
  assert target.calls == 4


def test_it_gives_up_after_the_timeout():
  start = time.monotonic()
  with pytest.raises(client.CoordinatorLost, match='has not answered for 0 s: gone'):
    client.Retrying(_Flaky(10**9), 0.2, threading.Event(), _is_connection).add(1, 1)
  assert time.monotonic() - start < 5


def test_it_says_where_it_looked():
  with pytest.raises(client.CoordinatorLost, match='has not answered for 0 s at here:1: gone'):
    client.Retrying(_Flaky(10**9), 0.1, threading.Event(), _is_connection, address='here:1').add(
      1, 1
    )


def test_no_try_is_wasted_while_nobody_listens():
  target, looks = _Flaky(1), []

  def listening():
    looks.append(target.calls)
    return len(looks) > 3

  assert client.Retrying(target, 5, threading.Event(), _is_connection, listening).add(2, 3) == 5
  assert target.calls == 2 and looks == [1, 1, 1, 1]


def test_one_that_was_there_is_given_up_sooner():
  target, methods = _Flaky(0), []
  retrying = client.Retrying(
    target, 1.0, threading.Event(), _is_connection, answered=methods.append
  )
  retrying.add(1, 1)
  target.failures = 10**9
  start = time.monotonic()
  with pytest.raises(client.CoordinatorLost) as error:
    retrying.add(1, 1)
  assert 0.5 <= time.monotonic() - start < 1.0 and error.value.was_there and methods == ['add']


def test_other_errors_are_passed_on():
  with pytest.raises(ValueError, match='bad argument'):
    client.Retrying(_Flaky(0), 5, threading.Event(), _is_connection).broken()


def test_it_stops_waiting_when_told_to():
  stop = threading.Event()
  stop.set()
  with pytest.raises(client.Stopping):
    client.Retrying(_Flaky(10**9), 60, stop, _is_connection).add(1, 1)
