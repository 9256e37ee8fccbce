"""Admission to a run, and signs of life, with a fake clock."""

import json
import math

import pytest

from configs import schema
from nodes.admission import EVALUATOR, Admission


class Clock:
  """Time that moves when told."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def _hello(device='A', rate: object = 10.0):
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


@pytest.mark.parametrize(
  'hello',
  [
    '',
    '[]',
    '7',
    '{}',
    None,
    '[' * 10**5,
    _hello() + ' ' * 2**15,
    json.dumps({'fingerprint': [], 'pairs_per_second': 1.0}),
    json.dumps({'fingerprint': {}, 'pairs_per_second': 1.0}),
    json.dumps({'fingerprint': {'implementation': 'native', 'code': []}, 'pairs_per_second': 1.0}),
    *(_hello(rate=rate) for rate in (0.0, -1.0, 1e-300, 1e300, math.nan, math.inf, 'x', None)),
  ],
)
def test_a_hello_that_is_none_is_an_error_and_leaves_nothing(hello):
  admission = Admission(schema.System(num_workers=1))
  with pytest.raises(ValueError, match='a hello'):
    admission.admit('w', hello)
  assert not admission.is_admitted('w') and admission.every_worker_failed() is None
  assert admission.admit('v', _hello()) is None  # a first worker of any kind


@pytest.mark.parametrize('name', ['', 'x' * 201, 'two\nlines', '\x1b[2J', None, 7])
def test_a_name_that_is_none_is_an_error(name):
  admission = Admission(schema.System())
  for call in (
    lambda: admission.hear(name),
    lambda: admission.admit(name, _hello()),
    lambda: admission.report_unusable(name, 'no'),
  ):
    with pytest.raises(ValueError, match='a name must be 1 to 200 printable characters'):
      call()
  assert admission.heard_of(9) == set()


def test_clients_without_end_are_refused_and_known_ones_stay():
  admission = Admission(schema.System())
  assert admission.admit('w', _hello()) is None
  with pytest.raises(ValueError, match='knows 10000 clients already'):
    for i in range(10**5):
      admission.hear(f'{i}')
  assert len(admission.heard_of(60)) == 10_000
  assert admission.admit('w', _hello()) is None


def test_what_a_client_reports_is_cut():
  admission = Admission(schema.System())
  admission.report_unusable('w', 'x' * 10**6)
  assert len(admission.unusable('w') or '') == 2000


def test_files_that_differ_are_named_a_few_of_them():
  code = {f'kernels/{i}.py': 'a' for i in range(9)}
  admission = Admission(schema.System(), own={'protocol': 1, 'code': code})

  def refusal(code):
    fingerprint = {'protocol': 1, 'code': code, 'implementation': 'native'}
    return admission.admit('w', json.dumps({'fingerprint': fingerprint, 'pairs_per_second': 1.0}))

  assert '(other code in kernels/3.py). ' in (refusal({**code, 'kernels/3.py': 'b'}) or '')
  assert '(other code in kernels/x.py). ' in (refusal({**code, 'kernels/x.py': 'a'}) or '')
  shown = 'kernels/0.py, kernels/1.py, kernels/2.py, kernels/3.py and 5 more'
  assert f'(other code in {shown}). ' in (refusal({}) or '')
  assert refusal(code) is None


@pytest.mark.parametrize('earlier, warned', [('0', True), ('1', False)])
def test_a_run_goes_on_with_the_code_that_resumes_it_and_says_so(caplog, earlier, warned):
  own = {'protocol': 2, 'code': {'a.py': '1'}}
  admission = Admission(schema.System(), own=own)
  admission.resume({'protocol': 1, 'code': {'a.py': earlier}, 'device': 'A'})
  assert admission.fingerprint == {**own, 'device': 'A'}
  assert [
    message.startswith('The run goes on with other code in a.py') for message in caplog.messages
  ] == [True] * warned
