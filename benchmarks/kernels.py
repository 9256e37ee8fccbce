"""Kernel implementations against Neural Tangents, measured in the same run: `python -m
benchmarks.kernels`.

For each architecture and image size: Neural Tangents jitted, warmed, on all cores, at the best of
several block sizes and a single pair at a time; each implementation on raw images (variances and
their gradient included), with XLA's threads as in a run, the runs of all interleaved; medians.
`step` is a vjp at a cotangent that depends on the block: what distillation does. The error is that
of the very block timed, on the entries that Neural Tangents evaluates in float64; the vjp's
cotangent is zero elsewhere, so that its whole gradient is checked. Without Neural Tangents the JAX
kernel in float64 takes its place there, and there are no ratios.

The whole table takes long, most of it Neural Tangents' compilation. Parts of it (--architectures,
--images, --implementations) may be measured one by one: the file keeps the other rows.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import statistics
import time
from concurrent import futures
from typing import Callable

os.environ['OPENBLAS_NUM_THREADS'] = '1'  # before NumPy starts, as in a run


import jax
import jax.numpy as jnp
import numpy as np

import kernels.precision  # noqa: F401
from kernels import architectures, registry

# Of the entries compared with float64, the first rows and columns of a block.
COTANGENT = np.array([[1, -0.5], [0.25, 2]])
CHECKED = len(COTANGENT)
REFERENCE_BLOCKS = ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (64, 64), (256, 256))
BLOCKS = ((10, 16), (10, 64), (10, 256), (256, 1024))
# Of a forward call, and twice that of Neural Tangents' longest: larger blocks gain nothing.
ENOUGH_SECONDS = 2.0
QUANTITIES = ('forward', 'vjp', 'step')
HAS_NEURAL_TANGENTS = importlib.util.find_spec('neural_tangents') is not None


@dataclasses.dataclass
class Row:
  """One line of the table. Times are milliseconds a pair; errors relative, max |difference| / max
  |reference|.

  Ratios: how many times faster than Neural Tangents at its best block, and than Neural Tangents one
  pair at a time.
  """

  architecture: str
  image: str
  implementation: str
  threads: int
  block: str
  forward_ms: float
  vjp_ms: float
  step_ms: float
  forward_ratio: float | None
  vjp_ratio: float | None
  step_ratio: float | None
  forward_ratio_to_single: float | None
  vjp_ratio_to_single: float | None
  step_ratio_to_single: float | None
  block_error: float
  gradient_error: float
  peak_share: float | None
  peak_gflops: float
  load: float


class Candidate:
  """A kernel and the one of `blocks` it is timed on."""

  quantities = QUANTITIES

  def __init__(self, name: str, kernel, images: np.ndarray, more: np.ndarray, blocks):
    self.name, self._kernel = name, kernel
    a_pair = 0.0
    for shape in blocks:
      if np.prod(shape) * a_pair > ENOUGH_SECONDS:
        break
      self.shape = shape
      self._x1, self._x2 = images[: shape[0]], more[: shape[1]]
      self.shapes = dict.fromkeys(QUANTITIES, self.shape)
      self.cotangent = np.zeros(self.shape, np.float32)
      self.cotangent[:CHECKED, :CHECKED] = COTANGENT
      kernel.block(self._x1, self._x2)  # compiles
      a_pair = _seconds(lambda: kernel.block(self._x1, self._x2)) / np.prod(shape)
    self.results = {quantity: run() for quantity, run in self.runs().items()}

  def runs(self) -> dict[str, Callable]:
    return {
      'forward': lambda: self._kernel.block(self._x1, self._x2),
      'vjp': lambda: self._kernel.block_vjp(self._x1, self._x2, self.cotangent),
      'step': lambda: self._kernel.block_vjp(self._x1, self._x2, lambda block: self.cotangent),
    }

  def seconds(self, quantity: str) -> float:
    return _seconds(self.runs()[quantity])


class CandidateElsewhere:
  """A candidate in a process of its own, where each of the kernel's threads has one of XLA's, as in
  a run. Here Neural Tangents has them."""

  quantities = QUANTITIES

  def __init__(self, name: str, *arguments):
    self.name = name
    self._process = futures.ProcessPoolExecutor(
      1, multiprocessing.get_context('spawn'), _settle, (name, *arguments)
    )
    self.shapes, self.results = self._process.submit(_settled).result()

  def seconds(self, quantity: str) -> float:
    return self._process.submit(_seconds_here, quantity).result()


_here: Candidate | None = None  # in such a process


def _settle(
  name: str, architecture, threads: int, images: np.ndarray, more: np.ndarray, blocks
) -> None:
  global _here
  os.environ['NPROC'] = '1'  # JAX has not started
  _here = Candidate(
    name,
    registry.make_kernel(architecture, implementation=name, threads=threads),
    images,
    more,
    blocks,
  )


def _settled():
  return _here.shapes, _here.results


def _seconds_here(quantity: str) -> float:
  return _here.seconds(quantity)


class NeuralTangents:
  """The peer: its kernel function, jitted, in float32, at the best of `blocks` for each
  quantity."""

  quantities = QUANTITIES[:2]

  def __init__(self, name: str, architecture, images: np.ndarray, more: np.ndarray, blocks):
    self.name = name
    self._functions = dict(zip(self.quantities, _neural_tangents(architecture)))
    self.shapes, self._arguments, best = {}, {}, dict.fromkeys(self._functions, np.inf)
    for a, b in blocks:
      if min(len(images) - a, len(more) - b) < 0:
        break
      arguments = jnp.asarray(images[:a]), jnp.asarray(more[:b])
      try:
        seconds = {
          quantity: self._warm(function, arguments)
          for quantity, function in self._functions.items()
        }
      except jax.errors.JaxRuntimeError:  # out of memory
        break
      for quantity, value in seconds.items():
        if value / (a * b) < best[quantity]:
          best[quantity], self.shapes[quantity], self._arguments[quantity] = (
            value / (a * b),
            (a, b),
            arguments,
          )
      if max(seconds.values()) > 2 * ENOUGH_SECONDS:
        break
    self.shapes['step'] = self.shapes['vjp']

  def _warm(self, function, arguments) -> float:
    jax.block_until_ready(function(*arguments))
    return _seconds(lambda: jax.block_until_ready(function(*arguments)))

  def seconds(self, quantity: str) -> float:
    return _seconds(
      lambda: jax.block_until_ready(self._functions[quantity](*self._arguments[quantity]))
    )


@functools.cache
def _neural_tangents(architecture):
  """Its forward, and its forward and vjp, jitted."""
  from kernels import reference  # here, because it may not be there

  kernel_fn = reference.network(architecture)[2]

  def block(x1, x2):
    with jax.default_matmul_precision('highest'):  # no TF32
      return kernel_fn(x1, x2, get='ntk')

  def block_vjp(x1, x2):
    value, pull_back = jax.vjp(lambda x: block(x, x2), x1)
    return value, pull_back(jnp.ones_like(value))

  return jax.jit(block), jax.jit(block_vjp)


def measure(
  name: str,
  image: tuple[int, int, int],
  implementations: list[str],
  threads: int,
  runs: int,
  peak: float,
  with_peer: bool = HAS_NEURAL_TANGENTS,
) -> list[Row]:
  """One row per implementation, those of Neural Tangents first, if it is there."""
  architecture = architectures.get(name)
  rng = np.random.default_rng(0)
  x1, x2 = (
    rng.standard_normal((max(shape[i] for shape in BLOCKS), *image)).astype(np.float32)
    for i in (0, 1)
  )
  oracle = registry.make_kernel(
    architecture,
    implementation='reference' if HAS_NEURAL_TANGENTS else 'jax',
    dtype='float64',
    threads=1,
  )
  expected = oracle.block_vjp(x1[:CHECKED], x2[:CHECKED], COTANGENT)
  peers = (
    [
      NeuralTangents('neural tangents', architecture, x1, x2, REFERENCE_BLOCKS),
      NeuralTangents('  one pair', architecture, x1, x2, REFERENCE_BLOCKS[:1]),
    ]
    if with_peer
    else []
  )
  candidates = list(_candidates(architecture, implementations, threads, x1, x2))
  timed = [*peers, *candidates]
  seconds = {(c.name, quantity): [] for c in timed for quantity in QUANTITIES}
  for _ in range(runs):
    for c in timed:
      for quantity in c.quantities:
        seconds[c.name, quantity].append(c.seconds(quantity))
    for peer in peers:
      seconds[peer.name, 'step'] = seconds[peer.name, 'vjp']  # its vjp yields the block for nothing
  milliseconds = {
    (c.name, quantity): 1e3
    * statistics.median(seconds[c.name, quantity])
    / np.prod(c.shapes[quantity])
    for c in timed
    for quantity in QUANTITIES
  }
  rows, work = [], operations(architecture, image)
  for c in timed:
    block_error = gradient_error = float('nan')
    if c in candidates:
      block_error = max(
        _error(result[:CHECKED, :CHECKED], expected[0])
        for result in (c.results['forward'], c.results['vjp'][0], c.results['step'][0])
      )
      gradient_error = max(
        _error(c.results[quantity][1][:CHECKED], expected[1]) for quantity in ('vjp', 'step')
      )
    times = [milliseconds[c.name, quantity] for quantity in QUANTITIES]
    ratios = [
      milliseconds[peer.name, quantity] / milliseconds[c.name, quantity] if peer else None
      for peer in peers or (None, None)
      for quantity in QUANTITIES
    ]
    share = None if c in peers else work / (times[0] * 1e-3) / peak
    rows.append(
      Row(
        name,
        '{}x{}x{}'.format(*image),
        c.name,
        threads,
        '{}x{}'.format(*c.shapes['vjp']),
        *times,
        *ratios,
        block_error,
        gradient_error,
        share,
        peak / 1e9,
        os.getloadavg()[0],
      )
    )
  return rows


def operations(architecture: architectures.Architecture, image: tuple[int, int, int]) -> int:
  """Floating-point operations a pair that the forward recursion takes by offsets (a square root
  counts as one, a polynomial as 16)."""
  total, first = 0, True
  plan = architectures.band_plan(architecture, *image[:2])
  for p, level in enumerate(plan):
    entries = np.prod(
      [
        sum(size - abs(d) for d in range(-radius, radius + 1))
        for size, radius in ((level.height, level.radius_h), (level.width, level.radius_w))
      ]
    )
    total += entries * (3 * image[2] if not p else 0)
    for _ in range(level.convs):
      total += entries * (41 if first else 45)
      first = False
    total += entries * 4
  return int(total) or 2 * int(np.prod(image))


def peak_flops(size: int = 2048) -> float:
  """Multiplications and additions a second of a float32 matrix product (no TF32) on all of JAX's
  device: the best of ten."""
  a = jnp.ones((size, size), jnp.float32)
  product = jax.jit(lambda a, b: jnp.dot(a, b, precision='highest'))
  jax.block_until_ready(product(a, a))
  return (
    2 * size**3 / min(_seconds(lambda: jax.block_until_ready(product(a, a))) for _ in range(10))
  )


def _candidates(architecture, implementations, threads, *images):
  for implementation in implementations:
    if implementation == 'jax' and jax.default_backend() == 'cpu':
      yield CandidateElsewhere(implementation, architecture, threads, *images, BLOCKS)
      continue
    yield Candidate(
      implementation,
      registry.make_kernel(architecture, implementation=implementation, threads=threads),
      *images,
      BLOCKS,
    )
    if implementation == 'native':
      forced = os.environ.get('KIP_INSTRUCTION_SET')
      for name in ('avx2', 'portable'):
        os.environ['KIP_INSTRUCTION_SET'] = name
        try:
          yield Candidate(
            f'native {name}',
            registry.make_kernel(architecture, implementation='native', threads=threads),
            *images,
            BLOCKS,
          )
        except ValueError:  # this machine lacks it
          pass
      os.environ.pop('KIP_INSTRUCTION_SET')
      if forced:
        os.environ['KIP_INSTRUCTION_SET'] = forced


def _seconds(run) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def _error(value, expected) -> float:
  return float(np.abs(value - expected).max() / np.abs(expected).max())


def heading(unit: str = 'ms') -> str:
  """Of `line`s."""
  return (
    f'{"":36}{"block":>9}{unit + " a pair":>33}{"times faster than NT / one pair":>39}{"error":>17}{"of peak":>9}\n'
    f'{"":36}{"":9}'
    + ''.join(f'{q:>11}' for q in QUANTITIES)
    + ''.join(f'{q:>13}' for q in QUANTITIES)
    + f'{"block":>9}{"grad":>8}'
  )


def line(row: Row, units_a_ms: float = 1.0) -> str:
  """A row in print."""
  times = ''.join(f'{ms * units_a_ms:11.4g}' for ms in (row.forward_ms, row.vjp_ms, row.step_ms))
  ratios = ((getattr(row, f'{q}_ratio'), getattr(row, f'{q}_ratio_to_single')) for q in QUANTITIES)
  ratios = ''.join(
    f'{"-" if best is None else _ratio(best) + " / " + _ratio(single):>13}'
    for best, single in ratios
  )
  errors = (
    ''
    if row.peak_share is None
    else f'{row.block_error:9.0e}{row.gradient_error:8.0e}{row.peak_share:9.0%}'
  )
  return (
    f'{row.architecture:9}{row.image:9}{row.implementation:18}{row.block:>9}{times}{ratios}{errors}'
  )


def _ratio(value: float) -> str:
  return f'{value:.0f}' if value >= 10 else f'{value:.2g}'


def _keep(path: str, rows: list[Row]) -> None:
  """Puts `rows` in place of those of the same architecture, image and implementation."""
  key = lambda row: (row['architecture'], row['image'], row['implementation'])
  kept = {}
  if os.path.exists(path):
    with open(path, encoding='utf-8') as file:
      kept = {key(row): row for row in json.load(file)}
  kept.update((key(row), row) for row in map(dataclasses.asdict, rows))
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(list(kept.values()), file, indent=1)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--architectures', default='fc1,conv3,convnet,myrtle5,myrtle10')
  parser.add_argument('--images', default='32x32x3,28x28x1')
  parser.add_argument('--implementations', help='by default all that this machine can run')
  parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument('--runs', type=int, default=5)
  parser.add_argument(
    '--json', default='benchmarks/kernels.json', help='where to write the table as JSON'
  )
  args = parser.parse_args()
  implementations = (
    args.implementations.split(',')
    if args.implementations
    else [name for name in registry.available() if name != 'reference']
  )
  peak = peak_flops()
  print(
    f'{args.threads} threads; a float32 matrix product reaches {peak / 1e9:.0f} GFLOP/s; load {os.getloadavg()[0]:.1f}'
  )
  print(heading())
  for name in args.architectures.split(','):
    for image in args.images.split(','):
      rows = measure(
        name, tuple(map(int, image.split('x'))), implementations, args.threads, args.runs, peak
      )
      print(*map(line, rows), sep='\n', flush=True)
      _keep(args.json, rows)


if __name__ == '__main__':
  main()
