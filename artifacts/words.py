"""Numbers in words, as log lines and summaries have them."""

import datetime


def count(number: int, noun: str) -> str:
  """'1 step', '2 steps'."""
  return f'{number} {noun}{"s" * (number != 1)}'


def duration(seconds: float) -> str:
  """'1:23:45', to the second."""
  return str(datetime.timedelta(seconds=round(seconds)))
