"""Launches a distillation run: coordinator, kernel workers and evaluator, as processes of this
machine, the workers one a GPU; or, by
--lp_launch_type=local_mt, as threads of one process on CPU.

    python launch.py --config=configs/digits.py --workdir=runs/digits
    python launch.py --status --workdir=runs/digits [--json]

On several hosts, one node of the same program a process (BUILD.md, 'Clusters'):

    python launch.py --role=coordinator --config=configs/digits.py --workdir=runs/digits
    python launch.py --role=worker --coordinator=HOST:PORT
    python launch.py --role=evaluator --workdir=runs/digits

or all of them as Slurm's jobs, by --cluster=slurm.

Exit status: 0 finished, 1 failed, 2 bad input, 75 stopped with a checkpoint (the same command
resumes).
"""

import os
import sys

from programs import isolation, placement, supervisor

isolation.enter_if_restarted()
if not supervisor.is_child():  # else its parent has seen to it
  os.environ.update(placement.launcher_environment())  # before NumPy and JAX start

import launchpad as lp
from absl import flags, logging

from artifacts import run_directory
from programs import command_line, distill, hosts, slurm_cluster, start, status, terminal

flags.FLAGS.set_default('lp_launch_type', lp.LaunchType.LOCAL_MULTI_PROCESSING.value)
flags.FLAGS.set_default('lp_termination_notice_secs', supervisor.LAUNCHER_NOTICE)


def main(argv: list[str]) -> int:
  try:
    start.parse(argv)
    if status.STATUS.value or status.JSON.value:
      return status.show()
    if hosts.ROLE.value:
      return hosts.play()
    if slurm_cluster.CLUSTER.value:
      return slurm_cluster.submit(argv)
    threads = flags.FLAGS.lp_launch_type == lp.LaunchType.LOCAL_MULTI_THREADING.value
    run = start.ready(placement.no_gpus if threads else placement.find_gpus)
    distill.check_port(run.config.system.port)
  except (start.BadInput, run_directory.RunDirectoryError) as error:
    print(f'error: {error}', file=sys.stderr)
    return run_directory.BAD_INPUT_STATUS
  isolation.restart_isolated()
  for remark in run.remarks:
    logging.info(remark)
  program = distill.make_program(run)
  with terminal.shown(run.directory):
    run.directory.begin()
    manager = distill.launch(program, run)
    if not isolation.is_isolated() and not run.config.system.accept_open_port:
      logging.warning(
        '%s is open to every host that can reach this one, and whoever connects can run code as you: no private network '
        'could be made (see BUILD.md; system.accept_open_port=True ends this warning).',
        distill.coordinator_address(program),
      )
    distill.wait(manager)
  return start.outcome(run.directory)


if __name__ == '__main__':
  command_line.exit_with(main)
