"""Processors, also on systems that do not tell which a process may use."""

import os

import pytest

from kernels import cpus


def test_those_that_the_process_may_use():
  assert cpus.which() == sorted(os.sched_getaffinity(0))
  assert cpus.available() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize('count, expected', [(7, [0, 1, 2, 3, 4, 5, 6]), (None, [0])])
def test_all_of_the_machine_where_nothing_else_is_known(monkeypatch, count, expected):
  monkeypatch.delattr(os, 'sched_getaffinity')
  monkeypatch.setattr(os, 'cpu_count', lambda: count)
  assert cpus.which() == expected and cpus.available() == len(expected)
