"""Files that a run leaves: its directory, checkpoints, distilled sets, report, pictures."""


class RunDirectoryError(ValueError):
  """The run directory cannot be used; the message is one line for the user."""
