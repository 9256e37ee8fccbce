#!/bin/bash
# The run's coordinator, a job of its own: it is requeued when its node fails or its time runs out,
# and resumes from its checkpoint. Edit freely: modules to load, mounts to wait for. Arguments:
# the project's folder, its Python, and launch.py's flags.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
source "$1/programs/slurm/common.sh"

run_role "$1" "$2" --role=coordinator "${@:3}"
[ "$out_of_time" ] && [ "$status" = 75 ] && exec scontrol requeue "$SLURM_JOB_ID"
if [ "$status" != 75 ] && [ ! "$asked_to_stop" ]; then
  # Finished or failed: cancels the other jobs, whether they run, wait or were added later.
  squeue --noheader --me --name="$SLURM_JOB_NAME" --format=%i | grep -v "^$SLURM_JOB_ID\$" |
    xargs --no-run-if-empty scancel
fi
exit "$status"
