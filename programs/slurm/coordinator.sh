#!/bin/bash
# The run's coordinator, a job of its own: it is requeued when its node fails or its time runs out, and goes on from its checkpoint.
# Edit freely: modules to load, mounts to wait for. Arguments: launch.py's flags.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
source "$KIP_ROOT/programs/slurm/common.sh"

play --role=coordinator "$@"
[ "$out_of_time" ] && [ "$status" = 75 ] && exec scontrol requeue "$SLURM_JOB_ID"
if [ "$status" != 75 ] && [ ! "$told" ]; then  # finished or failed: nobody is needed any more, whether running, waiting or added later
  squeue --noheader --me --name="$SLURM_JOB_NAME" --format=%i | grep -v "^$SLURM_JOB_ID\$" | xargs --no-run-if-empty scancel
fi
exit "$status"
