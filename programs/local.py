"""The whole program in one process, without Launchpad: the oracle of the distributed run, and the
way to run where Launchpad has no wheel.

    python -m programs.local --config=configs/digits.py --workdir=runs/local
"""

import os
import sys
import threading

from programs import placement

# Before NumPy starts, with as many threads as it finds here.
os.environ.update(placement.launcher_environment())

from absl import logging

from artifacts import run_directory
from programs import command_line, start, terminal


def main(argv: list[str]) -> int:
  """Runs to the end; returns the exit status."""
  try:
    start.parse(argv)
    run = start.ready(placement.take_gpu)
  except start.BadInput as error:
    print(f'error: {error}', file=sys.stderr)
    return run_directory.BAD_INPUT_STATUS
  for remark in run.remarks:
    logging.info(remark)
  with terminal.shown(run.directory):
    run.directory.begin()
    distil(run, start.stop_event())
  return start.outcome(run.directory)


def distil(run, stop: threading.Event) -> None:
  """Coordinator, workers and evaluator as threads of this process.

  Args:
    run: a `start.Run`.
    stop: set it to stop the run with a checkpoint.
  """
  from nodes import coordinator as coordinator_node  # here and below: they start JAX
  from nodes import evaluator, kernel_worker
  from nodes.client import Retrying

  system = run.config.system
  try:
    coordinator = coordinator_node.Coordinator(run.directory.path, run.cache, stop)
  except coordinator_node.EXPECTED as error:
    logging.error('The run failed: %s', error)
    return
  client = Retrying(coordinator, system.coordinator_timeout, stop)
  threads = placement.worker_threads(system.worker_threads, system.num_workers)
  nodes = [
    kernel_worker.KernelWorker(
      client, name=f'kernel_worker_{i}', threads=threads, cache=run.cache, stop=stop
    )
    for i in range(system.num_workers)
  ]
  nodes.append(
    evaluator.Evaluator(client, workdir=run.directory.path, threads=1, cache=run.cache, stop=stop)
  )
  running = [threading.Thread(target=node.run, daemon=True) for node in nodes]
  for thread in running:
    thread.start()
  coordinator.run()
  for thread in running:
    thread.join(10)


if __name__ == '__main__':
  command_line.exit_with(main)
