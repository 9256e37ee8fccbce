"""This machine's hardware."""

import platform


def cpu_model() -> str:
  """The processor's name, or its architecture where the system does not tell the name."""
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      names = [line.partition(':')[2].strip() for line in file if line.startswith('model name')]
  except OSError:
    names = []
  return names[0] if names else platform.processor() or platform.machine()
