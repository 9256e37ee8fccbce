"""The description of a network, from which every kernel implementation derives.

An architecture is a list of resolution stages, each a number of 3x3 SAME convolutions followed by
ReLU and, optionally, a 2x2 average pooling (VALID: an odd last row or column is dropped); then a
readout (flatten, or global average pooling); then hidden Dense+ReLU layers; then a Dense output.
All networks are of this form in Nguyen et al. 2021a (KIP, ICLR, https://arxiv.org/abs/2011.00050)
and Nguyen et al. 2021b (NeurIPS, https://arxiv.org/abs/2107.13034).
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

READOUTS = ('flatten', 'global_average_pool')
KNOWN_NAMES = (
  'fc1, fc2, …, conv1, conv2, …, convnet, convnet2, convnet3, …, myrtle5, myrtle7, myrtle10'
)
MAX_DEPTH = 32


class Stage(NamedTuple):
  """`convs` times (3x3 SAME convolution, ReLU), then a 2x2 average pooling if `pool`."""

  convs: int
  pool: bool


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A network: stages -> readout -> `hidden` x (Dense, ReLU) -> Dense.

  Attributes:
    stages: the resolution stages, input side first; empty for a fully-connected network.
    readout: 'flatten' or 'global_average_pool'.
    hidden: number of hidden fully-connected ReLU layers after the readout.
    w_std, b_std: standard deviations of weights and biases in every layer, the last one too (NTK
      parameterisation).
  """

  stages: tuple[Stage, ...] = ()
  readout: str = 'flatten'
  hidden: int = 0
  w_std: float = 2**0.5
  b_std: float = 0.1

  def __post_init__(self):
    for stage in self.stages:
      _check_depth('convs', stage.convs)
      if not isinstance(stage.pool, bool):
        raise ValueError(f'architecture: pool must be true or false, got {stage.pool!r}.')
    if self.readout not in READOUTS:
      raise ValueError(
        f'architecture: readout must be one of {", ".join(READOUTS)}, got {self.readout!r}.'
      )
    _check_depth('hidden', self.hidden)
    if not 0 < _number('w_std', self.w_std) < 100 or not 0 <= _number('b_std', self.b_std) < 100:
      raise ValueError(
        'architecture: w_std must be above 0 and b_std at least 0 (both below 100), '
        f'got {self.w_std} and {self.b_std}.'
      )

  @property
  def num_pools(self) -> int:
    return sum(stage.pool for stage in self.stages)

  @property
  def is_convolutional(self) -> bool:
    """Whether there is a convolution or a pooling before the dense layers."""
    return self.readout != 'flatten' or any(stage.convs or stage.pool for stage in self.stages)

  @property
  def has_relu(self) -> bool:
    return self.hidden > 0 or any(stage.convs for stage in self.stages)

  @property
  def convs_by_level(self) -> tuple[int, ...]:
    """Numbers of convolutions at each resolution, full size first: `num_pools` + 1 of them."""
    convs = [0]
    for stage in self.stages:
      convs[-1] += stage.convs
      if stage.pool:
        convs.append(0)
    return tuple(convs)

  def check_image_size(self, height: int, width: int) -> None:
    """Raises ValueError if the poolings leave nothing of a `height` x `width` image."""
    if min(height, width) >> self.num_pools < 1:
      raise ValueError(
        f'architecture: {self.num_pools} 2x2 poolings leave nothing of a {height}x{width} image; '
        f'at least {2**self.num_pools}x{2**self.num_pools} is needed.'
      )

  def to_dict(self) -> dict[str, Any]:
    """The plain values, accepted by `get`, that configurations and exported files hold."""
    return {
      'stages': [{'convs': s.convs, 'pool': s.pool} for s in self.stages],
      'readout': self.readout,
      'hidden': self.hidden,
      'w_std': self.w_std,
      'b_std': self.b_std,
    }


class BandStage(NamedTuple):
  """One stage on its image size, and the offsets needed: |dy| <= radius_h, |dx| <= radius_w."""

  height: int
  width: int
  convs: int
  pool: bool
  radius_h: int
  radius_w: int


def band_plan(architecture: Architecture, height: int, width: int) -> list[BandStage]:
  """The offsets between two images' pixels that the output needs, by stage, input side first.

  Flatten+Dense reads offset 0, global average pooling all of them; convolutions and ReLU keep the
  set; a 2x2 pooling whose output needs `|D| <= r` reads `|d| <= 2r + 1`.

  Raises:
    ValueError: the image is too small for the poolings.
  """
  architecture.check_image_size(height, width)
  stages, (h, w) = [], (height, width)
  for stage in architecture.stages:
    stages.append((h, w, stage))
    h, w = (h // 2, w // 2) if stage.pool else (h, w)
  r_h, r_w = (h - 1, w - 1) if architecture.readout == 'global_average_pool' else (0, 0)
  plan = []
  for h, w, stage in reversed(stages):
    if stage.pool:
      r_h, r_w = min(2 * r_h + 1, h - 1), min(2 * r_w + 1, w - 1)
    plan.append(BandStage(h, w, stage.convs, stage.pool, r_h, r_w))
  return plan[::-1]


def get(spec: str | Mapping[str, Any] | Architecture) -> Architecture:
  """The architecture called `spec`, or described by it.

  Args:
    spec: a name, or a mapping such as `{'stages': [{'convs': 2, 'pool': True}], 'readout':
      'flatten', 'hidden': 0, 'w_std': 1.414, 'b_std': 0.1}`, where all but `stages` are optional.
      Names: `fc<n>`, `conv<n>` and `myrtle5`, `myrtle7`, `myrtle10` of Nguyen et al. 2021a;
      `convnet` of Nguyen et al. 2021b, three conv-ReLU-pool blocks after one more conv-ReLU;
      `convnet<n>`, n blocks without it.

  Raises:
    ValueError: unknown name, key or value; the message names what is allowed.
  """
  if isinstance(spec, Architecture):
    return spec
  if isinstance(spec, Mapping):
    return _from_dict(spec)
  if not isinstance(spec, str):
    raise ValueError(
      f'architecture: expected a name or a dict of stages, got {type(spec).__name__}.'
    )
  match = re.fullmatch(r'(fc|convnet|conv|myrtle)(\d*)', spec)
  kind, digits = match.groups() if match else ('', '')
  depth = int(digits) if digits else None
  if depth is None or 1 <= depth <= MAX_DEPTH:
    if kind == 'fc' and depth:
      return Architecture(hidden=depth)
    if kind == 'conv' and depth:
      return Architecture(stages=(Stage(depth, False),))
    if kind == 'convnet':
      first = Stage(1 if depth else 2, True)
      return Architecture(stages=(first, *[Stage(1, True)] * ((depth or 3) - 1)))
    if kind == 'myrtle' and depth in (5, 7, 10):
      blocks = {5: (1, 1, 1), 7: (1, 2, 2), 10: (2, 3, 3)}[depth]
      return Architecture(
        stages=(Stage(1 + blocks[0], True), Stage(blocks[1], True), Stage(blocks[2], False)),
        readout='global_average_pool',
      )
  raise ValueError(
    f'architecture: unknown name {spec!r}; known: {KNOWN_NAMES}, or a dict of stages.'
  )


def _from_dict(spec: Mapping[str, Any]) -> Architecture:
  known = [field.name for field in dataclasses.fields(Architecture)]
  unknown = sorted(set(spec) - set(known))
  if unknown:
    raise ValueError(f'architecture: unknown key {unknown[0]!r}; known: {", ".join(known)}.')
  stages = spec.get('stages', ())
  if not isinstance(stages, (list, tuple)):
    raise ValueError(
      'architecture: stages must be a list of {"convs": n, "pool": true or false}, '
      f'got {stages!r}.'
    )
  parsed = []
  for stage in stages:
    if not isinstance(stage, Mapping) or set(stage) != {'convs', 'pool'}:
      raise ValueError(
        f'architecture: a stage must be {{"convs": n, "pool": true or false}}, got {stage!r}.'
      )
    parsed.append(Stage(stage['convs'], stage['pool']))
  values = {key: spec[key] for key in known[1:] if key in spec}
  for key in ('w_std', 'b_std'):
    if key in values:
      values[key] = _number(key, values[key])
  return Architecture(stages=tuple(parsed), **values)


def _check_depth(name: str, value: Any) -> None:
  if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_DEPTH:
    raise ValueError(
      f'architecture: {name} must be a whole number from 0 to {MAX_DEPTH}, got {value!r}.'
    )


def _number(name: str, value: Any) -> float:
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise ValueError(f'architecture: {name} must be a number, got {value!r}.')
  return float(value)
