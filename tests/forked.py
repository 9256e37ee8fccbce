"""Commands in processes of their own that need not import everything first: for those that end
soon."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# A process that has imported what commands import, but for the modules that declare their flags:
# different commands have flags of the same name. Each command is a fork of it.
_FORKS: Any = multiprocessing.get_context('forkserver')
_FORKS.set_forkserver_preload(
  [
    'artifacts.distilled_set',
    'artifacts.report',
    'distillation.evaluation',
    'distillation.initial_support',
    'kernels.native.kernel',
    'programs.memory',
    'programs.plan_advice',
    'programs.processes',
    'programs.terminal',
  ]
)
_SECONDS = 120


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
  """Runs `python FILE ...` or `python -m MODULE ...` to its end, with its output as text."""
  with tempfile.TemporaryDirectory() as folder:
    paths = [os.path.join(folder, name) for name in ('stdout', 'stderr')]
    process = _FORKS.Process(target=_run, args=(command[1:], paths, environment))
    process.start()
    process.join(_SECONDS)
    status = process.exitcode
    if status is None:
      process.kill()
      raise TimeoutError(f'{command} takes more than {_SECONDS} s')
    output, errors = (open(path, encoding='utf-8').read() for path in paths)
  return subprocess.CompletedProcess(command, status, output, errors)


def _run(program: list[str], paths: list[str], environment: dict[str, str]) -> None:
  for descriptor, path in enumerate(paths, 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
  os.chdir(ROOT)
  os.environ.update(environment)
  if program[0] == '-m':
    sys.argv = program[1:]
    runpy.run_module(program[1], run_name='__main__', alter_sys=True)
  else:
    sys.argv = program
    runpy.run_path(program[0], run_name='__main__')
