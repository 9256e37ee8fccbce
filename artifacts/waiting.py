"""Waiting that a signal can end."""

import threading
import time

_LOOK = 0.05  # seconds


def pause(seconds: float, stop: threading.Event) -> None:
  """Sleeps until `seconds` have passed or `stop` is set.

  `Event.wait` can deadlock with a signal handler that sets the event; this polls.
  """
  end = time.monotonic() + seconds
  while not stop.is_set() and (left := end - time.monotonic()) > 0:
    time.sleep(min(_LOOK, left))
