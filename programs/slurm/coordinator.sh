#!/bin/bash
# The run's coordinator, a job of its own: it is requeued when its node fails or its time runs out,
# and resumes from its checkpoint. Edit freely: modules to load, mounts to wait for. Arguments:
# launch.py's flags.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
source "$KIP_ROOT/programs/slurm/common.sh"

run_role --role=coordinator "$@"
[ "$out_of_time" ] && [ "$status" = 75 ] && exec scontrol requeue "$SLURM_JOB_ID"
if [ "$status" != 75 ] && [ ! "$asked_to_stop" ]; then
  # Finished or failed: cancels the other jobs, whether they run, wait or were added later.
  squeue --noheader --me --name="$SLURM_JOB_NAME" --format=%i | grep -v "^$SLURM_JOB_ID\$" |
    xargs --no-run-if-empty scancel
fi
exit "$status"
