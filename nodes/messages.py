"""Formats of the messages between the coordinator and its clients.

Courier hangs on arrays in arguments, and takes twice as long for them in results, so arrays travel
as bytes, and pieces in parts of at most PART_BYTES. Tasks carry indices, never images.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from distillation import plan
from distillation.pieces import Form

# Of what travels, in which order, and what it means: to be raised when that changes. Worker and
# coordinator must have the same.
PROTOCOL = 1
PART_BYTES = 2**22
_ALIGNMENT = 64


class Malformed(ValueError):
  """A message that no client of this version sends."""


class Life(NamedTuple):
  """One life of a run's coordinator, by the run's id and a count; messages about tasks name it."""

  run_id: str
  generation: int


def task_from(fields: Sequence[Any]) -> plan.Task:
  """Undoes `list(task)`, after a journey that may turn tuples into lists."""
  task = plan.Task(*fields)
  return task._replace(
    target_range=tuple(task.target_range), support_range=tuple(task.support_range)
  )


def encode(
  piece: Mapping[str, np.ndarray], part_bytes: int = PART_BYTES
) -> tuple[list[bytes], bytes]:
  """Packs a piece into parts to send; returns these and their checksum."""
  data = pack(piece)
  parts = [data[i : i + part_bytes] for i in range(0, len(data), part_bytes)]
  return parts, xxhash.xxh3_64_digest(data)


def decode(
  parts: Sequence[bytes], checksum: bytes, forms: Mapping[str, Form]
) -> dict[str, np.ndarray]:
  """Unpacks a piece, its arrays read-only.

  Args:
    parts: in order.
    checksum: of the whole piece.
    forms: of its arrays.

  Raises:
    Malformed: the arrays have other names, types or shapes.
    ValueError: the checksum does not fit.
  """
  data = b''.join(parts)
  if xxhash.xxh3_64_digest(data) != checksum:
    raise ValueError('a piece arrived damaged: its checksum does not fit')
  header = _header(forms)
  if not data.startswith(header) or len(data) != packed_bytes(forms):
    raise Malformed(f'a piece begins with {data[: len(header)]!r} instead of {header!r}')
  return unpack(data)


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
  """Packs arrays into bytes: a line of JSON with names, dtypes and shapes, then their contents."""
  contents = (np.ascontiguousarray(a).reshape(-1).view(np.uint8).data for a in arrays.values())
  return b''.join([_header(arrays), *contents])


def packed_bytes(forms: Mapping[str, Form]) -> int:
  """The size of packed arrays of these forms."""
  return len(_header(forms)) + sum(math.prod(f.shape) * f.dtype.itemsize for f in forms.values())


def unpack(data: bytes) -> dict[str, np.ndarray]:
  """Undoes `pack`; the arrays are read-only."""
  offset = data.index(b'\n') + 1
  arrays = {}
  for name, dtype, shape in json.loads(data[:offset]):
    arrays[name] = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape)
    offset += arrays[name].nbytes
  return arrays


def _header(arrays: Mapping[str, np.ndarray | Form]) -> bytes:
  header = json.dumps([(name, a.dtype.str, a.shape) for name, a in arrays.items()]).encode()
  return header + b' ' * (-(len(header) + 1) % _ALIGNMENT) + b'\n'
