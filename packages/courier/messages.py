"""Values as bytes: msgpack, with tuples, arrays and NumPy's numbers beside its own types.

A value is None, bool, int (64 bits), float, str, bytes, list, tuple, dict, or a NumPy array or
number, of these very types. Arrays are of plain numbers: their bytes are never anything else.
"""

import math
from typing import Any, cast

import msgpack
import numpy as np

_TUPLE, _ARRAY, _NUMBER = 1, 2, 3
_KINDS = 'biufc'


def pack(value: Any) -> bytes:
  """Writes a value. Raises TypeError, OverflowError or ValueError where it cannot be sent."""
  return cast(bytes, msgpack.packb(value, default=_extend, strict_types=True))


def unpack(data: bytes | memoryview) -> Any:
  """Undoes `pack`. Raises ValueError where the bytes are no value."""
  try:
    return msgpack.unpackb(data, ext_hook=_shrink, strict_map_key=False)
  except (TypeError, msgpack.UnpackException) as error:
    raise ValueError(f'not a message: {error}') from error


def _extend(value: Any) -> msgpack.ExtType:
  if type(value) is tuple:
    return msgpack.ExtType(_TUPLE, pack(list(value)))
  if type(value) is np.ndarray or isinstance(value, np.generic):
    array = np.asarray(value)
    if array.dtype.kind in _KINDS:
      header = pack([array.dtype.str, list(array.shape)])
      kind = _ARRAY if value is array else _NUMBER
      return msgpack.ExtType(kind, b''.join([bytes([len(header)]), header, array.tobytes()]))
    raise TypeError(f'arrays of {array.dtype} cannot be sent')
  if type(value) is int:
    raise OverflowError('an integer of more than 64 bits cannot be sent')
  raise TypeError(f'{type(value).__name__} cannot be sent')


def _shrink(kind: int, data: bytes) -> Any:
  if kind == _TUPLE:
    return tuple(unpack(data))
  if kind not in (_ARRAY, _NUMBER) or not data:
    raise ValueError(f'not a message: extension {kind}')
  start = 1 + data[0]
  name, shape = unpack(data[1:start])
  dtype = np.dtype(name)
  if dtype.kind not in _KINDS or dtype.str != name:
    raise ValueError(f'not a message: an array of {dtype}')
  if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data) - start:
    raise ValueError(f'not a message: {len(data) - start} bytes for an array {shape} of {dtype}')
  array = np.frombuffer(data, dtype, offset=start).reshape(shape)
  return array.copy() if kind == _ARRAY else array[()]
