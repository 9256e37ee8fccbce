"""Times kernels and whole steps on this machine's GPU.

    python -m benchmarks.gpu

First the time of a pair, as in benchmarks/kernels.py, by Neural Tangents, the JAX kernel and the
CUDA kernel, those of them that this environment can run on the GPU. Then whole steps on shapes of
CIFAR-10, by the real coordinator and one worker in this process. Needs no Launchpad.

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

from benchmarks import kernels as kernels_benchmark
from benchmarks import steps
from distillation import step
from kernels import registry
from nodes import coordinator, kernel_worker
from nodes.client import Retrying

CASES = ('1x250x1', '1x1250x1', '50x250x5')  # images a class x target tile x target tiles a task
TARGETS, NUM_IMAGES = 5000, 10_000
STEPS, WARM_UP = 8, 4  # after so many, nearly all images have been drawn and prepared once
LONGEST = 240.0  # seconds of a case
PEAK_SIZE = 8192


@dataclasses.dataclass
class Step:
  """Whole steps of one case: kernel entries and median seconds of a step."""

  implementation: str
  support: int
  targets: int
  target_tile: int
  target_tiles_per_task: int
  pairs: int
  seconds: float
  microseconds_a_pair: float


def implementations() -> list[str]:
  """Names the implementations that compute on the GPU here."""
  on_gpu = ('cuda',) if jax.default_backend() == 'cpu' else ('cuda', 'jax')
  return [name for name in registry.available() if name in on_gpu]


def peak_flops() -> tuple[float, str]:
  """Float32 operations a second of a large matrix product on the GPU, and which library's it is."""
  if jax.default_backend() != 'cpu':
    return kernels_benchmark.peak_flops(PEAK_SIZE), 'by XLA'
  import cupy  # pyright: ignore[reportMissingImports]
  from cupyx import profiler  # pyright: ignore[reportMissingImports]

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
  """Runs a case; its seconds are the median of the steps after the first `warm_up`."""
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
  steps.check_finished(directory)
  pairs, seconds = steps.pairs(directory), clock.medians(warm_up)['step']
  support, a_pair = images_per_class * steps.CLASSES, 1e6 * seconds / pairs
  return Step(implementation, support, targets, tile, tiles, pairs, seconds, a_pair)


def step_heading() -> str:
  """The line above `step_line`s."""
  sizes = f'{"S":>5}{"T":>6}{"tile":>6}{"tiles":>6}{"pairs":>9}'
  return f'{"":18}{sizes}{"s a step":>10}{"µs a pair":>11}'


def step_line(row: Step) -> str:
  """Formats a row."""
  return (
    f'{row.implementation:18}{row.support:5}{row.targets:6}{row.target_tile:6}'
    f'{row.target_tiles_per_task:6}{row.pairs:9}{row.seconds:10.3f}{row.microseconds_a_pair:11.2f}'
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
  with_peer = kernels_benchmark.HAS_NEURAL_TANGENTS and jax.default_backend() != 'cpu'
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
  print(found.remark)
  print(
    f'JAX {jax.__version__} on {device}; a float32 matrix product {how}: {peak / 1e12:.1f} TFLOP/s.'
  )
  if not kernels_benchmark.HAS_NEURAL_TANGENTS:
    print('Neural Tangents is not installed: no ratios; errors are against the JAX kernel.')
  elif not with_peer:
    print('JAX has no GPU, so Neural Tangents is not timed: no ratios.')
  print(kernels_benchmark.heading('µs'))
  image = kernels_benchmark.parse_image(args.image)
  for architecture in args.architectures.split(','):
    for row in kernels_benchmark.measure(architecture, image, names, 1, args.runs, peak, with_peer):
      table['kernels'].append(dataclasses.asdict(row))
      print(kernels_benchmark.line(row, 1e3), flush=True)
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
