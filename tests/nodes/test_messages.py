"""Pieces and tasks as they travel."""

import json

import numpy as np
import pytest
import xxhash

from distillation import pieces, plan
from nodes import messages


@pytest.mark.parametrize('size', [1, 1000, 2 * messages.PART_BYTES // 8 + 5])
def test_pieces_survive_the_wire(size):
  piece = {
    'gradient': np.arange(size, dtype=np.float32),
    'alpha_bar': np.random.default_rng(0).normal(size=size),
    'loss': np.asarray(0.1),
  }
  parts, checksum = messages.encode(piece)
  assert all(len(part) <= messages.PART_BYTES for part in parts)
  forms = {name: pieces.Form(array.dtype, array.shape) for name, array in piece.items()}
  assert messages.packed_bytes(forms) == sum(map(len, parts))
  back = messages.decode(parts, checksum, forms)
  assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in piece.items()}
  assert back['gradient'].dtype == np.float32 and back['loss'].shape == ()
  with pytest.raises(ValueError, match='checksum'):
    messages.decode([b'\0' + parts[0][1:], *parts[1:]], checksum, forms)


@pytest.mark.parametrize(
  'piece',
  [
    {},
    {'block': np.zeros((2, 3), np.float32)},
    {'block': np.zeros((2, 3), np.int64)},
    {'block': np.zeros((3, 2))},
    {'block': np.zeros(6)},
    {'other': np.zeros((2, 3))},
    {'block': np.zeros((2, 3)), 'more': np.zeros(1)},
  ],
)
def test_a_piece_of_another_form_is_malformed(piece):
  forms = {'block': pieces.Form(np.dtype(np.float64), (2, 3))}
  messages.decode(*messages.encode({'block': np.zeros((2, 3))}), forms)
  with pytest.raises(messages.Malformed, match=r"a piece begins with .* instead of b'\[\[\"block"):
    messages.decode(*messages.encode(piece), forms)


@pytest.mark.parametrize(
  'data',
  [
    b'',
    b'[["block", "<f8", [2, 3]]]' + bytes(200),  # no end of the header
    b'[["block", "<f8", [-2, -3]]]\n' + bytes(48),
    b'[["block", "O", [2, 3]]]\n' + bytes(48),
    b'[["block", "<f8", [1000000000, 1000000000]]]\n' + bytes(48),
    b'[' * 10**5 + b'\n',
  ],
)
def test_what_is_no_piece_is_malformed(data):
  forms = {'block': pieces.Form(np.dtype(np.float64), (2, 3))}
  with pytest.raises(messages.Malformed, match='a piece begins with'):
    messages.decode([data], xxhash.xxh3_64_digest(data), forms)


def test_tasks_survive_the_wire():
  task = plan.Task(7, plan.TARGET_VJP, 3, (5, 10), (0, 4))
  assert messages.task_from(json.loads(json.dumps(list(task)))) == task
