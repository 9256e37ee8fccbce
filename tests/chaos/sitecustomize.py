"""Instruments every node of a chaos run.

It writes down what the node is doing, makes tasks and disks slow enough to be hit, and repeats and
loses calls. Python imports a module of this name when it starts, if it is on its path.

Settings, in the environment: KIP_CHAOS, the folder to write to; KIP_CHAOS_CALLS, the fraction of
calls that are repeated, and the same of calls whose answers are lost.
"""

import contextlib
import functools
import importlib.machinery
import os
import random
import sys
import threading
import time

_FOLDER, _CALLS = os.environ['KIP_CHAOS'], float(os.environ['KIP_CHAOS_CALLS'])
_TASK_SECONDS, _EVALUATION_SECONDS, _FSYNC_SECONDS = 0.06, 0.3, 0.03
_MAX_DELAY = 0.5  # of a repeated call
_random = random.Random(os.getpid())
_activity = None


def _tell(file, line):
  with open(os.path.join(_FOLDER, file), 'a', encoding='utf-8') as out:
    out.write(line + '\n')


@contextlib.contextmanager
def _doing(role, what):
  """Makes the file `<role>.<pid>` say `what` while the context lasts, even if the process dies."""
  global _activity
  if _activity is None:
    _activity = os.open(os.path.join(_FOLDER, f'{role}.{os.getpid()}'), os.O_RDWR | os.O_CREAT)
  before = os.pread(_activity, 32, 0) or b'idle'.ljust(32)
  os.pwrite(_activity, what.encode().ljust(32), 0)
  try:
    yield
  finally:
    os.pwrite(_activity, before, 0)


def _around(cls, name, role, what, seconds=0.0):
  """Makes a method an activity that takes `seconds` longer.

  `role` and `what` may be functions of its arguments.
  """
  method = getattr(cls, name)

  @functools.wraps(method)
  def wrapped(*args):
    with _doing(role(*args) if callable(role) else role, what(*args) if callable(what) else what):
      time.sleep(seconds)
      return method(*args)

  setattr(cls, name, wrapped)


class StatusNotOk(Exception):
  """The error of a lost connection, as Courier's."""

  code = 'UNAVAILABLE'


class _Proxy:
  """A coordinator of which some calls are repeated later, and some answers are lost."""

  def __init__(self, coordinator):
    self._coordinator = coordinator

  def __getattr__(self, method):
    def call(*args):
      chance = _random.random()
      result = getattr(self._coordinator, method)(*args)
      if chance < _CALLS:
        _tell('calls', f'repeated {method}')
        threading.Timer(_random.uniform(0, _MAX_DELAY), self._again, (method, args)).start()
      elif chance < 2 * _CALLS:
        _tell('calls', f'lost {method}')
        raise StatusNotOk('the answer is lost')
      return result

    return call

  def _again(self, method, args):
    with contextlib.suppress(Exception):  # nobody is there to hear it
      getattr(self._coordinator, method)(*args)


def _kernel_worker(module):
  _around(
    module.KernelWorker,
    'compute',
    'kernel_worker',
    lambda self, leased: leased.task.phase,
    _TASK_SECONDS,
  )


def _evaluation(module):
  _around(module.Evaluation, 'krr', 'evaluator', 'evaluate', _EVALUATION_SECONDS)


def _keeper(module):
  _around(module.Keeper, 'write_snapshot', 'coordinator', 'snapshot')


def _exchange(module):
  _around(module.Served, 'take', 'coordinator', lambda self, task: task.phase)
  _around(module.Served, 'post', 'coordinator', lambda self, tasks: tasks[0].phase)


def _state(module):
  update = module.Update.__call__

  def move(self, state, gradient):
    _tell('steps', str(state.step))
    return update(self, state, gradient)

  module.Update.__call__ = move


def _checkpoints(module):
  _around(module.Checkpoints, 'save', 'coordinator', 'checkpoint')


def _run_directory(module):
  _around(module.RunDirectory, 'append_metrics', 'evaluator', 'append')
  fsync = os.fsync

  def slow(handle):
    time.sleep(_FSYNC_SECONDS)
    fsync(handle)

  os.fsync = slow


def _client(module):
  begin = module.Retrying.__init__

  def __init__(self, coordinator, *args, **kwargs):
    begin(self, _Proxy(coordinator), *args, **kwargs)

  module.Retrying.__init__ = __init__


_HOOKS = {
  'artifacts.checkpoints': _checkpoints,
  'artifacts.run_directory': _run_directory,
  'distillation.evaluation': _evaluation,
  'distillation.state': _state,
  'nodes.client': _client,
  'nodes.exchange': _exchange,
  'nodes.keeper': _keeper,
  'nodes.kernel_worker': _kernel_worker,
}


class _Hooks(importlib.machinery.PathFinder):
  """Calls the hook of each module that has one, once it is imported."""

  @classmethod
  def find_spec(cls, name, path=None, target=None):
    hook = _HOOKS.get(name)
    spec = super().find_spec(name, path, target) if hook else None
    if hook is None or spec is None or spec.loader is None:
      return None
    execute = spec.loader.exec_module

    def execute_and_hook(module):
      execute(module)
      hook(module)

    spec.loader.exec_module = execute_and_hook
    return spec


if 'KIP_SUPERVISOR' in os.environ:
  sys.meta_path.insert(0, _Hooks)
