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

PART_BYTES = 2**22
_ALIGNMENT = 64


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


def decode(parts: Sequence[bytes], checksum: bytes) -> dict[str, np.ndarray]:
  """Unpacks a piece, its arrays read-only. Raises ValueError where the checksum does not fit."""
  data = b''.join(parts)
  if xxhash.xxh3_64_digest(data) != checksum:
    raise ValueError('a piece arrived damaged: its checksum does not fit')
  return unpack(data)


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
  """Packs arrays into bytes: a line of JSON with names, dtypes and shapes, then their contents."""
  header = json.dumps([(name, a.dtype.str, a.shape) for name, a in arrays.items()]).encode()
  header += b' ' * (-(len(header) + 1) % _ALIGNMENT) + b'\n'
  contents = (np.ascontiguousarray(a).reshape(-1).view(np.uint8).data for a in arrays.values())
  return b''.join([header, *contents])


def unpack(data: bytes) -> dict[str, np.ndarray]:
  """Undoes `pack`; the arrays are read-only."""
  offset = data.index(b'\n') + 1
  arrays = {}
  for name, dtype, shape in json.loads(data[:offset]):
    arrays[name] = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(shape)
    offset += arrays[name].nbytes
  return arrays
