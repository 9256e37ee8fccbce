"""The GPUs and environments of a launch's processes, with stand-ins for nvidia-smi and the CUDA
packages."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from artifacts import run_directory
from configs import schema
from programs import distill, placement, start, supervisor
from transport import secret

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LISTING = 'GPU {0}: NVIDIA H100 80GB HBM3 (UUID: GPU-{0}aaa)\n'
ON_CPU = {
  'NPROC': '1',
  'JAX_PLATFORMS': 'cpu',
  'CUDA_VISIBLE_DEVICES': '',
  'OMP_NUM_THREADS': '1',
  'OPENBLAS_NUM_THREADS': '1',
  'grpc_proxy': '',
}
SLICES = (
  '  MIG 3g.40gb     Device  0: (UUID: MIG-b0)\n  MIG 3g.40gb     Device  1: (UUID: MIG-b1)\n'
)


def _install(folder, listing, packages):
  """Puts an nvidia-smi that prints `listing` (None: no driver) and empty packages into `folder`."""
  if listing is not None:
    program = folder / 'nvidia-smi'
    program.write_text(f'#!/bin/sh\n[ "$1" = -L ] && printf "{listing}"\n')
    program.chmod(0o755)
  for name in packages:
    (folder / name).mkdir()
    (folder / name / '__init__.py').write_text('')


@pytest.fixture
def machine(monkeypatch, tmp_path):
  """A function that gives this machine the GPUs of a listing of nvidia-smi (None: no driver), a
  CUDA_VISIBLE_DEVICES, and packages."""

  def make(listing, visible=None, packages=('jax_cuda12_plugin', 'cupy')):
    _install(tmp_path, listing, packages)
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin')
    monkeypatch.syspath_prepend(tmp_path)
    for name in ('jax_cuda12_plugin', 'jax_cuda13_plugin', 'cupy'):
      if name in packages:
        monkeypatch.delitem(sys.modules, name, raising=False)
      else:  # as if it were not installed
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if visible is not None:
      monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)

  return make


@pytest.mark.parametrize(
  'listing, visible, packages, implementation, names, remark',
  [
    (None, None, (), 'auto', (), 'No NVIDIA GPU was found: kernels are computed on CPU.'),
    (None, '0', ('cupy',), 'auto', (), 'No NVIDIA GPU was found: kernels are computed on CPU.'),
    (
      'No devices found.\n',
      None,
      ('cupy',),
      'auto',
      (),
      'No NVIDIA GPU was found: kernels are computed on CPU.',
    ),
    (
      LISTING.format(0),
      None,
      ('cupy',),
      'auto',
      ('GPU-0aaa',),
      'Kernels are computed on 1 GPU: GPU-0aaa.',
    ),
    (
      LISTING.format(0) + LISTING.format(1),
      None,
      ('jax_cuda13_plugin',),
      'auto',
      ('GPU-0aaa', 'GPU-1aaa'),
      'Kernels are computed on 2 GPUs: GPU-0aaa, GPU-1aaa.',
    ),
    (
      LISTING.format(0) + SLICES + LISTING.format(1),
      None,
      ('cupy',),
      'auto',
      ('MIG-b0', 'MIG-b1', 'GPU-1aaa'),
      '3 GPUs',
    ),
    (
      LISTING.format(0),
      '2,3',
      ('cupy',),
      'auto',
      ('2', '3'),
      'Kernels are computed on 2 GPUs: 2, 3.',
    ),
    (LISTING.format(0), 'GPU-1aaa, MIG-b1', ('cupy',), 'auto', ('GPU-1aaa', 'MIG-b1'), '2 GPUs'),
    (LISTING.format(0), '1,-1,0', ('cupy',), 'auto', ('1',), '1 GPU'),
    (
      LISTING.format(0),
      '',
      ('cupy',),
      'auto',
      (),
      'CUDA_VISIBLE_DEVICES= hides all GPUs: kernels are computed on CPU.',
    ),
    (
      LISTING.format(0),
      'NoDevFiles',
      ('cupy',),
      'auto',
      (),
      'CUDA_VISIBLE_DEVICES=NoDevFiles hides all GPUs',
    ),
    (
      LISTING.format(0),
      None,
      (),
      'auto',
      (),
      '1 GPU found, but nothing to compute on them with: `make cuda` installs it.',
    ),
    (LISTING.format(0), None, ('cupy',), 'jax', (), '`make cuda` installs it'),
    (LISTING.format(0), None, ('jax_cuda12_plugin',), 'cuda', (), '`make cuda` installs it'),
    (LISTING.format(0), None, ('jax_cuda12_plugin',), 'reference', ('GPU-0aaa',), '1 GPU'),
    (
      LISTING.format(0),
      None,
      ('cupy',),
      'native',
      (),
      '1 GPU found, but run.implementation=native computes on CPU.',
    ),
  ],
)
def test_gpus_of_the_machine(machine, listing, visible, packages, implementation, names, remark):
  machine(listing, visible, packages)
  found = placement.find_gpus(implementation)
  assert found.names == names and remark in found.remark
  assert placement.find_gpus(implementation, at_most=1).names == names[:1]


@pytest.mark.parametrize(
  'configured, gpus, expected', [(0, 0, 2), (0, 1, 1), (0, 8, 8), (3, 0, 3), (3, 8, 3), (9, 2, 9)]
)
def test_one_worker_a_gpu_unless_configured(configured, gpus, expected):
  assert placement.num_workers(configured, ['0'] * gpus) == expected


@pytest.mark.parametrize(
  'workers, gpus, of_workers, of_evaluator, fractions',
  [
    (1, ['0'], ['0'], '0', {'0': '0.450'}),
    (2, ['2', '3'], ['2', '3'], '3', {'2': '0.900', '3': '0.450'}),
    (
      4,
      ['a', 'b', 'c', 'd'],
      ['a', 'b', 'c', 'd'],
      'd',
      {'a': '0.900', 'b': '0.900', 'c': '0.900', 'd': '0.450'},
    ),
    (7, list('abcdefgh'), list('abcdefg'), 'h', dict.fromkeys('abcdefgh', '0.900')),
    (1, ['GPU-7f', 'MIG-9'], ['GPU-7f'], 'MIG-9', {'GPU-7f': '0.900', 'MIG-9': '0.900'}),
    (5, ['2', '3'], ['2', '3', '2', '3', '2'], '3', {'2': '0.300', '3': '0.300'}),
  ],
)
def test_workers_and_evaluator_on_gpus(machine, workers, gpus, of_workers, of_evaluator, fractions):
  machine(None)
  placed = placement.place(workers, gpus)
  assert [worker['CUDA_VISIBLE_DEVICES'] for worker in placed.workers] == of_workers
  assert placed.evaluator['CUDA_VISIBLE_DEVICES'] == of_evaluator
  for process in (*placed.workers, placed.evaluator):
    assert process['XLA_PYTHON_CLIENT_MEM_FRACTION'] == fractions[process['CUDA_VISIBLE_DEVICES']]
    assert process['XLA_PYTHON_CLIENT_PREALLOCATE'] == 'false'
    assert (process['JAX_PLATFORMS'], process['NPROC']) == ('cuda,cpu', '1')
  assert placed.coordinator == ON_CPU


def test_without_gpus_everything_is_on_cpu():
  assert placement.place(2, []) == placement.Placement(ON_CPU, [ON_CPU] * 2, ON_CPU)


def test_jax_keeps_off_the_gpu_where_it_has_no_cuda(machine):
  machine(None, packages=('cupy',))
  environment = placement.environment('5')
  assert (environment['CUDA_VISIBLE_DEVICES'], environment['JAX_PLATFORMS']) == ('5', 'cpu')


def test_a_process_of_its_own_is_placed_before_its_libraries_start(tmp_path):
  """programs/local.py: BLAS gets one thread, what is imported at once leaves JAX alone, and
  `start.ready` asks for the GPU first."""
  _install(tmp_path, LISTING.format(0) + LISTING.format(1), ['jax_cuda12_plugin', 'cupy'])
  code = """
import os, sys
from programs import local
from transport import secret
import threadpoolctl
from configs import validation
threads = {library['num_threads'] for library in threadpoolctl.threadpool_info()}
real = validation.validate
def validate(config):
  real(config)
  print('jax' in sys.modules, threads)
  print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['JAX_PLATFORMS'])
  os._exit(0)
validation.validate = validate
local.main(sys.argv)
"""
  for implementation, placed in (('auto', 'GPU-0aaa cuda,cpu'), ('native', ' cpu')):
    environment = {name: value for name, value in os.environ.items() if name not in ON_CPU}
    environment.update(
      PATH=f'{tmp_path}{os.pathsep}{environment["PATH"]}', PYTHONPATH=str(tmp_path)
    )
    done = subprocess.run(
      [
        sys.executable,
        '-uc',
        code,
        '--config=configs/digits.py',
        f'--config.run.implementation={implementation}',
        f'--workdir={tmp_path}/run',
      ],
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )
    assert done.stdout == f'False {{1}}\n{placed}\n', done.stderr


def test_the_launcher_may_still_look_for_gpus():
  assert placement.launcher_environment() == {
    name: value for name, value in ON_CPU.items() if name != 'CUDA_VISIBLE_DEVICES'
  }


def test_cpu_threads_are_divided(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(16)))
  assert [placement.worker_threads(0, workers) for workers in (1, 2, 5, 40)] == [16, 8, 3, 1]
  assert placement.worker_threads(6, 5) == 6


def test_every_process_of_the_program_has_its_environment(machine, npz, cache, tmp_path):
  machine(LISTING.format(0) + LISTING.format(1))
  run = start.Run(
    schema.Config(
      schema.Run(data=schema.Data(name=npz)), schema.System(num_workers=3, worker_threads=2)
    ),
    run_directory.RunDirectory(str(tmp_path)),
    cache,
    gpus=placement.find_gpus('auto'),
  )
  environments = {label: process.env for label, process in distill.local_resources(run).items()}
  assert {label: env['CUDA_VISIBLE_DEVICES'] for label, env in environments.items()} == {
    'coordinator': '',
    'evaluator': 'GPU-1aaa',
    'kernel_worker_0': 'GPU-0aaa',
    'kernel_worker_1': 'GPU-1aaa',
    'kernel_worker_2': 'GPU-0aaa',
  }
  assert set(distill.make_program(run).groups) == set(environments)


@pytest.mark.parametrize(
  'flags, of',
  [
    (
      (),
      {
        'coordinator': '',
        'kernel_worker_0': 'GPU-0aaa',
        'kernel_worker_1': 'GPU-1aaa',
        'evaluator': 'GPU-1aaa',
      },
    ),
    (('--role=worker', '--coordinator=localhost:1', '--secret=SECRET'), {'worker': 'GPU-0aaa'}),
  ],
  ids=['local', 'role'],
)
def test_environments_reach_the_processes_that_compute(tmp_path, npz, cache, flags, of):
  """launch.py restarts itself in a network of its own, its processes are started by Launchpad, and
  each of them starts a child."""
  _install(tmp_path, LISTING.format(0) + LISTING.format(1), ['cupy'])
  environment = {
    name: value for name, value in os.environ.items() if name != 'CUDA_VISIBLE_DEVICES'
  }
  environment.update(PATH=f'{tmp_path}{os.pathsep}{environment["PATH"]}', PYTHONPATH=str(tmp_path))
  local = (
    '--config=configs/base.py',
    f'--workdir={tmp_path}/run',
    f'--config.run.data.name={npz}',
    f'--config.system.cache_dir={cache}',
    '--config.run.architecture=fc1',
    '--config.run.targets_per_step=33',
    '--config.system.evaluation.nn_steps=0',
  )
  secret.make(str(tmp_path / 'secret'))
  flags = [flag.replace('SECRET', f'{tmp_path}/secret') for flag in flags or local]
  process = subprocess.Popen(
    [sys.executable, 'launch.py', *flags],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  try:
    end, found = time.monotonic() + 120, {}
    while len(found) < len(of):
      assert time.monotonic() < end, found
      for child in psutil.Process(process.pid).children(recursive=True):
        try:
          its = child.environ()
        except psutil.Error:
          continue
        if supervisor.PARENT in its:
          found[child.pid] = its
      time.sleep(0.1)
    assert sorted(its['CUDA_VISIBLE_DEVICES'] for its in found.values()) == sorted(of.values())
    for its in found.values():
      assert (its['JAX_PLATFORMS'], its['NPROC']) == ('cpu', '1')  # there is no JAX with CUDA
      assert ('XLA_PYTHON_CLIENT_MEM_FRACTION' in its) == bool(its['CUDA_VISIBLE_DEVICES'])
  finally:
    process.terminate()
    process.wait(60)
