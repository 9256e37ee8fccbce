"""Measures what a step costs beside the kernel, on shapes of CIFAR-10.

    python -m benchmarks.coordinator

The real coordinator and one real worker, in processes of their own, talk over Courier. Only the
worker's kernel is a stand-in, which returns blocks and gradients of the right shape at once, so a
step takes as long as everything else does.

A row has, in milliseconds a step (medians), a whole step and its parts. 'solve' to 'wait' are the
coordinator's main thread; the others are the worker, while the coordinator waits: one after the
other, but for 'images', which are made ahead. 'complete' includes the wait for the next task.

Then the same with a stand-in that sleeps for as long as a kernel would take, where steps are short
enough. 'beside' is a step without that sleep, and 'share' its fraction of the step. Some of the
work is done during the sleep, as it is beside a GPU.
"""

import argparse
import functools
import json
import multiprocessing
import os
import tempfile
import threading
import time

import kernels.precision  # noqa: F401
from programs import placement

os.environ.update(placement.environment())  # before NumPy and JAX start


import courier
import numpy as np
import portpicker
from absl import logging
from launchpad.nodes.courier import courier_utils

from artifacts import run_directory
from benchmarks import steps
from data import sampling
from distillation import krr, pieces, step
from distillation import state as states
from kernels import architectures, checked, contract, library, registry
from nodes import coordinator as coordinator_node
from nodes import hardware, keeper, kernel_worker, messages, progress, task_board
from nodes.client import Retrying

TARGETS = 5000
# Images a class, target tile, target tiles a task.
CASES = ((1, 250, 1), (1, 250, 5), (10, 250, 1), (10, 250, 5), (50, 250, 1), (50, 250, 5))
MICROSECONDS = 5.0  # a pair, of the kernel that sleeps
WARM_UP = 3  # steps that are not counted
SECONDS = 15.0  # of steps with the kernel that sleeps
OF_COORDINATOR = ('solve', 'move', 'write', 'wait')
OF_WORKER = ('fetch', 'sample', 'images', 'residual', 'encode', 'complete')
PARTS = (*OF_COORDINATOR, *OF_WORKER)
_TIMEOUT = 60.0  # seconds of a call


class NoKernel(contract.Kernel):
  """A stand-in that sleeps: K_ss is the identity, K_ts and all gradients are constant."""

  implementation, architecture, dtype = 'none', architectures.get('convnet'), np.dtype('float32')

  def __init__(self, microseconds: float):
    """Sleeps for so long a pair."""
    self._microseconds, self._made = microseconds, {}

  def prepare(self, x):
    return contract.Prepared(x, [], self)

  def work(self, x1, x2):
    """Sleeps for as long as a kernel would take."""
    time.sleep(self._microseconds * 1e-6 * len(x1) * len(x2))

  def block(self, x1, x2):
    self.work(x1, x2)
    if x1 is x2:
      return np.eye(len(x1), dtype=self.dtype)
    return self._constant((len(x1), len(x2)), 0.0)

  def block_vjp(self, x1, x2, cotangent):
    self.work(x1, x2)
    block = self._constant((len(x1), len(x2)), 1e-3)
    if callable(cotangent):
      cotangent(block)
    return block, self._constant((len(x1), *steps.IMAGE), 1e-3)

  def _constant(self, shape, value):
    if (shape, value) not in self._made:
      self._made[shape, value] = np.full(shape, value, self.dtype)
    return self._made[shape, value]


class _TimedClient:
  """A coordinator whose calls are timed."""

  def __init__(self, client, clock):
    self._client, self._clock = client, clock

  def __getattr__(self, method):
    return self._clock.timed(method, getattr(self._client, method))


def coordinate(port: int, workdir: str, cache: str, answer) -> None:
  """Runs the coordinator's process; sends its seconds a step, by part."""
  clock = steps.Clock()
  for watched in (
    ('solve', krr, 'solve'),
    ('solve', krr, 'pull_back'),
    ('move', states.Update, '__call__'),
    ('write', progress.Progress, 'log_step'),
    ('write', keeper.Keeper, 'save'),
    ('write', keeper.Keeper, 'write_snapshot'),
    ('wait', task_board.TaskBoard, 'take'),
  ):
    clock.watch(*watched)
  coordinator = coordinator_node.Coordinator(workdir, cache, threading.Event())
  server = courier_utils.make_courier_server(coordinator, port=port)
  server.Start()
  with clock.lapped(step, 'loss_and_gradient', lambda state, *_: state.step):
    coordinator.run()
  server.Stop()
  steps.check_finished(run_directory.RunDirectory(workdir))
  answer.send(clock.medians(WARM_UP))


def work(port: int, cache: str, microseconds: float, answer) -> None:
  """Runs the worker's process; sends its seconds a step, by part, and of 'kernel'."""
  clock = steps.Clock()
  kernel = NoKernel(microseconds)
  registry.for_run = lambda run, threads: checked.Checked(kernel, lambda: kernel, is_delicate=True)
  for watched in (
    ('sample', sampling, 'targets'),
    ('images', library.Library, '__getitem__'),
    ('residual', krr, 'residual'),
    ('residual', krr, 'cotangent'),
    ('encode', messages, 'encode'),
    ('kernel', NoKernel, 'work'),
  ):
    clock.watch(*watched)
  hardware.pairs_per_second = lambda *_: 1e6 / MICROSECONDS
  connection = courier.Client(f'localhost:{port}', call_timeout=_TIMEOUT, wait_for_ready=False)
  stop = threading.Event()
  client = Retrying(
    _TimedClient(connection, clock),
    _TIMEOUT,
    stop,
    lambda error: type(error).__name__ == 'StatusNotOk',
  )
  with clock.lapped(pieces, 'compute', lambda task, *_: task.step):
    kernel_worker.KernelWorker(client, 'worker', 1, cache, stop).run()
  answer.send(clock.medians(WARM_UP))


def measure(
  directory: run_directory.RunDirectory, cache: str, microseconds: float = 0.0
) -> dict[str, float]:
  """Milliseconds a step: 'step', PARTS, and 'kernel', which takes `microseconds` a pair."""
  spawn, port = multiprocessing.get_context('spawn'), portpicker.pick_unused_port()
  started = []
  for node, *arguments in (
    (coordinate, port, directory.path, cache),
    (work, port, cache, microseconds),
  ):
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=node, args=(*arguments, sender), daemon=True)
    process.start()
    sender.close()
    started.append((process, receiver))
  of_coordinator, of_worker = (receiver.recv() for _, receiver in started)
  for process, _ in started:
    process.join()
  seconds = {**of_worker, **of_coordinator}  # a step is as long as the coordinator says
  return {name: 1e3 * seconds.get(name, 0.0) for name in ('step', *PARTS, 'kernel')}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--steps', type=int, default=30, help='of each measurement')
  parser.add_argument('--images', type=int, default=50_000, help='training images to draw from')
  parser.add_argument(
    '--cases',
    default=' '.join('{}x{}x{}'.format(*case) for case in CASES),
    help='images a class x target tile x target tiles a task',
  )
  parser.add_argument(
    '--json', default='benchmarks/coordinator.json', help='where to write the table as JSON'
  )
  args = parser.parse_args()
  rows = []
  print("ms a step, kernel at once: the step, the coordinator's parts, the worker's;")
  print(f'then what a step takes beside a kernel of {MICROSECONDS:g} µs a pair, and its share')
  heads = ''.join(f'{part:>9}' for part in ('step', *PARTS, 'beside'))
  print(f'{"S":>4}{"tile":>6}{"tiles":>6}{"tasks":>6}{heads}{"share":>7}')
  with tempfile.TemporaryDirectory() as folder:
    for case in args.cases.split():
      images_per_class, tile, tiles = map(int, case.split('x'))
      make_run = functools.partial(
        steps.make_run,
        folder,
        args.images,
        plan={'target_tile': tile, 'target_tiles_per_task': tiles},
        images_per_class=images_per_class,
        targets_per_step=TARGETS,
      )
      directory, support = make_run(num_steps=args.steps), images_per_class * steps.CLASSES
      at_once = measure(directory, folder)
      row = {'support': support, 'target_tile': tile, 'target_tiles_per_task': tiles, **at_once}
      line = f'{support:4}{tile:6}{tiles:6}{-(-TARGETS // (tile * tiles)):6}'
      line += ''.join(f'{at_once[part]:9.1f}' for part in ('step', *PARTS))
      num_steps = WARM_UP + int(SECONDS / (1e-6 * MICROSECONDS * steps.pairs(directory)))
      if num_steps > WARM_UP + 2:
        slowly = measure(make_run(num_steps=min(num_steps, args.steps)), folder, MICROSECONDS)
        beside = slowly['step'] - slowly['kernel']
        row.update(beside=beside, share=beside / slowly['step'])
        line += f'{row["beside"]:9.1f}{row["share"]:7.1%}'
      rows.append(row)
      print(line, flush=True)
  table = {'kernel_microseconds_a_pair': MICROSECONDS, 'load': os.getloadavg()[0], 'rows': rows}
  with open(args.json, 'w', encoding='utf-8') as file:
    json.dump(table, file, indent=1)


if __name__ == '__main__':
  logging.set_verbosity(logging.WARNING)
  main()
