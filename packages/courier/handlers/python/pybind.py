"""What Launchpad takes from Courier's module of this name."""

from collections.abc import Callable
from typing import Any


def BuildPyCallHandler(function: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a handler for `Server.BindHandler` of a function: here, they are the same."""
  return function
