"""Admission to a run, and signs of life, with a fake clock."""

import json

from configs import schema
from nodes.admission import EVALUATOR, Admission


class Clock:
  """Time that moves when told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def _hello(device='A', rate=10.0):
  fingerprint = {'implementation': 'native', 'device': device}
  return json.dumps({'fingerprint': fingerprint, 'pairs_per_second': rate})


def test_silence_and_those_who_are_alive():
  clock = Clock()
  admission = Admission(schema.System(), clock=clock)
  clock.now += 3
  assert admission.silence('w') == 3  # since the start
  assert admission.admit('w', _hello()) is None
  admission.hear(EVALUATOR)
  clock.now += 5
  admission.hear('v')
  assert admission.silence('w') == 5 and admission.silence('v') == 0
  assert admission.heard_of(5.1) == {'w', 'v', EVALUATOR} and admission.workers(5.1) == {'w', 'v'}
  assert admission.workers(5.0) == {'v'}


def test_a_worker_that_comes_back_is_welcomed_once():
  joined = []
  admission = Admission(schema.System(), lambda *about: joined.append(about))
  assert not admission.is_admitted('w')
  assert admission.admit('w', _hello()) is None
  assert admission.admit('w', _hello()) is None
  assert admission.admit('w', _hello(rate=20.0)) is None  # it was started again
  assert joined == [('w', 10.0, 'native')]
  assert admission.is_admitted('w') and admission.rate('w') == 20.0


def test_a_refused_worker_may_come_back_with_the_right_hardware():
  admission = Admission(schema.System(num_workers=1))
  admission.fingerprint = {'implementation': 'native', 'device': 'A'}  # of an earlier life
  refusal = admission.admit('w', _hello('B'))
  assert refusal is not None and '(device: B instead of A)' in refusal
  assert not admission.is_admitted('w') and admission.every_worker_failed() == refusal
  assert admission.admit('w', _hello('A')) is None
  assert admission.every_worker_failed() is None


def test_every_worker_failed_only_if_all_did():
  admission = Admission(schema.System(num_workers=2))
  admission.report_unusable(EVALUATOR, 'none of these')
  admission.report_unusable('a', 'no compiler')
  assert admission.every_worker_failed() is None
  admission.report_unusable('b', 'no memory')
  assert admission.every_worker_failed() == 'no memory'
  admission.report_usable(EVALUATOR)
  assert admission.unusable(EVALUATOR) is None and admission.unusable('a') == 'no compiler'
