"""The one exception that calls raise."""

import enum


class StatusCode(enum.Enum):
  """Why a call failed, by gRPC's names."""

  INVALID_ARGUMENT = enum.auto()  # something cannot be sent, or the function said so
  NOT_FOUND = enum.auto()  # there is no such function, or it did not find something
  UNIMPLEMENTED = enum.auto()
  UNKNOWN = enum.auto()  # the function raised another exception
  RESOURCE_EXHAUSTED = enum.auto()  # a message is too long, or there is no memory
  DEADLINE_EXCEEDED = enum.auto()
  UNAVAILABLE = enum.auto()  # there is no server, or the connection was lost


class StatusNotOk(Exception):
  """A call has failed."""

  def __init__(self, message: str, code: StatusCode):
    super().__init__(message)
    self.code = code

  def __reduce__(self):
    return type(self), (str(self), self.code)
