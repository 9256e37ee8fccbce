"""Advice on a plan that does not suit the number of workers."""

from artifacts import words
from configs import schema
from distillation.plan import ranges

_BUSY = 0.9  # share of the workers' time that a plan should fill


def advise(config: schema.Config, num_classes: int) -> str:
  """Returns a line if the tasks that involve targets leave workers idle for a good part of a step,
  otherwise ''."""
  run, num_workers = config.run, config.system.num_workers
  support, targets = run.images_per_class * num_classes, run.targets_per_step
  part = run.plan.split_support(support) or support
  group = min(run.plan.targets_per_task, targets)
  parts = len(ranges(support, part))
  count = parts * len(ranges(targets, group))
  rounds = -(-count // num_workers)
  # In two halves K_ss is computed beside them.
  pairs = support * (targets + support if part < support else targets)
  busy = pairs / (rounds * num_workers * group * part)
  if busy >= _BUSY:
    return ''
  size = -(-targets // max(1, rounds * num_workers // parts))
  better = f'of {size} targets each' if size < group else 'with fewer support images'
  return (
    f'The plan gives a step {words.count(count, "task")} with targets, so {num_workers} workers '
    f'are busy for {busy:.0%} of it at most; tasks {better} would keep them busier (run.plan; '
    'docs/sizing.md). A run keeps its plan: choose before it starts.'
  )
