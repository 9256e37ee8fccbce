"""Measures how a run scales with its workers.

    python -m benchmarks.scale

The real coordinator serves over Courier, on all cores, to simulated workers: coroutines in a
process for each core but the first. They lease tasks, fetch what a real worker fetches, sleep for
as long as its kernel would take, and send pieces of the real size. The sleep is a task's pairs
times --microseconds, times a factor drawn from the native kernel's own times, measured first.

'efficiency' is the kernel's time of a step in one worker and one pass, over the number of workers
times the step's time by the coordinator's clock. A row ends in 'limit' where the simulated workers'
cores were busy: then it shows what this machine can simulate, not what the coordinator can do.

With --real: one, then two real workers of one thread each, on the real CIFAR-10.
"""

import argparse
import asyncio
import atexit
import functools
import itertools
import json
import multiprocessing
import os
import queue as queues
import selectors
import shutil
import tempfile
import threading
import time
import traceback
from typing import Any, NamedTuple

from programs import placement

os.environ.update(placement.environment())  # before NumPy and JAX start

import numpy as np

from artifacts import run_directory
from configs import base, schema, validation
from data import store
from distillation import plan
from kernels import cpus, registry
from nodes import hardware, kernel_worker, messages
from nodes.client import Retrying
from transport import unix_socket

IMAGE, CLASSES, IMAGES = (32, 32, 3), 10, 50_000  # CIFAR-10
_LOOK, _END_SECONDS = 0.05, 5.0
WARM_UP, STEPS = 2, 3  # steps that are not counted; the fewest that are
REPEATS = 30  # measurements of the native kernel
PAIRS = (10, 64)  # images of the block that they are of
BUSY = 0.8  # load of the simulated workers' cores from which on they are the limit
# Pairs whose derivatives a worker can keep: 22 kB each, in a quarter of an 80 GiB GPU.
KEPT = 80 * 2**30 // 4 // 22_000


class Costs(NamedTuple):
  """Kernel seconds a pair.

  Attributes:
    forward: without derivatives.
    derivatives: with them.
    pull_back: from derivatives to the gradient.
    spread: measured times over their mean; each task draws one.
  """

  forward: float
  derivatives: float
  pull_back: float
  spread: list[float]


class Case(NamedTuple):
  """Support images, targets, workers, and the fields of run.plan."""

  support: int
  targets: int
  workers: int
  support_tile: int
  target_tile: int
  target_tiles_per_task: int
  support_per_task: int


class Row(NamedTuple):
  """Measurements of a case, all but `efficiency` and `busy` a step.

  Attributes:
    efficiency: see the module.
    seconds: by the coordinator's clock.
    cpu: seconds of the coordinator's process.
    calls: of all workers.
    bytes_up, bytes_down: to and from the coordinator.
    busy: load of the simulated workers' cores, at most 1.
  """

  efficiency: float
  seconds: float
  cpu: float
  calls: float
  bytes_up: float
  bytes_down: float
  busy: float


# S = 10: a piece's gradient is small, so targets alone are cut. S = 500: by parts of the support
# too, into slightly fewer tasks than a whole number for each worker, those of K_ss up to twice as
# large as the others; in one pass for comparison.
CASES = [
  Case(10, 5000, 1, 10, 250, 1, 0),
  Case(10, 5000, 8, 10, 125, 1, 0),
  Case(10, 5000, 32, 10, 50, 1, 0),
  Case(10, 50_000, 32, 10, 250, 1, 0),
  Case(10, 50_000, 128, 10, 125, 1, 0),
  Case(500, 5000, 1, 500, 250, 4, 0),
  Case(500, 5000, 8, 125, 125, 1, 0),
  Case(500, 5000, 8, 63, 125, 10, 25),
  Case(500, 5000, 32, 100, 50, 1, 0),
  Case(500, 5000, 32, 72, 250, 10, 9),
  Case(500, 5000, 128, 50, 250, 10, 9),
  Case(500, 50_000, 32, 100, 250, 20, 18),
  Case(500, 50_000, 128, 84, 250, 20, 14),
  Case(500, 50_000, 256, 72, 250, 20, 10),
]


def measured_costs(microseconds: float) -> Costs:
  """Measures the native kernel's ConvNet on one thread, for the shares and spread of its times.

  Forward pass and vjp together are scaled to `microseconds` a pair.
  """
  kernel = registry.make_kernel('convnet', implementation='native', threads=1)
  rng = np.random.default_rng(0)
  x1, x2 = (kernel.prepare(rng.normal(size=(n, *IMAGE)).astype(np.float32)) for n in PAIRS)
  cotangent = np.ones(PAIRS)
  times = {'forward': [], 'derivatives': [], 'pull_back': []}
  for _ in range(REPEATS + 1):
    start = time.perf_counter()
    kernel.block(x1, x2)
    middle = time.perf_counter()
    linearised = kernel.linearise(x1, x2)
    then = time.perf_counter()
    linearised.pull_back(cotangent)
    for name, seconds in zip(times, (middle - start, then - middle, time.perf_counter() - then)):
      times[name].append(seconds)
  # The first compiles.
  forward, derivatives, pull_back = (np.array(values[1:]) for values in times.values())
  scale = microseconds * 1e-6 / (derivatives + pull_back).mean()
  spread = (derivatives / derivatives.mean()).tolist()
  means = [float(values.mean() * scale) for values in (forward, derivatives, pull_back)]
  return Costs(means[0], means[1], means[2], spread)


class _Simulated:
  """A `KernelWorker` whose kernel sleeps, as a coroutine: one core has room for hundreds."""

  def __init__(self, client: Any, name: str, costs: Costs, seed: int):
    self._client, self._name = client, name
    self._costs, self._random = costs, np.random.default_rng(seed)
    self._ahead = asyncio.Lock()  # tasks fetch one after the other, as in a worker's one thread
    self._fetched: dict[Any, bytes] = {}  # by step, name and rows
    # Pairs whose derivatives are kept, by step and what both halves of a task share.
    self._kept: dict[Any, int] = {}
    self._life: list[Any] = []
    self.calls = self.bytes_up = self.bytes_down = 0

  async def run(self) -> None:
    """Works for ever."""
    description = json.loads(await self._call('describe'))
    run = schema.from_dict(schema.Run, description['run'])
    self._num_support = run.images_per_class * CLASSES
    self._target_tile = run.plan.target_tile
    self._two_halves = run.plan.split_support(self._num_support) > 0
    rate = 1 / (self._costs.derivatives + self._costs.pull_back)
    fingerprint = {**hardware.software(), 'implementation': 'simulated'}
    hello = json.dumps({'fingerprint': fingerprint, 'pairs_per_second': rate})
    in_hand, coming = [], None
    while True:
      if coming and not in_hand:
        in_hand, coming = await coming, None
      if not in_hand:
        in_hand = self._received(await self._call('lease', self._name, hello))
        continue
      task, lease, begun = in_hand.pop(0)
      await begun
      await asyncio.sleep(self._seconds(task))
      if coming:
        in_hand += await coming
      holding = [lease for _, lease, _ in in_hand]
      coming = asyncio.ensure_future(self._submit(task, lease, holding))

  async def _submit(self, task: plan.Task, lease: int, holding: list[int]) -> list[Any]:
    """Submits a piece; returns further tasks."""
    targets = task.target_range
    if task.phase not in plan.SUPPORT_PHASES:  # the same piece for all of these
      targets = 0, targets[1] - targets[0]
    parts, checksum = _piece(task.phase, task.support_range, targets, self._num_support)
    about, answer = (self._name, self._life, list(task), lease), None
    for i, part in enumerate(parts):
      answer = await self._call('complete', *about, i, len(parts), part, checksum, holding)
    return self._received(answer)

  def _received(self, answer: dict[str, Any] | None) -> list[Any]:
    """The tasks of an answer, with their leases and the fetching of their inputs."""
    if not answer:
      return []
    self._life, received = answer['life'], []
    for fields, lease, _ in answer['tasks']:
      task = messages.task_from(fields)
      received.append((task, lease, asyncio.ensure_future(self._begin(task))))
    return received

  async def _begin(self, task: plan.Task) -> None:
    """Fetches what a real worker fetches."""
    for values in (self._fetched, self._kept):
      for key in [key for key in values if key[0] != task.step]:
        del values[key]
    wanted = []
    if not self._two_halves:
      wanted.append(('images', 0, self._num_support))
      if task.phase == plan.TARGETS:
        wanted.append(('alpha', *task.support_range))
    elif task.phase in plan.SUPPORT_PHASES:
      tiles = plan.ranges(self._num_support, self._target_tile)
      wanted += [('images', *columns) for columns in tiles]
    async with self._ahead:
      for key in [(task.step, *rows) for rows in wanted]:
        if key not in self._fetched:
          self._fetched[key] = await self._call('fetch', self._life, *key)

  async def _call(self, method: str, *args: Any) -> Any:
    value = await asyncio.wrap_future(getattr(self._client.futures, method)(*args))
    self.calls += 1
    self.bytes_up += sum(len(argument) for argument in args if isinstance(argument, bytes))
    if isinstance(value, bytes):
      self.bytes_down += len(value)
    elif isinstance(value, dict):
      self.bytes_down += sum(map(len, value.get('inputs', ())))
    return value

  def _seconds(self, task: plan.Task) -> float:
    """The seconds that the kernel would take."""
    costs, pairs = self._costs, task.pairs
    key = (task.step, task.phase in plan.SUPPORT_PHASES, task.target_range, task.support_range)
    kept = self._kept.pop(key, 0)
    if task.phase in (plan.TARGET_BLOCKS, plan.SUPPORT_BLOCKS) and self._two_halves:
      self._kept[key] = min(pairs, KEPT - sum(self._kept.values()))
      seconds = pairs * costs.derivatives
    elif task.phase == plan.SUPPORT_BLOCKS:
      seconds = pairs * costs.forward / (2 if task.target_range == task.support_range else 1)
    else:
      seconds = pairs * costs.pull_back + (pairs - kept) * costs.derivatives
    return seconds * self._random.choice(self._costs.spread)


@functools.cache
def _piece(
  phase: str, support: plan.Range, targets: plan.Range, num_support: int
) -> tuple[list[bytes], bytes]:
  """A piece of the right size, encoded."""
  rows, columns = support[1] - support[0], targets[1] - targets[0]
  gradient = np.zeros((rows, *IMAGE), np.float32)
  if phase == plan.SUPPORT_BLOCKS:
    identity = np.eye(num_support, dtype=np.float32)
    return messages.encode({'block': identity[slice(*support), slice(*targets)]})
  if phase == plan.TARGET_BLOCKS:
    return messages.encode({'block': np.zeros((rows, columns), np.float32)})
  if phase == plan.TARGETS:
    metrics = {'loss': np.asarray(0.0), 'correct': np.asarray(0)}
    alpha_bar = np.zeros((num_support, CLASSES))
    return messages.encode({**metrics, 'alpha_bar': alpha_bar, 'gradient': gradient})
  return messages.encode({'gradient': gradient})


def _serve(workdir: str, cache: str, path: str, seconds: float, out: Any) -> None:
  """Runs the coordinator's process; sends seconds and CPU seconds a step, and the steps done."""
  from nodes import coordinator, progress

  stop, seen = threading.Event(), []

  def note(self, step, row):
    seen.append((time.monotonic(), time.process_time()))
    if len(seen) > WARM_UP + STEPS and seen[-1][0] - seen[WARM_UP][0] > seconds:
      stop.set()

  progress.Progress.log_step = note
  node = coordinator.Coordinator(workdir, cache, stop)
  with unix_socket.serving(node, path):
    node.run()
  (begin, cpu), (end, last), steps = seen[WARM_UP], seen[-1], len(seen) - 1 - WARM_UP
  out.put(((end - begin) / steps, (last - cpu) / steps, len(seen)))


def _simulate(
  path: str, names: list[str], cores: set[int], costs: Costs, over: Any, out: Any
) -> None:
  """Runs a process of simulated workers.

  When `over` is set, it sends its CPU seconds, calls, bytes up and bytes down, and ends.
  """
  if hasattr(os, 'sched_setaffinity'):  # not on macOS
    os.sched_setaffinity(0, cores)
  import courier

  workers = [
    _Simulated(courier.Client(unix_socket.SCHEME + path, call_timeout=60), name, costs, seed)
    for seed, name in zip(itertools.count(int(names[0][1:])), names)
  ]

  async def end():
    while not over.is_set():  # whoever sets it would wait for a process that died while it waited
      await asyncio.sleep(_LOOK)

  async def work():
    working = [asyncio.ensure_future(worker.run()) for worker in workers]
    ends = asyncio.ensure_future(end())
    await asyncio.wait([ends, *working], return_when=asyncio.FIRST_COMPLETED)
    for failed in [worker for worker in working if worker.done()]:
      try:
        failed.result()
      except Exception:  # any type: it ends this process, but for calls that the run's end cuts off
        await asyncio.wait([ends], timeout=_END_SECONDS)
        if not ends.done():
          traceback.print_exc()
          os._exit(1)
    counts = np.sum([(w.calls, w.bytes_up, w.bytes_down) for w in workers], axis=0)
    out.put((time.process_time(), *counts.tolist()))
    out.close()
    out.join_thread()
    os._exit(0)  # calls are still waiting

  # The default selector, epoll, sleeps whole milliseconds.
  asyncio.SelectorEventLoop(selectors.SelectSelector()).run_until_complete(work())


def _work(path: str, name: str, folder: str) -> None:
  """Runs the process of a real worker."""
  import courier

  client = Retrying(
    courier.Client(unix_socket.SCHEME + path, call_timeout=60, wait_for_ready=False),
    60,
    threading.Event(),
    lambda error: type(error).__name__ == 'StatusNotOk',
  )
  kernel_worker.KernelWorker(client, name, 1, folder, threading.Event()).run()


def measure_real(workers: int, folder: str, data: str) -> float:
  """Seconds a step of ConvNet, CIFAR-10, S = 10, T = 5000 with real workers of one thread each."""
  config = base.get_config()
  config.run.data.name, config.run.data.dir = 'cifar10', data
  config.run.implementation = 'native'
  path, server, served = _start(config, workers, folder, 0.0)
  spawn = multiprocessing.get_context('spawn')
  real = [
    spawn.Process(target=_work, args=(path, f'w{i}', folder), daemon=True) for i in range(workers)
  ]
  for process in real:
    process.start()
  a_step = _received(served, server, *real)[0]
  for process in (server, *real):
    process.kill()
  return a_step


def _start(config: Any, workers: int, folder: str, seconds: float) -> tuple[str, Any, Any]:
  """Starts a coordinator's process; returns its socket, itself, and the queue for its results."""
  config.run.num_steps = 10**6
  config.system.num_workers = workers
  config.system.snapshot_steps = (0,)
  config.system.checkpoint_seconds = 1e6
  config = validation.validate(config.to_dict())
  prepared = store.prepare(config.run.data, folder)
  directory = run_directory.RunDirectory(tempfile.mkdtemp(dir=folder))
  directory.open(config, prepared.key)
  directory.close()
  sockets = unix_socket.new_folder()
  atexit.register(shutil.rmtree, sockets, ignore_errors=True)
  path = os.path.join(sockets, 'courier')
  spawn = multiprocessing.get_context('spawn')
  served = spawn.Queue()
  server = spawn.Process(
    target=_serve, args=(directory.path, folder, path, seconds, served), daemon=True
  )
  server.start()
  return path, server, served


def _received(queue: Any, *processes: Any) -> Any:
  """Waits for a value in a queue. Raises RuntimeError if any of the processes ends before."""
  while True:
    are_alive = all(process.is_alive() for process in processes)
    try:
      return queue.get(timeout=1)
    except queues.Empty:
      if not are_alive:
        raise RuntimeError('a process of the benchmark has ended; see above.') from None


def measure(case: Case, costs: Costs, folder: str, seconds: float) -> Row:
  """Runs a case for about `seconds`."""
  config = base.get_config()
  config.run.data.name = _data(folder)
  config.run.images_per_class, config.run.targets_per_step = case.support // CLASSES, case.targets
  for name in ('support_tile', 'target_tile', 'target_tiles_per_task', 'support_per_task'):
    config.run.plan[name] = getattr(case, name)
  kernel = kernel_seconds(case, costs)
  path, server, served = _start(config, case.workers, folder, seconds)
  cores = cpus.which()
  of_workers = set(cores[1:]) or {cores[0]}
  spawn = multiprocessing.get_context('spawn')
  counted, over = spawn.Queue(), spawn.Event()
  names = [f'w{i}' for i in range(case.workers)]
  size = -(-len(names) // len(of_workers))
  simulated = [
    spawn.Process(
      target=_simulate,
      args=(path, names[i : i + size], of_workers, costs, over, counted),
      daemon=True,
    )
    for i in range(0, len(names), size)
  ]
  begin = time.monotonic()
  for process in simulated:
    process.start()
  a_step, cpu, all_steps = _received(served, server, *simulated)
  elapsed = time.monotonic() - begin
  over.set()
  totals = np.sum([_received(counted, process) for process in simulated], axis=0)
  for process in (server, *simulated):
    process.join(20)
    process.kill()
  calls, up, down = totals[1:] / all_steps
  efficiency, busy = kernel / case.workers / a_step, totals[0] / elapsed / len(of_workers)
  return Row(efficiency, a_step, cpu, calls, up, down, busy)


def kernel_seconds(case: Case, costs: Costs) -> float:
  """Kernel seconds of a step in one worker, in one pass."""
  square = case.support**2
  vjp = costs.derivatives + costs.pull_back
  return costs.forward * square / 2 + vjp * (case.support * case.targets + square)


def _data(folder: str) -> str:
  """Makes a data set of CIFAR-10's size; its content plays no part."""
  path = os.path.join(folder, 'data.npz')
  if not os.path.exists(path):
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, *IMAGE), np.uint8)
    labels = np.arange(IMAGES) % CLASSES
    np.savez(path, x_train=images, y_train=labels, x_test=images[:CLASSES], y_test=labels[:CLASSES])
  return path


def line(index: int, case: Case, row: Row, costs: Costs) -> str:
  """Formats a row."""
  target_task = f'{case.target_tile}x{case.target_tiles_per_task}'
  cut = f'{case.support_tile}/{target_task}/{case.support_per_task}'
  kernel = kernel_seconds(case, costs) / case.workers
  return (
    f'{index:>3} {case.support:>4} {case.targets:>6} {case.workers:>7} {cut:>16} '
    f'{row.efficiency:>10.1%} {row.seconds:>8.4f} {kernel:>8.4f} {row.cpu:>8.4f} '
    f'{row.calls:>6.0f} {row.bytes_up / 1e6:>7.1f} {row.bytes_down / 1e6:>7.1f} '
    f'{row.busy:>6.0%} {"limit" if row.busy > BUSY else "":>7}'
  )


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--microseconds',
    type=float,
    default=5.0,
    help='of the simulated kernel for a pair, forward and vjp',
  )
  parser.add_argument('--seconds', type=float, default=10.0, help='of every case')
  parser.add_argument(
    '--cases', default='', help='indices of those to run, such as 0,6,9; all by default'
  )
  parser.add_argument('--folder', default='runs/scale', help='for data and run directories')
  parser.add_argument(
    '--real', default='', help="folder with CIFAR-10's parquet files: measure real workers on it"
  )
  parser.add_argument('--output', default='', help='JSON file for the rows')
  args = parser.parse_args()
  folder = os.path.abspath(args.folder)
  os.makedirs(folder, exist_ok=True)
  if args.real:
    one, two = (measure_real(workers, folder, args.real) for workers in (1, 2))
    print(f'real workers: one {one:.3f} s a step, two {two:.3f} s: efficiency {one / two / 2:.1%}')
    return
  costs = measured_costs(args.microseconds)
  forward, derivatives, pull_back = (1e6 * seconds for seconds in costs[:3])
  print(
    f'kernel, scaled to {args.microseconds:g} µs a pair: forward {forward:.2f}, with derivatives '
    f'{derivatives:.2f}, pull-back {pull_back:.2f} µs; times over their mean: deviation '
    f'{np.std(costs.spread):.3f}, maximum {max(costs.spread):.3f}'
  )
  print(
    f'{"":>3} {"S":>4} {"T":>6} {"workers":>7} {"plan":>16} {"efficiency":>10} {"s/step":>8} '
    f'{"kernel":>8} {"CPU/step":>8} {"calls":>6} {"MB up":>7} {"MB down":>7} {"cores":>6}'
  )
  rows = []
  for index in map(int, args.cases.split(',')) if args.cases else range(len(CASES)):
    case = CASES[index]
    row = measure(case, costs, folder, args.seconds)
    print(line(index, case, row, costs), flush=True)
    rows.append({**case._asdict(), **row._asdict()})
  if args.output:
    with open(args.output, 'w', encoding='utf-8') as file:
      json.dump({'costs': costs._asdict(), 'rows': rows}, file, indent=2)


if __name__ == '__main__':
  main()
