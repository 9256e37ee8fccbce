"""Changes every node of a chaos run: it records what it is doing, its tasks and disks are slow
enough to be hit, and calls are repeated and lost.

Python imports a module of this name when it starts, if it is on its path. Settings, in the
environment: KIP_CHAOS, the folder for the records; KIP_CHAOS_CALLS, the share of all calls that are
repeated, and again of those whose answer is lost.
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


def _record(file, line):
  with open(os.path.join(_FOLDER, file), 'a', encoding='utf-8') as out:
    out.write(line + '\n')


@contextlib.contextmanager
def _doing(role, what):
  """Makes the file `<role>.<pid>` say `what` inside: after a kill it says what the process was
  doing."""
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
  """Makes method `name` an activity that takes `seconds` longer.

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
  """Courier's exception for a lost connection, by its name and code."""

  code = 'UNAVAILABLE'


class _Proxy:
  """Stands between a client and the coordinator: some calls get through twice, the second time
  later; of others the answer is lost."""

  def __init__(self, coordinator):
    self._coordinator = coordinator

  def __getattr__(self, method):
    def call(*args):
      chance = _random.random()
      result = getattr(self._coordinator, method)(*args)
      if chance < _CALLS:
        _record('calls', f'repeated {method}')
        threading.Timer(_random.uniform(0, _MAX_DELAY), self._again, (method, args)).start()
      elif chance < 2 * _CALLS:
        _record('calls', f'lost {method}')
        raise StatusNotOk('the answer is lost')
      return result

    return call

  def _again(self, method, args):
    with contextlib.suppress(Exception):  # nobody waits for the answer
      getattr(self._coordinator, method)(*args)


def _kernel_worker(module):
  _around(
    module.KernelWorker,
    'compute',
    'kernel_worker',
    lambda self, leased: leased.task.phase,
    _TASK_SECONDS,
  )


def _evaluator(module):
  _around(module.Evaluator, '_evaluate', 'evaluator', 'evaluate', _EVALUATION_SECONDS)


def _keeper(module):
  _around(module.Keeper, 'write_snapshot', 'coordinator', 'snapshot')


def _exchange(module):
  _around(module.Served, 'take', 'coordinator', lambda self, task: task.phase)
  _around(module.Served, 'post', 'coordinator', lambda self, tasks: tasks[0].phase)


def _state(module):
  update = module.Update.__call__

  def move(self, state, gradient):
    _record('steps', str(state.step))
    return update(self, state, gradient)

  module.Update.__call__ = move


def _checkpoints(module):
  _around(module.Checkpoints, 'save', 'coordinator', 'checkpoint')


def _run_directory(module):
  _around(module.RunDirectory, 'append_metrics', 'evaluator', 'append')
  fsync = os.fsync

  def slow_fsync(handle):
    time.sleep(_FSYNC_SECONDS)
    fsync(handle)

  os.fsync = slow_fsync


def _client(module):
  begin = module.Retrying.__init__

  def __init__(self, coordinator, *args, **kwargs):
    begin(self, _Proxy(coordinator), *args, **kwargs)

  module.Retrying.__init__ = __init__


_HOOKS = {
  'artifacts.checkpoints': _checkpoints,
  'artifacts.run_directory': _run_directory,
  'distillation.state': _state,
  'nodes.client': _client,
  'nodes.evaluator': _evaluator,
  'nodes.exchange': _exchange,
  'nodes.keeper': _keeper,
  'nodes.kernel_worker': _kernel_worker,
}


class _Finder(importlib.machinery.PathFinder):
  """Calls the hook of a module, if there is one, once the module is imported."""

  @classmethod
  def find_spec(cls, fullname, path=None, target=None):
    spec, hook = super().find_spec(fullname, path, target), _HOOKS.get(fullname)
    if hook is not None and spec is not None and spec.loader is not None:
      execute = spec.loader.exec_module

      def exec_module(module):
        execute(module)
        hook(module)

      spec.loader.exec_module = exec_module
    return spec


if 'KIP_SUPERVISOR' in os.environ:
  sys.meta_path.insert(0, _Finder)
