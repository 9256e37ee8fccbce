"""How a run ends before its time."""


class RunFailed(RuntimeError):
  """The run cannot go on; the message is one line for the user."""


class Stopped(Exception):
  """The run is to stop with a checkpoint; a message says why, unless the process was asked to."""
