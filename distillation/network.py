"""Finite-width networks of the described architectures, and their empirical NTK."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

import kernels.precision  # noqa: F401
from kernels import architectures, tiling

# Weights and biases of each convolution and dense layer, input side first: [3, 3, D, C] and
# [1, 1, 1, C], or [D, C] and [1, C].
Parameters = list[tuple[jax.Array, jax.Array]]

_GRADIENT_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Network:
  """A network as a function of parameters and images.

  Attributes:
    architecture: the layers, and the deviations w_std and b_std.
    width: channels of every convolution and hidden layer.
    outputs: C.
    parameterization: 'standard', weights N(0, w_std^2 / fan-in) and biases N(0, b_std^2); or 'ntk',
      both N(0, 1), and the layers multiply by those deviations instead.
  """

  architecture: architectures.Architecture
  width: int
  outputs: int
  parameterization: Literal['standard', 'ntk'] = 'standard'

  def initial(self, key: PRNGKeyArray, image_shape: tuple[int, ...]) -> Parameters:
    """Draws parameters, float64, for images [H, W, D].

    The draws are those of Neural Tangents (and of `jax.example_libraries.stax`) from the same key,
    which takes one split of it for each layer, also for those without parameters.
    """
    height, width, channels = image_shape
    layers, parameters = list(self._layers()), []
    for i, layer in enumerate(layers):
      key, layer_key = jax.random.split(key)
      if layer == 'pool':
        height, width = height // 2, width // 2
      elif layer == 'flatten':
        channels *= height * width
      elif layer in ('conv', 'dense'):
        size = (3, 3) if layer == 'conv' else ()
        out = self.width if i + 1 < len(layers) else self.outputs
        w_key, b_key = jax.random.split(layer_key)
        w = jax.random.normal(w_key, (*size, channels, out), jnp.float64)
        b = jax.random.normal(b_key, (1,) * (len(size) + 1) + (out,), jnp.float64)
        if self.parameterization == 'standard':
          w_scale, b_scale = self._scales(w)
          w, b = w_scale * w, b_scale * b
        parameters.append((w, b))
        channels = out
    return parameters

  def __call__(
    self, parameters: Parameters, images: Float[Array, 'N H W D']
  ) -> Float[Array, 'N C']:
    """The outputs, in the parameters' dtype."""
    x, remaining = images, iter(parameters)
    for layer in self._layers():
      if layer == 'relu':
        x = jax.nn.relu(x)
      elif layer == 'pool':
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID') / 4
      elif layer == 'flatten':
        x = x.reshape(len(x), -1)
      elif layer == 'global_average_pool':
        x = x.mean(axis=(1, 2))
      else:
        w, b = next(remaining)
        x = _convolved(x, w) if layer == 'conv' else x @ w
        if self.parameterization == 'ntk':
          w_scale, b_scale = self._scales(w)
          x, b = w_scale * x, b_scale * b
        x = x + b
    return x

  def _layers(self) -> Iterator[str]:
    """'conv', 'relu', 'pool', a readout's name, or 'dense'; input side first."""
    for stage in self.architecture.stages:
      yield from ['conv', 'relu'] * stage.convs + ['pool'] * stage.pool
    yield self.architecture.readout
    yield from [*['dense', 'relu'] * self.architecture.hidden, 'dense']

  def _scales(self, w: jax.Array) -> tuple[float, float]:
    """Deviations of a layer's weights w and of its biases."""
    fan_in = w.size // w.shape[-1]
    return self.architecture.w_std / fan_in**0.5, self.architecture.b_std


def _convolved(x: jax.Array, w: jax.Array) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x, w, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


def empirical_ntk(
  network: Network,
  parameters: Parameters,
  images: Float[np.ndarray, 'n H W D'],
  gradient_bytes: int = _GRADIENT_BYTES,
) -> Float[np.ndarray, 'n n']:
  """The empirical NTK of sum_c f_c / sqrt(C), in the dtype of parameters and images.

  From whole gradients, as many images' at a time as take `gradient_bytes`: on CPUs that is many
  times faster than products with vectors, which differentiate convolutions forwards.
  """
  n, bytes_each = len(images), sum(p.nbytes for p in jax.tree.leaves(parameters))
  count = math.ceil(n * bytes_each / gradient_bytes)
  size = math.ceil(n / count)
  tiles = [(slice(i * size, (i + 1) * size), x) for i, x in enumerate(tiling.tiles(images, size))]
  theta = np.empty((size * len(tiles), size * len(tiles)), images.dtype)
  for i, (rows, x1) in enumerate(tiles):
    theta[rows, rows] = _ntk_block(network, parameters, x1, None)
    for columns, x2 in tiles[:i]:
      theta[rows, columns] = _ntk_block(network, parameters, x1, x2)
      theta[columns, rows] = theta[rows, columns].T
  return theta[:n, :n]


@functools.partial(jax.jit, static_argnums=0)
def _ntk_block(
  network: Network,
  parameters: Parameters,
  x1: Float[Array, 'A H W D'],
  x2: Float[Array, 'B H W D'] | None,
) -> Float[Array, 'A B']:
  """A block of the empirical NTK; x2 is x1 where it is None."""

  def gradients(x):
    def summed(parameters, image):
      return network(parameters, image[None]).sum(axis=1) / network.outputs**0.5

    return jax.vmap(jax.jacobian(summed), (None, 0))(parameters, x)  # each [N, 1, ...]

  def contract(g1, g2):
    axes = tuple(range(1, g1.ndim))
    return jnp.tensordot(g1, g2, (axes, axes))

  with jax.default_matmul_precision('highest'):
    first = gradients(x1)
    second = first if x2 is None else gradients(x2)
    return jax.tree.reduce(jnp.add, jax.tree.map(contract, first, second))
