"""How a machine's threads are shared out."""

import pytest

from programs import placement


@pytest.mark.parametrize('configured, workers, threads', [(0, 1, 4), (0, 2, 2), (0, 3, 1), (0, 9, 1), (3, 2, 3)])
def test_workers_share_the_threads(monkeypatch, configured, workers, threads):
  monkeypatch.setattr(placement.os, 'sched_getaffinity', lambda pid: {0, 1, 2, 3})
  assert placement.worker_threads(configured, workers) == threads
