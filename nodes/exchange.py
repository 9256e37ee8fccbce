"""The coordinator's side of a step: publishes its inputs, leases its tasks, collects its pieces."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from distillation import plan
from distillation.pieces import Form
from distillation.step import Piece
from nodes import messages
from nodes.messages import Life
from nodes.task_board import IN_HAND, TaskBoard

_FETCHED = 'images', 'alpha'  # whole from when they are published, unlike 'residual'
_ROW_BYTES = 128  # of a packed array, beside its contents


class Served:
  """An `Exchange` (distillation/step.py) whose pieces workers compute. Thread safe."""

  def __init__(
    self,
    board: TaskBoard,
    life: Life,
    dtype: np.dtype,
    in_halves: bool,
    forms: Callable[[plan.Task], Mapping[str, Form]],
    watch: Callable[[bool], None],
    poll: float,
    part_bytes: int = messages.PART_BYTES,
  ):
    """
    Args:
      board: leases the tasks.
      life: of the coordinator; messages about tasks of another life are dropped.
      dtype: of the kernel, in which the cotangent of K_ss is sent.
      in_halves: whether steps have two halves.
      forms: of a task's piece, see `pieces.forms`.
      watch: called before every wait for a piece, with whether the last wait ended without it; an
        exception that it raises ends the step.
      poll: seconds of a wait.
      part_bytes: of the parts of a piece.
    """
    self._board, self._life, self._dtype, self._in_halves = board, life, dtype, in_halves
    self._forms, self._part_bytes = forms, part_bytes
    self._watch, self._poll = watch, poll
    self._lock = threading.Lock()
    self._step = -1
    self._published: dict[str, np.ndarray] = {}
    self._packed: dict[tuple[str, int, int], bytes] = {}  # by name, start and stop of the rows
    self._room: dict[str, int] = {}  # bytes of each published array that may yet be kept packed
    # Pieces that are still arriving, lease -> part -> content, and leases whose piece is complete.
    self._parts: dict[int, dict[int, bytes]] = {}
    self._arrived: set[int] = set()

  # What a step calls.

  def publish(self, name: str, value: np.ndarray) -> None:
    """Lets workers fetch an array; 'images' begins a step and drops what is left of another."""
    with self._lock:
      if name == 'images':
        self._step, self._published, self._packed = -1, {}, {}
        self._parts, self._arrived = {}, set()
      self._published[name] = value
      # Tasks and the tiles of K_ss cut an array in two ways; nobody needs its rows in a third.
      self._room[name] = 2 * (value.nbytes + _ROW_BYTES * len(value))

  def post(self, tasks: Sequence[plan.Task]) -> None:
    """Gives the tasks to the board."""
    with self._lock:
      self._step = tasks[0].step
    self._board.post(tasks)

  def take(self, task: plan.Task) -> Piece:
    """The piece of a posted task, once it is there. Raises TaskFailed, and what `watch` raises."""
    self._watch(False)
    while (piece := self._board.take(task, self._poll)) is None:
      self._watch(True)
    return piece

  # What workers call.

  def fetch(self, life: Life, step: int, name: str, start: int, stop: int) -> bytes | None:
    """Packs rows of a published array; None if the step is over. Raises Malformed."""
    with self._lock:
      if (life, step) != (self._life, self._step):
        return None
      size = len(self._published[name]) if name in _FETCHED and name in self._published else 0
      if not 0 <= start < stop <= size:
        raise messages.Malformed(f'there are no rows {start} to {stop} of {name!r} to fetch')
      return self._rows(name, start, stop)

  def lease(
    self, worker: str, pairs_per_second: float, holding: Sequence[int], wait: float
  ) -> dict[str, Any] | None:
    """Leases tasks to a worker, so that it has one in work and one ahead.

    Args:
      worker: its name.
      pairs_per_second: its speed.
      holding: leases that it still has.
      wait: seconds to wait for a task, if it has none.

    Returns:
      None, or `life`, `tasks` [(tuple(task), lease, indices)] and the `inputs` [packed arrays] to
      which the indices refer, each array once.
    """
    leased, inputs = [], {}  # inputs by their id(): tasks share packed arrays
    while len(holding) + len(leased) < IN_HAND:
      leases = [*holding, *(lease for _, lease, _ in leased)]
      lease = self._board.lease(worker, 0.0 if leases else wait, pairs_per_second, leases)
      if lease is None:
        break
      with self._lock:
        if lease.task.step != self._step:
          break
        attached = self._attached(lease.task)
      inputs.update((id(data), data) for data in attached)
      places = [list(inputs).index(id(data)) for data in attached]
      leased.append((tuple(lease.task), lease.id, places))
    if not leased:
      return None
    return {'life': tuple(self._life), 'tasks': leased, 'inputs': list(inputs.values())}

  def receive(
    self,
    worker: str,
    life: Life,
    task: plan.Task,
    lease: int,
    part: int,
    parts: int,
    data: bytes,
    checksum: bytes,
  ) -> Piece | None:
    """Keeps a part of a piece. Idempotent. See `Coordinator.complete` for the arguments.

    Returns:
      The piece, once its last part is there; None before, after, and for a stale task or lease.

    Raises:
      Malformed: no piece of this task has such a part, or such arrays.
      ValueError: the checksum does not fit.
    """
    with self._lock:
      is_current = (life, task.step) == (self._life, self._step)
      if not is_current or lease in self._arrived or not self._board.has(lease, task, worker):
        return None
      forms = self._forms(task)
      size = messages.packed_bytes(forms)
      rest = size - part * self._part_bytes
      if (
        parts != -(-size // self._part_bytes)
        or not 0 <= part < parts
        or not isinstance(data, bytes)
        or len(data) != min(rest, self._part_bytes)
      ):
        raise messages.Malformed(
          f'part {part} of {parts} of a piece of {size} bytes has {len(data)} bytes'
        )
      received = self._parts.setdefault(lease, {})
      received[part] = data
      if len(received) < parts:
        return None
      del self._parts[lease]
      self._arrived.add(lease)
    return messages.decode([received[i] for i in range(parts)], checksum, forms)

  def _attached(self, task: plan.Task) -> list[bytes]:
    """The inputs sent with a task: those that a worker's other tasks are not likely to need."""
    if task.phase == plan.SUPPORT_VJP:
      cotangent = self._published['cotangent'][plan.part(task, 'cotangent')]
      return [messages.pack({'cotangent': cotangent.astype(self._dtype)})]
    if self._in_halves and task.phase in (plan.SUPPORT_BLOCKS, plan.TARGET_BLOCKS):
      return [self._rows('images', *task.support_range)]
    if task.phase == plan.TARGET_VJP:
      alpha = self._rows('alpha', *task.support_range)
      return [alpha, self._rows('residual', *task.target_range)]
    return []

  def _rows(self, name: str, start: int, stop: int) -> bytes:
    """Rows of a published array, packed once for all workers."""
    key = name, start, stop
    if key in self._packed:
      return self._packed[key]
    data = messages.pack({name: self._published[name][start:stop]})
    if len(data) <= self._room[name]:
      self._packed[key] = data
      self._room[name] -= len(data)
    return data
