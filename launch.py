"""Launches a distillation run: coordinator, kernel workers and evaluator, as processes (local_mp) or threads (local_mt) of this machine.

    python launch.py --config=configs/digits.py --workdir=runs/digits --lp_launch_type=local_mp

Exit status: 0 finished, 1 failed, 2 bad input, 75 stopped with a checkpoint (the same command resumes).
"""

import os
import sys

from programs import placement

os.environ.update(placement.environment(1))  # before JAX starts; local_mp gives every process its own

import launchpad as lp  # pylint: disable=wrong-import-position

from programs import distill  # pylint: disable=wrong-import-position
from programs import start  # pylint: disable=wrong-import-position
from programs import terminal  # pylint: disable=wrong-import-position


def main(argv: list[str]) -> int:
  try:
    run = start.ready(argv)
    distill.check_port(run.config['system']['port'])
  except start.BadInput as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  with terminal.line_by_line():
    manager = lp.launch(distill.make_program(run), local_resources=distill.local_resources(run), terminal='current_terminal')
    manager.wait(raise_error=False)
  return start.outcome(run.directory)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
