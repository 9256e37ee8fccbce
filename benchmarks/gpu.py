"""The kernels on the GPU that is there: `python -m benchmarks.gpu`, with Launchpad and Neural
Tangents or without.

First a pair's time, as benchmarks/kernels.py tells it: Neural Tangents (where it is), the JAX
kernel and the CUDA kernel, each as far as this environment can run it on the GPU. Then whole steps
on shapes of CIFAR-10: the real coordinator and one worker in this process.

Exit status: 0 done, 1 there is no GPU to compute on.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import threading

import kernels.precision  # noqa: F401
from programs import placement

if __name__ == '__main__':
  FOUND = placement.take_gpu('auto')  # before NumPy and JAX start


import jax
from absl import logging

from artifacts import run_directory
from benchmarks import kernels, steps
from distillation import step
from kernels import registry
from nodes import coordinator, kernel_worker
from nodes.client import Retrying

CASES = ('1x250x1', '1x1250x1', '50x250x5')  # images a class x target tile x target tiles a task
TARGETS, NUM_IMAGES = 5000, 10_000
STEPS, WARM_UP = 8, 4  # by then nearly all images have been drawn and prepared once
LONGEST = 240.0  # seconds of a case
PEAK_SIZE = 8192


@dataclasses.dataclass
class Step:
  """Whole steps of one case."""

  implementation: str
  support: int
  targets: int
  target_tile: int
  target_tiles_per_task: int
  pairs: int
  seconds: float
  microseconds_a_pair: float


def implementations() -> list[str]:
  """Those that compute on the GPU here."""
  on_gpu = {'jax': jax.default_backend() != 'cpu'}
  return [
    name for name in registry.available() if name in ('cuda', 'jax') and on_gpu.get(name, True)
  ]


def peak_flops() -> tuple[float, str]:
  """Float32 operations a second of a large matrix product on the GPU, and a word on it."""
  if jax.default_backend() != 'cpu':
    return kernels.peak_flops(PEAK_SIZE), 'by XLA'
  import cupy
  from cupyx import profiler

  a = cupy.ones((PEAK_SIZE, PEAK_SIZE), cupy.float32)
  seconds = profiler.benchmark(cupy.matmul, (a, a), n_repeat=10).gpu_times.min()
  return 2 * PEAK_SIZE**3 / seconds, 'by CuPy'


def measure_step(
  folder: str,
  implementation: str,
  images_per_class: int,
  tile: int,
  tiles: int,
  *,
  architecture: str = 'convnet',
  targets: int = TARGETS,
  num_images: int = NUM_IMAGES,
  num_steps: int = STEPS,
  warm_up: int = WARM_UP,
) -> Step:
  """Seconds of a step, the median of those after the first `warm_up`."""
  directory = steps.make_run(
    folder,
    num_images,
    num_steps,
    {'target_tile': tile, 'target_tiles_per_task': tiles},
    architecture=architecture,
    images_per_class=images_per_class,
    targets_per_step=targets,
    implementation=implementation,
  )
  clock, stop = steps.Clock(), threading.Event()
  node = coordinator.Coordinator(directory.path, folder, stop)
  worker = kernel_worker.KernelWorker(
    Retrying(node, 60.0, stop), 'worker', placement.worker_threads(0, 1), folder, stop
  )
  thread = threading.Thread(target=worker.run, daemon=True)
  thread.start()
  with clock.lapped(step, 'loss_and_gradient', lambda state, *_: state.step):
    node.run()
  thread.join()
  status = directory.read_status()
  if status['state'] != run_directory.FINISHED:
    raise RuntimeError(status.get('message', status['state']))
  pairs, seconds = steps.pairs(directory), clock.medians(warm_up)['step']
  return Step(
    implementation,
    images_per_class * steps.CLASSES,
    targets,
    tile,
    tiles,
    pairs,
    seconds,
    1e6 * seconds / pairs,
  )


def step_heading() -> str:
  """Of `step_line`s."""
  return (
    f'{"":18}{"S":>5}{"T":>6}{"tile":>6}{"tiles":>6}{"pairs":>9}{"s a step":>10}{"µs a pair":>11}'
  )


def step_line(row: Step) -> str:
  """A row in print."""
  return (
    f'{row.implementation:18}{row.support:5}{row.targets:6}{row.target_tile:6}{row.target_tiles_per_task:6}{row.pairs:9}'
    f'{row.seconds:10.3f}{row.microseconds_a_pair:11.2f}'
  )


def main(found: placement.Gpus) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--architectures', default='convnet,myrtle10')
  parser.add_argument('--image', default='32x32x3')
  parser.add_argument(
    '--implementations', help='by default all that this environment can run on the GPU'
  )
  parser.add_argument('--runs', type=int, default=5)
  parser.add_argument(
    '--cases',
    default=' '.join(CASES),
    help='images a class x target tile x target tiles a task, of the steps',
  )
  parser.add_argument(
    '--json', default='benchmarks/gpu.json', help='where to write the tables as JSON'
  )
  args = parser.parse_args()
  names = args.implementations.split(',') if args.implementations else implementations()
  if not found.names or not names:
    print(f'error: nothing to measure. {found.remark}', file=sys.stderr)
    return 1
  peak, how = peak_flops()
  with_peer = kernels.HAS_NEURAL_TANGENTS and jax.default_backend() != 'cpu'
  table = {
    'gpus': found.names,
    'jax': jax.__version__,
    'peak_tflops': peak / 1e12,
    'peak': f'float32 matrix product {how}',
    'neural_tangents': with_peer,
    'kernels': [],
    'steps': [],
  }

  def write():
    with open(args.json, 'w', encoding='utf-8') as file:
      json.dump(table, file, indent=1)

  device = jax.devices()[0].device_kind
  print(
    f'{found.remark}\nJAX {jax.__version__} on {device}; a float32 matrix product {how}: {peak / 1e12:.1f} TFLOP/s.'
  )
  if not kernels.HAS_NEURAL_TANGENTS:
    print(
      'Neural Tangents is not installed: no ratios, and errors are against the JAX kernel in float64.'
    )
  elif not with_peer:
    print('JAX has no GPU, so Neural Tangents is not timed: no ratios.')
  print(kernels.heading('µs'))
  for architecture in args.architectures.split(','):
    for row in kernels.measure(
      architecture, tuple(map(int, args.image.split('x'))), names, 1, args.runs, peak, with_peer
    ):
      table['kernels'].append(dataclasses.asdict(row))
      print(kernels.line(row, 1e3), flush=True)
    write()
  print(step_heading())
  convnet = {
    row['implementation']: row['step_ms']
    for row in table['kernels']
    if row['architecture'] == 'convnet'
  }
  for case in args.cases.split():
    images_per_class, tile, tiles = map(int, case.split('x'))
    for name in names:
      seconds = convnet.get(name, 0.0) / 1e3 * images_per_class * steps.CLASSES * TARGETS
      num_steps = int(min(STEPS, LONGEST / seconds)) if seconds else STEPS
      if num_steps < 2:
        print(f'{name:18}{images_per_class * steps.CLASSES:5}: a step would take {seconds:.0f} s')
        continue
      with tempfile.TemporaryDirectory() as folder:
        row = measure_step(
          folder,
          name,
          images_per_class,
          tile,
          tiles,
          num_steps=num_steps,
          warm_up=min(WARM_UP, num_steps // 2),
        )
      table['steps'].append(dataclasses.asdict(row))
      print(step_line(row), flush=True)
      write()
  return 0


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  sys.exit(main(FOUND))
