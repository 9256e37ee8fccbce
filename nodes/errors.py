"""Exceptions that end a run early."""


class RunFailed(RuntimeError):
  """The run cannot go on; the message is one line for the user."""


class Stopped(Exception):
  """The run stops with a checkpoint; a message gives the reason, unless the process was told to."""
