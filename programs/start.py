"""From the command line to a run that is ready to start, the same for every launcher."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from absl import flags

from artifacts import run_directory
from configs import schema, validation
from data import classes, store
from distillation import initial_support
from programs import command_line, memory, placement, plan_advice

WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Run directory: made if missing; one that holds a checkpoint resumes from it.'
)


class Checked(NamedTuple):
  """A run whose configuration and data fit together.

  Attributes:
    config: validated; `system.num_workers` is at least 1.
    prepared: its data.
    cache: folder that holds them.
    remarks, gpus: as in `Run`.
  """

  config: schema.Config
  prepared: store.Prepared
  cache: str
  remarks: tuple[str, ...]
  gpus: placement.Gpus


class Run(NamedTuple):
  """A run that may start.

  Attributes:
    config: validated; `system.num_workers` is at least 1.
    directory: open, and locked by this process.
    cache: folder that holds its prepared data.
    remarks: lines for the user: its classes, oddities of the data, the memory it needs, advice on
      its plan, where kernels are computed.
    gpus: of this host, for the kernels.
  """

  config: schema.Config
  directory: run_directory.RunDirectory
  cache: str
  remarks: tuple[str, ...] = ()
  gpus: placement.Gpus = placement.Gpus((), '')


def parse(argv: Sequence[str]) -> None:
  """Parses all flags. Raises BadInput."""
  command_line.log_plainly()
  command_line.parse(argv, '--config=FILE --workdir=DIR')


def ready(
  find_gpus: Callable[[str], placement.Gpus] | None, here: memory.Here = memory.Here.ALL
) -> Run:
  """Does what `check` does, and opens the run directory.

  Raises:
    BadInput, ConfigError, DataError, RunDirectoryError: anything the user can mend; nothing has
      been started.
  """
  config, prepared, cache, remarks, gpus = check(find_gpus, here)
  directory = run_directory.RunDirectory(WORKDIR.value or '')
  directory.open(config, prepared.key)
  directory.write_command([os.path.basename(sys.executable), *sys.orig_argv[1:]])
  return Run(config, directory, cache, remarks, gpus)


def check(find_gpus: Callable[[str], placement.Gpus] | None, here: memory.Here) -> Checked:
  """Validates the configuration and prepares the data.

  Call it after `parse`.

  Args:
    find_gpus: finds the workers' GPUs for `run.implementation`, before JAX starts; None if the
      workers do not share this host.
    here: the processes for which this host needs memory.

  Raises BadInput, ConfigError, DataError.
  """
  if not command_line.CONFIG.value:
    raise command_line.BadInput(
      '--config=FILE is missing, for instance --config=configs/digits.py.'
    )
  if not WORKDIR.value:
    raise command_line.BadInput(
      '--workdir=DIR is missing: the run directory, made if it is not there.'
    )
  raw, gpus = command_line.CONFIG.value.to_dict(), placement.Gpus((), '')
  if find_gpus:  # before JAX starts, to check the configuration
    gpus = find_gpus(str(validation.flatten(raw).get('run.implementation')))
  config = validation.validate(raw)
  cache = store.cache_folder(config.system.cache_dir)
  prepared = store.prepare(config.run.data, cache, raw=config.run.augmentation.is_on)
  num_workers = placement.num_workers(config.system.num_workers, gpus.names)
  config = resolve(config, prepared, num_workers)
  memory_remark = memory.check(config, prepared, here)
  initial_support.make(config.run, prepared, cache)
  remarks = (
    classes.in_words(prepared.class_names),
    *prepared.remarks,
    memory_remark,
    plan_advice.advise(config, prepared.num_classes),
    gpus.remark,
  )
  return Checked(config, prepared, cache, tuple(filter(None, remarks)), gpus)


def resolve(config: schema.Config, prepared: store.Prepared, num_workers: int) -> schema.Config:
  """Fills in what a validated configuration leaves to the data and to this host.

  Raises ConfigError where it does not suit the data.
  """
  labels, num_classes = prepared.train_labels, prepared.num_classes
  targets = validation.resolve_targets(config.run, labels, num_classes)
  config = dataclasses.replace(
    config,
    run=dataclasses.replace(config.run, targets_per_step=targets),
    system=dataclasses.replace(config.system, num_workers=num_workers),
  )
  height, width, channels = prepared.train_images.shape[1:]
  validation.validate_with_data(config, labels, num_classes, (height, width, channels))
  return config
