"""Finite-width networks of the described architectures, in plain JAX."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

import kernels.precision  # noqa: F401
from kernels import architectures

# Weights and biases of each convolution and dense layer, input side first: [3, 3, D, C] and
# [1, 1, 1, C], or [D, C] and [1, C].
Parameters = list[tuple[jax.Array, jax.Array]]


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
