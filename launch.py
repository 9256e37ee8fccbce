"""Launches a distillation run: coordinator, kernel workers and evaluator, as processes of this
machine, the workers one a GPU; or, by --lp_launch_type=local_mt, as threads of one process on CPU.

    python launch.py --config=configs/digits.py --workdir=runs/digits
    python launch.py --status --workdir=runs/digits [--json]

On several hosts, one node of the same program a process (BUILD.md, 'Clusters'):

    python launch.py --role=coordinator --config=configs/digits.py --workdir=runs/digits
    python launch.py --role=worker --coordinator=HOST:PORT
    python launch.py --role=evaluator --workdir=runs/digits

or all of them as Slurm's jobs, by --cluster=slurm, or on Kubernetes, by --cluster=kubernetes.

Exit status: 0 finished, 1 failed, 2 bad input, 75 stopped with a checkpoint (the same command
resumes).
"""

import os

from programs import placement, supervisor

if not supervisor.is_child():  # the environment of a child is its parent's
  os.environ.update(placement.launcher_environment())  # before NumPy and JAX start

import launchpad as lp
from absl import flags

from programs import (
  command_line,
  distill,
  hosts,
  kubernetes_cluster,
  outcome,
  signals,
  slurm_cluster,
  start,
  status,
  terminal,
)

flags.FLAGS.set_default('lp_launch_type', lp.LaunchType.LOCAL_MULTI_PROCESSING.value)


def main(argv: list[str]) -> int:
  """Does what the flags say; returns the exit status. Raises BadInput, RunDirectoryError."""
  start.parse(argv)
  if status.STATUS.value or status.JSON.value:
    return status.show()
  if hosts.ROLE.value:
    return hosts.run_role(hosts.ROLE.value)
  if slurm_cluster.CLUSTER.value == 'slurm':
    return slurm_cluster.submit(argv)
  if slurm_cluster.CLUSTER.value == 'kubernetes':
    return kubernetes_cluster.print_manifest(argv)
  run = distill.prepare()
  program = distill.make_program(run)
  with terminal.show_output(run.directory):
    run.directory.begin()
    with signals.terminal_signals_blocked():
      manager = lp.launch(
        program, local_resources=distill.local_resources(run), terminal='current_terminal'
      )
    distill.stop_on_signals()
    distill.wait(manager)
  return outcome.conclude(run.directory)


if __name__ == '__main__':
  command_line.exit_with(main)
