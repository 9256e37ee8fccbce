"""Pieces and tasks as they travel."""

import json

import numpy as np
import pytest

from distillation import plan
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
  back = messages.decode(parts, checksum)
  assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in piece.items()}
  assert back['gradient'].dtype == np.float32 and back['loss'].shape == ()
  with pytest.raises(ValueError, match='checksum'):
    messages.decode([b'\0' + parts[0][1:], *parts[1:]], checksum)


def test_tasks_survive_the_wire():
  task = plan.Task(7, plan.TARGET_VJP, 3, (5, 10), (0, 4))
  assert messages.task_from(json.loads(json.dumps(list(task)))) == task
