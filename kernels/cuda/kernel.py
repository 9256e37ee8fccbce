"""NTK blocks by a fused CUDA kernel, compiled at run time for an architecture and image shape.

CuPy compiles (by NVRTC), launches and holds memory. The contract is NumPy in and out, so that JAX
has no part in it, and its memory pool none of the GPU's; a handler of XLA's foreign function
interface would need a C++ compiler or a binary for each CUDA version, and cuda.core has no arrays:
both would be more code here. A process that uses this kernel may keep JAX on the CPU
(JAX_PLATFORMS=cpu).

Pallas cannot keep a pair on chip: its Triton lowering (JAX 0.5.3 and 0.12.0) refuses slices and
rolls of a value, with which a convolution shifts a band by a pixel, and sizes that are no powers of
two, as images of 28 pixels have; the Mosaic one is for Hopper and later alone.
"""

import abc
import ctypes
import functools
import importlib.util
import pathlib
from typing import Any, Protocol

import numpy as np

from kernels import architectures
from kernels.contract import Cotangent, Images, Kernel, Linearised, Prepared, pixels
from kernels.cuda import plan as planning

OPTIONS = ('--std=c++17', '-default-device', '--ftz=true')

# One part of the second images' tables.
TABLE_BYTES = 2**29


class Device(Protocol):
  """A machine that runs a plan's source: a GPU, or a stand-in for one in tests.

  Arrays on it have `nbytes`, `shape`, slices and `reshape` as NumPy's do.

  Attributes:
    name: the model's.
    compiler: what compiles the source, with its version.
    threads, shared_bytes: of a block, at most.
    kept_bytes: for derivatives of pairs that wait for a cotangent; and, besides, for those that are
      contracted with it at once.
    table_bytes: for one part of the second images' tables.
  """

  name: str
  compiler: str
  threads: int
  shared_bytes: int
  kept_bytes: int
  table_bytes: int

  def load(self, plan: planning.Plan) -> Any:
    """Compiles a plan's source; returns a program for `blocks` and `launch`."""
    ...

  def blocks(self, program: Any, name: str, work: int) -> int:
    """How many blocks to launch of the kernel `name`, for `work` pieces."""
    ...

  def launch(
    self, program: Any, name: str, blocks: int, plan: planning.Plan, arguments: tuple
  ) -> None: ...

  def upload(self, value: np.ndarray) -> Any: ...

  def download(self, value: Any) -> np.ndarray: ...

  def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Any: ...

  def zeros(self, shape: int | tuple[int, ...], dtype: Any) -> Any: ...


class Gpu(Device):
  """The current device, by CuPy."""

  table_bytes = TABLE_BYTES

  def __init__(self):
    _load_nvrtc()
    import cupy  # pyright: ignore[reportMissingImports]

    self._cupy = cupy
    self.compiler = 'NVRTC {}.{}'.format(*cupy.cuda.nvrtc.getVersion())
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    self.name, self.threads = properties['name'].decode(), planning.THREADS
    self.shared_bytes = properties['sharedMemPerBlockOptin']
    self._processors, self._memory = properties['multiProcessorCount'], properties['totalGlobalMem']
    self.kept_bytes = self._memory // 8

  def load(self, plan: planning.Plan):
    """Compiles a plan's source.

    Returns:
      a function from a kernel's name to the kernel and the number of blocks to launch at most: all
      that the device holds at once, their workspaces permitting.
    """
    module = self._cupy.RawModule(code=plan.source, options=OPTIONS)

    @functools.cache
    def function(name: str):
      kernel = module.get_function(name)
      kernel.max_dynamic_shared_size_bytes = plan.shared_bytes
      resident = self._cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
        kernel.kernel.ptr, plan.threads, plan.shared_bytes
      )
      most = self._memory // 8 // max(1, plan.workspace_bytes)
      return kernel, max(1, min(resident * self._processors, most))

    return function

  def blocks(self, program, name: str, work: int) -> int:
    return min(work, program(name)[1])

  def launch(self, program, name: str, blocks: int, plan: planning.Plan, arguments: tuple) -> None:
    arguments = tuple(np.int32(a) if isinstance(a, int) else a for a in arguments)
    program(name)[0]((blocks,), (plan.threads,), arguments, shared_mem=plan.shared_bytes)

  def upload(self, value: np.ndarray):
    return self._cupy.asarray(np.ascontiguousarray(value))

  def download(self, value) -> np.ndarray:
    return self._cupy.asnumpy(value)

  def empty(self, shape, dtype):
    return self._cupy.empty(shape, dtype)

  def zeros(self, shape, dtype):
    # Cupy.zeros would compile a kernel, for which there may be no headers.
    value = self._cupy.empty(shape, dtype)
    value.data.memset_async(0, value.nbytes)
    return value


def is_available() -> bool:
  """Whether CuPy is installed and finds a device."""
  if importlib.util.find_spec('cupy') is None:
    return False
  _load_nvrtc()
  import cupy  # pyright: ignore[reportMissingImports]

  try:
    return cupy.cuda.runtime.getDeviceCount() > 0
  except cupy.cuda.runtime.CUDARuntimeError:
    return False


@functools.cache
def _load_nvrtc() -> None:
  """Loads NVRTC from its wheel, where CuPy 13 does not look (14 does)."""
  spec = importlib.util.find_spec('nvidia')
  for folder in (spec.submodule_search_locations if spec else None) or ():
    for path in sorted(pathlib.Path(folder).glob('cuda_nvrtc/lib/libnvrtc.so.*')):
      ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


@functools.cache
def current_gpu() -> Device:
  """The GPU of this process.

  Raises:
    ValueError: there is none, or no CuPy.
  """
  if not is_available():
    raise ValueError(
      'implementation: the CUDA kernel needs CuPy and a GPU with its driver; `make cuda` installs '
      'CuPy.'
    )
  return Gpu()


class CudaKernel(Kernel):
  """NTK (or NNGP) blocks on a GPU: O(A·B·H·W·offsets) time.

  Takes memory O(A + B) there, and `kept_bytes` for derivatives. Images' variances are computed anew
  for each block: that takes less time than handing them over.
  """

  implementation = 'cuda'

  def __init__(
    self,
    architecture: architectures.Architecture,
    dtype: str,
    kind: str = 'ntk',
    gpu: Device | None = None,
  ):
    """`gpu` is by default the current one."""
    self.architecture = architecture
    self.dtype = np.dtype(dtype)
    self._kind = kind
    self._gpu = gpu or current_gpu()
    self.device, self.compiled = self._gpu.name, self._gpu.compiler
    self.kept_bytes = 2 * self._gpu.kept_bytes
    self._programs: dict[tuple[int, ...], _Program] = {}

  def prepare(self, x: np.ndarray) -> Prepared:
    """See `Kernel.prepare`: nothing is computed ahead."""
    return Prepared(x, [], self)

  def block(self, x1: Images, x2: Images) -> np.ndarray:
    """See `Kernel.block`."""
    x1, x2 = pixels(x1), pixels(x2)
    return self._program(x1).block(x1, x2)

  def block_vjp(
    self, x1: Images, x2: Images, cotangent: Cotangent
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `Kernel.block_vjp`."""
    x1, x2 = pixels(x1), pixels(x2)
    if callable(cotangent):
      block, pull_back, _ = self.linearise(x1, x2)
      return block, pull_back(cotangent(block))
    return self._program(x1).block_vjp(x1, x2, cotangent)

  def linearise(self, x1: Images, x2: Images) -> Linearised:
    """See `Kernel.linearise`.

    The derivatives by x1 are kept on the GPU pair by pair (22 kB a pair for a ConvNet on 32x32x3),
    unless they are too many: then they are computed when the cotangent is known.
    """
    x1, x2 = pixels(x1), pixels(x2)
    program = self._program(x1)
    if program.derivatives_bytes(len(x1), len(x2)) <= self._gpu.kept_bytes:
      return program.linearise(x1, x2)
    return super().linearise(x1, x2)

  def _program(self, x: np.ndarray) -> '_Program':
    """The program for images of x's shape, compiled when it is first needed."""
    shape = x.shape[1:]
    if shape not in self._programs:
      make = _Convolutional if self.architecture.is_convolutional else _Dense
      plan = planning.make_plan(
        self.architecture,
        shape,
        str(self.dtype),
        self._kind,
        self._gpu.threads,
        self._gpu.shared_bytes,
      )
      self._programs[shape] = make(self._gpu, plan, self.dtype)
    return self._programs[shape]


class _Program(abc.ABC):
  """A compiled plan, and what the kernel asks of it: see `Kernel`."""

  def __init__(self, gpu: Device, plan: planning.Plan, dtype: np.dtype):
    self._gpu, self._plan, self._dtype = gpu, plan, dtype
    self._module = gpu.load(plan)

  @abc.abstractmethod
  def block(self, x1: np.ndarray, x2: np.ndarray) -> np.ndarray: ...

  @abc.abstractmethod
  def block_vjp(
    self, x1: np.ndarray, x2: np.ndarray, cotangent: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]: ...

  @abc.abstractmethod
  def linearise(self, x1: np.ndarray, x2: np.ndarray) -> Linearised: ...

  @abc.abstractmethod
  def derivatives_bytes(self, rows: int, columns: int) -> int:
    """The memory that `linearise` takes for a block [rows, columns]."""

  def _blocks(self, name: str, work: int) -> int:
    return self._gpu.blocks(self._module, name, work)

  def _launch(self, name: str, blocks: int, *arguments) -> None:
    self._gpu.launch(self._module, name, blocks, self._plan, arguments)


class _Convolutional(_Program):
  """A network that has a convolution, a pooling, or more offsets than one."""

  def __init__(self, gpu: Device, plan: planning.Plan, dtype: np.dtype):
    super().__init__(gpu, plan, dtype)
    self._workspace: Any = None

  def block(self, x1, x2):
    symmetric = x1 is x2
    left, values = self._tables(x1), np.empty((len(x1), len(x2)), self._dtype)
    for first, last in self._parts(len(x2), len(x2)):
      right = [table[first:last] for table in left] if symmetric else self._tables(x2[first:last])
      part = self._gpu.empty((len(x1), last - first), self._dtype)
      diagonal = first if symmetric else len(x1)
      self._run('kip_block', part.size, *left, *right, *part.shape, diagonal, part)
      values[:, first:last] = self._gpu.download(part)
    return np.triu(values) + np.triu(values, 1).T if symmetric else values

  def block_vjp(self, x1, x2, cotangent):
    """See `Kernel.block_vjp`: part by part, each contracted with its cotangent at once."""
    left, values, sums = self._tables(x1), np.empty((len(x1), len(x2)), self._dtype), self._sums(x1)
    most = max(1, self._gpu.kept_bytes // self.derivatives_bytes(len(x1), 1))
    for first, last in self._parts(len(x2), most):
      part, derivatives = self._derivatives(left, x2[first:last])
      values[:, first:last] = self._gpu.download(part)
      self._contract(derivatives, cotangent[:, first:last], sums)
    return values, self._gradient(x1, left, sums)

  def linearise(self, x1, x2):
    left = self._tables(x1)
    values, derivatives = self._derivatives(left, x2)

    def pull_back(cotangent: np.ndarray) -> np.ndarray:
      sums = self._sums(x1)
      self._contract(derivatives, cotangent, sums)
      return self._gradient(x1, left, sums)

    nbytes = left[0].nbytes + derivatives.nbytes
    return Linearised(self._gpu.download(values), pull_back, nbytes)

  def derivatives_bytes(self, rows, columns):
    return rows * columns * max(1, self._plan.derivatives) * self._dtype.itemsize

  def _derivatives(self, left, x2):
    """The block [A, B], and its pairs' derivatives by x1 [A, B, plan.derivatives]."""
    shape = len(left[0]), len(x2)
    values = self._gpu.empty(shape, self._dtype)
    derivatives = self._gpu.empty((*shape, self._plan.derivatives), self._dtype)
    self._run('kip_derivatives', values.size, *left, *self._tables(x2), *shape, values, derivatives)
    return values, derivatives

  def _sums(self, x1):
    return self._gpu.zeros((len(x1), self._plan.derivatives), np.float64)

  def _contract(self, derivatives, cotangent, sums):
    """Adds the derivatives [A, B, ...], weighted by the cotangent [A, B], to the sums [A, ...]."""
    blocks = self._blocks('kip_contract', -(-sums.size // self._plan.threads))
    weights = self._gpu.upload(cotangent)
    self._launch('kip_contract', blocks, derivatives, weights, *derivatives.shape[:2], sums)

  def _gradient(self, x1, left, sums) -> np.ndarray:
    """Pulls the sums back through x1's tables: [A, H, W, D]."""
    gradient = self._gpu.empty((len(x1), self._plan.pixels), np.float64)
    self._run('kip_tables_vjp', len(x1), *left, sums, gradient, len(x1))
    return _from_planes(self._gpu.download(gradient), x1.shape).astype(self._dtype)

  def _parts(self, count: int, most: int) -> list[tuple[int, int]]:
    """Ranges of the `count` second images, of at most `most`, whose tables are not too large."""
    table_bytes = self._plan.table * self._dtype.itemsize
    columns = min(most, max(1, self._gpu.table_bytes // table_bytes))
    return [(first, min(first + columns, count)) for first in range(0, count, columns)]

  def _tables(self, x):
    """Tables [N, plan.table], and what hidden layers need of the readout in float64, [N, 2]."""
    # A thread may read, though not use, what lies before or behind a table: a number.
    margin = x[0].size // x.shape[3] + 4 * sum(x.shape[1:3]) + 16
    memory = self._gpu.zeros(len(x) * self._plan.table + 2 * margin, self._dtype)
    tables = memory[margin:-margin].reshape(len(x), self._plan.table)
    readouts = self._gpu.empty((len(x), 2), np.float64)
    self._run('kip_tables', len(x), self._gpu.upload(x), tables, readouts, len(x))
    return tables, readouts

  def _run(self, name: str, work: int, *arguments) -> None:
    """Launches a kernel whose blocks have workspaces, for `work` pairs or images."""
    blocks = self._blocks(name, work)
    if self._workspace is None or len(self._workspace) < blocks:
      self._workspace = None  # Frees the smaller one first.
      self._workspace = self._gpu.empty((blocks, max(1, self._plan.workspace)), self._dtype)
    self._launch(name, blocks, *arguments, self._workspace)


class _Dense(_Program):
  """A fully-connected network. Memory O(A·B)."""

  def block(self, x1, x2):
    values = self._gpu.download(self._forward(x1, x2)[0])
    return np.triu(values) + np.triu(values, 1).T if x1 is x2 else values

  def block_vjp(self, x1, x2, cotangent):
    values, pull_back, _ = self.linearise(x1, x2)
    return values, pull_back(cotangent)

  def linearise(self, x1, x2):
    values, left, left_tables, right, derivatives = self._forward(x1, x2)
    counts = len(x1), len(x2)

    def pull_back(cotangent: np.ndarray) -> np.ndarray:
      weights, variances_bar = self._gpu.upload(cotangent), self._gpu.empty(len(x1), np.float64)
      arguments = left_tables, derivatives, weights, *counts, variances_bar
      self._run('kip_dense_variances_vjp', len(x1), *arguments)
      gradient = self._gpu.empty(x1.shape, np.float64)
      arguments = left, right, derivatives, weights, variances_bar, *counts, gradient
      self._run('kip_dense_vjp', x1.size, *arguments)
      return self._gpu.download(gradient).astype(self._dtype)

    nbytes = left.nbytes + right.nbytes + derivatives.nbytes
    return Linearised(self._gpu.download(values), pull_back, nbytes)

  def derivatives_bytes(self, rows, columns):
    return rows * columns * self._plan.derivatives * 8

  def _forward(self, x1, x2):
    """The block, x1, its variances, x2, and derivatives [plan.derivatives, A, B] in float64."""
    left, left_tables = self._tables(x1)
    right, right_tables = (left, left_tables) if x1 is x2 else self._tables(x2)
    transposed = self._gpu.empty(x2.size, self._dtype)
    self._run('kip_dense_transpose', x2.size, right, transposed, len(x2))
    counts = len(x1), len(x2)
    values = self._gpu.empty(counts, self._dtype)
    derivatives = self._gpu.empty((self._plan.derivatives, *counts), np.float64)
    arguments = left, left_tables, transposed, right_tables, *counts, values, derivatives
    self._run('kip_dense_block', values.size, *arguments)
    return values, left, left_tables, right, derivatives

  def _tables(self, x):
    """The images on the GPU, and their variances [N] in float64."""
    images, tables = self._gpu.upload(x), self._gpu.empty(len(x), np.float64)
    self._run('kip_dense_tables', len(x), images, tables, len(x))
    return images, tables

  def _run(self, name: str, work: int, *arguments) -> None:
    """Launches a kernel for `work` threads."""
    self._launch(name, self._blocks(name, -(-work // self._plan.threads)), *arguments)


def _from_planes(planes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Images [N, H, W, D] from planes [N, D planes], each row its even columns, then its odd ones."""
  count, height, width, channels = shape
  planes = planes.reshape(count, channels, height, 2, (width + 1) // 2)
  return planes.transpose(0, 2, 4, 3, 1).reshape(count, height, -1, channels)[:, :, :width]
