"""The processors that this process may use."""

import os


def which() -> list[int]:
  """Their numbers; all of the machine's where a system (macOS) does not say."""
  if hasattr(os, 'sched_getaffinity'):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def available() -> int:
  """How many they are."""
  return len(which())
