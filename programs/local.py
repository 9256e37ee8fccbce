"""The whole program in one process, without Launchpad: the oracle of the distributed run, and the
way to run where Launchpad has no wheel.

    python -m programs.local --config=configs/digits.py --workdir=runs/local
"""

import os
import threading

from programs import placement

# Before NumPy starts, with as many threads as it finds here.
os.environ.update(placement.launcher_environment())

from absl import logging

from programs import command_line, outcome, signals, start, terminal


def main(argv: list[str]) -> int:
  """Runs to the end; returns the exit status. Raises BadInput."""
  start.parse(argv)
  run = start.ready(placement.take_gpu)
  for remark in run.remarks:
    logging.info(remark)
  with terminal.show_output(run.directory):
    run.directory.begin()
    distil(run, signals.stop_event())
  return outcome.conclude(run.directory)


def distil(run: start.Run, stop: threading.Event) -> None:
  """Runs coordinator, workers and evaluator as threads of this process.

  Args:
    run: ready to start.
    stop: set it to stop the run with a checkpoint.
  """
  from nodes import coordinator as coordinator_node  # here: they start JAX
  from nodes import evaluator, kernel_worker
  from nodes.client import Retrying

  system = run.config.system
  try:
    coordinator = coordinator_node.Coordinator(run.directory.path, run.cache, stop)
  except coordinator_node.EXPECTED as error:
    logging.error('The run failed: %s', error)
    return
  client = Retrying(coordinator, system.worker_timeout, stop)
  threads = placement.worker_threads(system.worker_threads, system.num_workers)
  workers = [
    kernel_worker.KernelWorker(client, f'kernel_worker_{i}', threads, run.cache, stop)
    for i in range(system.num_workers)
  ]
  follower = evaluator.Evaluator(client, run.directory.path, 1, run.cache, stop)
  running = [threading.Thread(target=node.run, daemon=True) for node in (*workers, follower)]
  for thread in running:
    thread.start()
  coordinator.run()
  for thread in running:
    thread.join(10)


if __name__ == '__main__':
  command_line.exit_with(main)
