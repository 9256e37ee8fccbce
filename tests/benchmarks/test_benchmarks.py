"""The benchmarks' own code, on sizes that take seconds, and without a GPU."""

import os
import re
import subprocess
import sys

import pytest

from benchmarks import gpu, kernels, steps
from kernels import architectures

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def test_without_a_gpu_there_is_nothing_to_measure():
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.gpu'],
    cwd=ROOT,
    env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 1 and not done.stdout
  assert re.search(r'^error: nothing to measure\. ', done.stderr, re.MULTILINE)


def test_a_table_of_kernels_without_neural_tangents(monkeypatch):
  monkeypatch.setattr(kernels, 'BLOCKS', ((2, 3), (3, 5)))
  monkeypatch.setattr(kernels, 'HAS_NEURAL_TANGENTS', False)
  (row,) = kernels.measure('fc1', (4, 4, 1), ['jax'], 1, 1, 1e9, with_peer=False)
  assert (row.block, row.forward_ratio, row.step_ratio) == ('3x5', None, None)
  assert row.block_error <= 1e-6 and row.gradient_error <= 5e-6
  assert row.peak_share == pytest.approx(
    kernels.operations(architectures.get('fc1'), (4, 4, 1)) / (row.forward_ms * 1e-3) / 1e9
  )
  printed = kernels.line(row, 1e3)
  assert f'{1e3 * row.vjp_ms:11.4g}' in printed and printed.count(' -') == 3
  assert len(kernels.heading('µs').splitlines()[0]) == len(printed)


def test_steps_by_the_real_nodes(tmp_path):
  row = gpu.measure_step(
    str(tmp_path),
    'jax',
    1,
    5,
    2,
    architecture='fc1',
    targets=20,
    num_images=40,
    num_steps=3,
    warm_up=1,
  )
  assert (row.support, row.targets, row.pairs) == (10, 20, 10 * 20 + 2 * 10 * 10)
  assert row.seconds > 0 and row.microseconds_a_pair == pytest.approx(1e6 * row.seconds / row.pairs)
  assert len(gpu.step_line(row)) == len(gpu.step_heading())


def test_what_a_step_costs_beside_the_kernel(tmp_path):
  coordinator = pytest.importorskip('benchmarks.coordinator')  # needs Launchpad
  directory = steps.make_run(
    str(tmp_path),
    40,
    6,
    {'target_tile': 5, 'target_tiles_per_task': 2},
    images_per_class=1,
    targets_per_step=20,
  )
  milliseconds = coordinator.measure(directory, str(tmp_path))
  assert set(milliseconds) == {'step', 'kernel', *coordinator.PARTS}
  assert all(value > 0 for part, value in milliseconds.items() if part != 'write')
  assert milliseconds['solve'] + milliseconds['move'] + milliseconds['wait'] < milliseconds['step']


@pytest.mark.parametrize('support_per_task', [0, 3])
def test_what_a_step_sends(tmp_path, monkeypatch, support_per_task):
  """By the formulas of docs/sizing.md, in the middle of a run."""
  scale = pytest.importorskip('benchmarks.scale')
  pytest.importorskip('courier')
  monkeypatch.setattr(scale, 'IMAGES', 100)
  num_support, num_targets, per_task = 10, 80, 20
  case = scale.Case(num_support, num_targets, 3, 5, 10, 2, support_per_task)
  costs = scale.Costs(1e-6, 3e-6, 1e-6, [1.0])
  row = scale.measure(case, costs, str(tmp_path), 3.0)
  images, groups = 4 * num_support * 32 * 32 * 3, num_targets // per_task
  if support_per_task:
    up = (groups + 1) * images + 4 * num_support * num_targets
    down = (groups + num_support // 5 + 1) * images + 40 * num_targets * 4
  else:
    up, down = (groups + num_support // 5) * images, 3 * images
  assert row.bytes_up == pytest.approx(up, rel=0.1)
  assert row.bytes_down == pytest.approx(down, rel=0.1)
  assert 0 < row.efficiency < 1 and row.cpu > 0
  assert row.seconds > scale.kernel_seconds(case, costs) / 3
