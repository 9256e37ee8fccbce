"""From the command line to a run that is ready to start, and from its outcome to an exit status:
the same for every launcher."""

import contextlib
import dataclasses
import enum
import os
import signal
import sys
import threading
from typing import Any, Callable, NamedTuple, Sequence

from absl import flags

from artifacts import run_directory
from configs import schema, validation
from data import DataError, classes, store
from distillation import evaluation, initial_support, plan
from programs import command_line, memory, placement
from programs.command_line import BadInput, log_plainly

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Run directory: made if missing; one that holds a checkpoint resumes from it.'
)

_BUSY = 0.9  # of the workers' time: a plan that leaves less than this for work is worth a word


class Here(enum.Enum):
  """Which processes of a run share this host."""

  ALL, COORDINATOR, NOTHING = range(3)


class Run(NamedTuple):
  """A run that may start.

  Attributes:
    config: validated, plain values; `system.num_workers` is at least 1.
    directory: open, and locked by this process; of one that joins a run elsewhere neither, and None
      where it needs no more than an address.
    cache: folder that holds its prepared data.
    remarks: lines for the user: its classes, what was odd about the data, the memory it needs, a
      plan that does not suit its workers, where kernels are computed.
    gpus: for the kernels, of this host.
  """

  config: schema.Config
  directory: run_directory.RunDirectory | None
  cache: str
  remarks: tuple[str, ...] = ()
  gpus: placement.Gpus = placement.Gpus((), '')


def parse(argv: Sequence[str]) -> None:
  """Parses all flags. Raises BadInput."""
  log_plainly()
  command_line.parse(argv, '--config=FILE --workdir=DIR')


def ready(find_gpus: Callable[[str], placement.Gpus] | None, here: Here = Here.ALL) -> Run:
  """Validates the configuration, prepares the data and opens the run directory; the flags are
  parsed.

  Args:
    find_gpus: finds the workers' GPUs for `run.implementation`, before JAX starts; None where the
      workers do not share this host.
    here: whose memory this host must have.

  Raises:
    BadInput: anything the user can mend; nothing has been started.
  """
  if not command_line.CONFIG.value:
    raise BadInput('--config=FILE is missing, for instance --config=configs/digits.py.')
  if not WORKDIR.value:
    raise BadInput('--workdir=DIR is missing: the run directory, made if it is not there.')
  raw, gpus = command_line.CONFIG.value.to_dict(), placement.Gpus((), '')
  if find_gpus:  # before JAX starts, to check the configuration
    gpus = find_gpus(str(validation.flatten(raw).get('run.implementation')))
  try:
    config = validation.validate(raw)
    cache = store.cache_folder(config.system.cache_dir)
    prepared = store.prepare(config.run.data, cache, raw=config.run.augmentation.is_on)
    labels, num_classes = prepared.train_labels, prepared.num_classes
    targets = validation.resolve_targets(config.run, labels, num_classes)
    num_workers = placement.num_workers(config.system.num_workers, gpus.names)
    config = dataclasses.replace(
      config,
      run=dataclasses.replace(config.run, targets_per_step=targets),
      system=dataclasses.replace(config.system, num_workers=num_workers),
    )
    validation.validate_with_data(
      config, prepared.train_labels, prepared.num_classes, prepared.train_images.shape[1:]
    )
    of_memory = check_memory(config, prepared, here)
    plan = _remark_on_plan(config, prepared.num_classes)
    initial_support.make(config.run, prepared, cache)
    directory = run_directory.RunDirectory(WORKDIR.value)
    directory.open(config, prepared.key)
    directory.write_command([os.path.basename(sys.executable), *sys.orig_argv[1:]])
  except (validation.ConfigError, DataError, run_directory.RunDirectoryError) as error:
    raise BadInput(str(error)) from error
  remarks = classes.in_words(prepared.class_names), *prepared.remarks, of_memory, plan, gpus.remark
  return Run(config, directory, cache, tuple(filter(None, remarks)), gpus)


def on_stop_signals(
  stop: Callable[[], None],
  kill: Callable[[], None] = lambda: None,
  said: str = 'Stopping with a checkpoint',
) -> None:
  """Calls `stop` when this process is to stop: at SIGTERM, Ctrl-C, or its terminal's end.

  Asked twice, it calls `kill` and ends at once: what is on disk is whole at any moment. A process
  that ignores the end of its terminal (nohup) goes on doing so. `said` answers Ctrl-C.
  """
  asked = False

  def handle(number, _):
    nonlocal asked
    if asked:
      kill()
      os._exit(128 + number)
    asked = True
    if number == signal.SIGINT:
      with contextlib.suppress(OSError):  # nobody reads any more
        os.write(1, f'{said}; Ctrl-C again ends at once.\n'.encode())
    stop()

  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, handle)


def stop_event(**kwargs: str) -> threading.Event:
  """Set when this process is asked to stop; see `on_stop_signals`."""
  stop = threading.Event()
  on_stop_signals(stop.set, **kwargs)
  return stop


def outcome(directory: run_directory.RunDirectory) -> int:
  """Says how the launch that opened `directory` ended, and gives the exit status for it."""
  status = directory.read_status()
  if status is None or not directory.has_ended(status):
    status = {
      **(status or {}),
      'state': run_directory.FAILED,
      'message': 'the coordinator is gone (its output may say why); '
      'the same command resumes from the last checkpoint.',
    }
    directory.write_status(**status)
  state, command = status['state'], directory.read_command()
  message = f': {status["message"]}' if 'message' in status else ''
  if state == run_directory.FINISHED:
    print(_summary(directory, status))
  elif state == run_directory.STOPPED:
    print(
      f'Stopped at step {status["step"]} of {status["num_steps"]}{message}. '
      f'To go on from there:\n  {command}'
    )
  else:
    print(f'The run failed{message}', file=sys.stderr)
  return run_directory.EXIT_STATUS.get(state, 1)


def check_memory(config: schema.Config, prepared: store.Prepared, here: Here) -> str:
  """Refuses what this host has no room for; gives the estimate in words."""
  needs, workers = memory.needs(config, prepared), config.system.num_workers
  needed = {
    Here.ALL: needs.coordinator + workers * needs.worker + needs.evaluator,
    Here.COORDINATOR: needs.coordinator,
    Here.NOTHING: 0,
  }[here]
  available = memory.available()
  if needed > available:
    raise BadInput(
      f'this run needs about {memory.in_gib(needed)} GiB of memory here ({needs.in_words()}), '
      f'{memory.in_gib(available)} GiB are available: lower run.images_per_class, '
      'run.plan.target_tile or system.num_workers, or raise run.plan.target_tiles_per_task.'
    )
  if here is not Here.ALL:
    return f'Memory: {needs.in_words()}.'
  return f'Memory: about {memory.in_gib(needed)} GiB of {memory.in_gib(available)} GiB available.'


def _remark_on_plan(config: schema.Config, num_classes: int) -> str:
  """A line where its tasks about targets leave workers without one for a good part of a step; else
  none."""
  run, num_workers = config.run, config.system.num_workers
  support, targets = run.images_per_class * num_classes, run.targets_per_step
  part, group = (
    run.plan.split_support(support) or support,
    min(run.plan.targets_per_task, targets),
  )
  parts = len(plan.ranges(support, part))
  count = parts * len(plan.ranges(targets, group))
  rounds = -(-count // num_workers)
  # In two halves K_ss is computed beside them.
  pairs = support * (targets + support if part < support else targets)
  busy = pairs / (rounds * num_workers * group * part)
  if busy >= _BUSY:
    return ''
  size = -(-targets // max(1, rounds * num_workers // parts))
  better = f'of {size} targets each' if size < group else 'about fewer support images'
  return (
    f'The plan makes {count} task{"s" * (count > 1)} about targets a step, so {num_workers} workers are busy for {busy:.0%} of it at most; '
    f"tasks {better} would do (run.plan; BUILD.md, 'How many workers'). A run keeps its plan: choose before it starts."
  )


def _summary(directory: run_directory.RunDirectory, status: dict[str, Any]) -> str:
  rows = {row['step']: row for row in directory.read_metrics()}
  first, last = rows.get(0), rows.get(status['num_steps'])
  began = {'real': 'real images', 'noise': 'noise'}.get(
    directory.read_saved().config.run.initial_images, 'images'
  )
  steps = f'{status["num_steps"]} step{"s" * (status["num_steps"] != 1)}'
  lines = [f'Finished {steps} after {status["wall_seconds"]:.0f} s.']
  if last:
    network = f'finite network ({evaluation.networks_in_words([last])})'
    for key, name in (('krr_test_accuracy', 'KRR'), ('nn_test_accuracy', network)):
      if key in last:
        start = (
          f' ({100 * first[key]:.2f} % with the {began} it started from)'
          if first and key in first
          else ''
        )
        lines.append(f'  test accuracy, {name}: {100 * last[key]:.2f} %{start}')
  else:
    lines.append('  the last evaluation is missing: the evaluator did not finish in time')
  pairs = ', '.join(f'{name} {counts["pairs"]}' for name, counts in status['workers'].items())
  lines.append(f'  kernel pairs: {status["pairs"]} needed; computed by {pairs}')
  lines += [
    f'  {path}'
    for path in (directory.distilled, directory.metrics, directory.picture, directory.report)
    if os.path.exists(path)
  ]
  return '\n'.join(lines)
