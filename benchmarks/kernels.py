"""Times the kernel implementations beside Neural Tangents, in the same run.

    python -m benchmarks.kernels

For each architecture and image size: Neural Tangents, jitted and warmed, on all cores, at the best
of several block sizes and at a single pair; and each implementation on raw images (so the variances
and their gradient are included), with XLA's threads as in a run. The runs of all are interleaved;
times are medians. 'step' is a vjp at a cotangent that depends on the block, as in distillation.

Errors are those of the blocks that were timed, in the corner that an oracle evaluates in float64;
the vjp's cotangent is zero elsewhere, so its gradient is checked as a whole. The oracle is Neural
Tangents or, without it, the JAX kernel; then there are no ratios either.

The whole table takes long, most of it for Neural Tangents' compilation. Parts of it
(--architectures, --images, --implementations) may be measured one by one: the JSON file keeps the
other rows.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, ClassVar

os.environ['OPENBLAS_NUM_THREADS'] = '1'  # before NumPy starts, as in a run


import jax
import jax.numpy as jnp
import numpy as np

import kernels.precision  # noqa: F401
from kernels import architectures, contract, cpus, registry

COTANGENT = np.array([[1, -0.5], [0.25, 2]])  # in the corner that is compared with float64
CHECKED = len(COTANGENT)  # its rows and columns
REFERENCE_BLOCKS = ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (64, 64), (256, 256))
BLOCKS = ((10, 16), (10, 64), (10, 256), (256, 1024))
# Blocks that take longer forward, or twice as long with Neural Tangents, gain nothing.
ENOUGH_SECONDS = 2.0
QUANTITIES = ('forward', 'vjp', 'step')
Shape = tuple[int, int]
# Beside the names of kernels/architectures.py: Arora et al. 2019 (https://arxiv.org/abs/1904.11955).
DESCRIBED = {
  'cntk_gap': {'stages': [{'convs': 2, 'pool': False}], 'readout': 'global_average_pool'}
}
HAS_NEURAL_TANGENTS = importlib.util.find_spec('neural_tangents') is not None


@dataclasses.dataclass
class Row:
  """One line of the table.

  Times are milliseconds a pair, errors max |difference| / max |reference|. Ratios are Neural
  Tangents' times over these, at its best block size and, `…_to_single`, one pair at a time.
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
  """A kernel on the largest of `blocks` that takes ENOUGH_SECONDS, or the largest."""

  quantities: ClassVar = QUANTITIES

  def __init__(
    self,
    name: str,
    kernel: contract.Kernel,
    images: np.ndarray,
    more: np.ndarray,
    blocks: Sequence[Shape],
  ):
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

  def runs(self) -> dict[str, Callable[[], Any]]:
    """Functions that compute each quantity."""
    return {
      'forward': lambda: self._kernel.block(self._x1, self._x2),
      'vjp': lambda: self._kernel.block_vjp(self._x1, self._x2, self.cotangent),
      'step': lambda: self._kernel.block_vjp(self._x1, self._x2, lambda block: self.cotangent),
    }

  def seconds(self, quantity: str) -> float:
    """Times one run."""
    return _seconds(self.runs()[quantity])


class CandidateElsewhere:
  """A candidate in a process of its own, where each of the kernel's threads has one of XLA's.

  So it is in a run; in this process all threads are Neural Tangents'.
  """

  quantities: ClassVar = QUANTITIES

  def __init__(
    self,
    name: str,
    architecture: architectures.Architecture,
    threads: int,
    images: np.ndarray,
    more: np.ndarray,
    blocks: Sequence[Shape],
  ):
    self.name = name
    self._process = futures.ProcessPoolExecutor(
      1,
      multiprocessing.get_context('spawn'),
      _make_here,
      (name, architecture, threads, images, more, blocks),
    )
    self.shapes, self.results = self._process.submit(_results_here).result()

  def seconds(self, quantity: str) -> float:
    """Times one run."""
    return self._process.submit(_seconds_here, quantity).result()


_here: list[Candidate] = []  # the one of such a process


def _make_here(name, architecture, threads, images, more, blocks) -> None:
  os.environ['NPROC'] = '1'  # JAX has not started
  kernel = registry.make_kernel(architecture, implementation=name, threads=threads)
  _here.append(Candidate(name, kernel, images, more, blocks))


def _results_here():
  return _here[0].shapes, _here[0].results


def _seconds_here(quantity: str) -> float:
  return _here[0].seconds(quantity)


class NeuralTangents:
  """The peer: its kernel function, jitted, in float32, at the best of `blocks` a quantity."""

  quantities: ClassVar = QUANTITIES[:2]

  def __init__(
    self,
    name: str,
    architecture: architectures.Architecture,
    images: np.ndarray,
    more: np.ndarray,
    blocks: Sequence[Shape],
  ):
    self.name = name
    self._functions: dict[str, Callable] = dict(
      zip(self.quantities, _neural_tangents(architecture))
    )
    self.shapes: dict[str, Shape] = {}
    self._arguments: dict[str, tuple[jax.Array, jax.Array]] = {}
    best: dict[str, float] = dict.fromkeys(self._functions, np.inf)
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
          best[quantity] = value / (a * b)
          self.shapes[quantity], self._arguments[quantity] = (a, b), arguments
      if max(seconds.values()) > 2 * ENOUGH_SECONDS:
        break
    self.shapes['step'] = self.shapes['vjp']

  def _warm(self, function, arguments) -> float:
    jax.block_until_ready(function(*arguments))
    return _seconds(lambda: jax.block_until_ready(function(*arguments)))

  def seconds(self, quantity: str) -> float:
    """Times one run."""
    return _seconds(
      lambda: jax.block_until_ready(self._functions[quantity](*self._arguments[quantity]))
    )


@functools.cache
def _neural_tangents(architecture):
  """Its forward function, and its forward and vjp, jitted."""
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
  """Makes the rows of an architecture and an image size.

  Args:
    name: of the architecture, there or in DESCRIBED.
    image: H, W, D.
    implementations: in the order of their rows.
    threads: of each kernel.
    runs: of which times are the medians.
    peak: operations a second of the device.
    with_peer: whether Neural Tangents is timed; its two rows come first.
  """
  architecture = architectures.get(DESCRIBED.get(name, name))
  rng = np.random.default_rng(0)
  sizes = map(max, zip(*BLOCKS))
  x1, x2 = (rng.standard_normal((size, *image)).astype(np.float32) for size in sizes)
  by = 'reference' if HAS_NEURAL_TANGENTS else 'jax'
  oracle = registry.make_kernel(architecture, implementation=by, dtype='float64', threads=1)
  expected = oracle.block_vjp(x1[:CHECKED], x2[:CHECKED], COTANGENT)
  peers = []
  if with_peer:
    peers = [
      NeuralTangents('neural tangents', architecture, x1, x2, REFERENCE_BLOCKS),
      NeuralTangents('  one pair', architecture, x1, x2, REFERENCE_BLOCKS[:1]),
    ]
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
    / float(np.prod(c.shapes[quantity]))
    for c in timed
    for quantity in QUANTITIES
  }
  rows, work = [], operations(architecture, image)
  for c in timed:
    block_error, gradient_error, share = float('nan'), float('nan'), None
    if not isinstance(c, NeuralTangents):
      block_error, gradient_error = _errors(c.results, *expected)
      share = work / (milliseconds[c.name, 'forward'] * 1e-3) / peak
    ratios: dict[str, float | None] = {
      f'{quantity}_ratio{of}': peer
      and milliseconds[peer.name, quantity] / milliseconds[c.name, quantity]
      for of, peer in zip(('', '_to_single'), peers or (None, None))
      for quantity in QUANTITIES
    }
    rows.append(
      Row(
        architecture=name,
        image='{}x{}x{}'.format(*image),
        implementation=c.name,
        threads=threads,
        block='{}x{}'.format(*c.shapes['vjp']),
        forward_ms=milliseconds[c.name, 'forward'],
        vjp_ms=milliseconds[c.name, 'vjp'],
        step_ms=milliseconds[c.name, 'step'],
        **ratios,
        block_error=block_error,
        gradient_error=gradient_error,
        peak_share=share,
        peak_gflops=peak / 1e9,
        load=os.getloadavg()[0],
      )
    )
  return rows


def _errors(
  results: Mapping[str, Any], block: np.ndarray, gradient: np.ndarray
) -> tuple[float, float]:
  """The largest errors of a candidate's blocks and gradients in the corner that is known."""
  blocks = results['forward'], results['vjp'][0], results['step'][0]
  gradients = results['vjp'][1], results['step'][1]
  return (
    max(_error(found[:CHECKED, :CHECKED], block) for found in blocks),
    max(_error(found[:CHECKED], gradient) for found in gradients),
  )


def operations(architecture: architectures.Architecture, image: tuple[int, int, int]) -> int:
  """Floating-point operations that the forward recursion takes for a pair.

  A square root counts as one, a polynomial as 16.
  """
  total, first = 0, True
  for p, level in enumerate(architectures.band_plan(architecture, *image[:2])):
    entries = 1
    for size, radius in ((level.height, level.radius_h), (level.width, level.radius_w)):
      entries *= sum(size - abs(d) for d in range(-radius, radius + 1))
    total += entries * (4 if p else 4 + 3 * image[2])
    for _ in range(level.convs):
      total += entries * (41 if first else 45)
      first = False
  return total or 2 * math.prod(image)


def peak_flops(size: int = 2048) -> float:
  """Operations a second of a float32 matrix product (no TF32) on JAX's device: the best of ten."""
  a = jnp.ones((size, size), jnp.float32)
  product = jax.jit(lambda a, b: jnp.dot(a, b, precision='highest'))
  jax.block_until_ready(product(a, a))
  best = min(_seconds(lambda: jax.block_until_ready(product(a, a))) for _ in range(10))
  return 2 * size**3 / best


def _candidates(
  architecture: architectures.Architecture,
  implementations: Sequence[str],
  threads: int,
  images: np.ndarray,
  more: np.ndarray,
) -> Iterator[Candidate | CandidateElsewhere]:
  """Makes the candidates; the native kernel with each instruction set that is there."""

  def candidate(name: str, implementation: str) -> Candidate:
    kernel = registry.make_kernel(architecture, implementation=implementation, threads=threads)
    return Candidate(name, kernel, images, more, BLOCKS)

  for implementation in implementations:
    if implementation == 'jax' and jax.default_backend() == 'cpu':
      yield CandidateElsewhere(implementation, architecture, threads, images, more, BLOCKS)
      continue
    yield candidate(implementation, implementation)
    if implementation == 'native':
      from kernels.native import kernel as native

      for name in native.supported_instruction_sets()[1:]:
        with _instruction_set(name):
          yield candidate(f'native {name}', 'native')


@contextlib.contextmanager
def _instruction_set(name: str) -> Iterator[None]:
  """Makes native kernels use an instruction set."""
  variable = 'KIP_INSTRUCTION_SET'
  forced = os.environ.get(variable)
  os.environ[variable] = name
  try:
    yield
  finally:
    os.environ.pop(variable)
    if forced is not None:
      os.environ[variable] = forced


def _seconds(run: Callable[[], Any]) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def _error(value: np.ndarray, expected: np.ndarray) -> float:
  return float(np.abs(value - expected).max() / np.abs(expected).max())


def heading(unit: str = 'ms') -> str:
  """Two lines above `line`s."""
  times, ratios = (''.join(f'{q:>{width}}' for q in QUANTITIES) for width in (11, 13))
  return (
    f'{"":36}{"block":>9}{unit + " a pair":>33}{"times faster than NT / one pair":>39}'
    f'{"error":>17}{"of peak":>9}\n'
    f'{"":45}{times}{ratios}{"block":>9}{"grad":>8}'
  )


def line(row: Row, units_a_ms: float = 1.0) -> str:
  """Formats a row."""
  text = f'{row.architecture:9}{row.image:9}{row.implementation:18}{row.block:>9}'
  text += ''.join(f'{ms * units_a_ms:11.4g}' for ms in (row.forward_ms, row.vjp_ms, row.step_ms))
  for q in QUANTITIES:
    best, single = getattr(row, f'{q}_ratio'), getattr(row, f'{q}_ratio_to_single')
    text += f'{"-" if best is None else _ratio(best) + " / " + _ratio(single):>13}'
  if row.peak_share is not None:
    text += f'{row.block_error:9.0e}{row.gradient_error:8.0e}{row.peak_share:9.0%}'
  return text


def _ratio(value: float) -> str:
  return f'{value:.0f}' if value >= 10 else f'{value:.2g}'


def _keep(path: str, rows: list[Row]) -> None:
  """Writes `rows` to a file, in place of those of the same architecture, image, implementation."""
  all_rows = [dataclasses.asdict(row) for row in rows]
  if os.path.exists(path):
    with open(path, encoding='utf-8') as file:
      all_rows = json.load(file) + all_rows
  kept = {(row['architecture'], row['image'], row['implementation']): row for row in all_rows}
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(list(kept.values()), file, indent=1)


def parse_image(text: str) -> tuple[int, int, int]:
  """Reads an image's size, 'HxWxD'."""
  height, width, channels = map(int, text.split('x'))
  return height, width, channels


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--architectures', default='fc1,conv3,convnet,myrtle5,myrtle10')
  parser.add_argument('--images', default='32x32x3,28x28x1')
  parser.add_argument('--implementations', help='by default all that this machine can run')
  parser.add_argument('--threads', type=int, default=cpus.available())
  parser.add_argument('--runs', type=int, default=5)
  parser.add_argument(
    '--json', default='benchmarks/kernels.json', help='where to write the table as JSON'
  )
  args = parser.parse_args()
  implementations = [name for name in registry.available() if name != 'reference']
  if args.implementations:
    implementations = args.implementations.split(',')
  peak = peak_flops()
  print(
    f'{args.threads} threads; a float32 matrix product reaches {peak / 1e9:.0f} GFLOP/s; '
    f'load {os.getloadavg()[0]:.1f}'
  )
  print(heading())
  for name in args.architectures.split(','):
    for image in map(parse_image, args.images.split(',')):
      rows = measure(name, image, implementations, args.threads, args.runs, peak)
      print(*map(line, rows), sep='\n', flush=True)
      _keep(args.json, rows)


if __name__ == '__main__':
  main()
