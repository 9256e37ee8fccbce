#!/bin/bash
# One task of the array of workers, or the evaluator. Slurm does not replace a failed task of an
# array: the task requeues itself, to another node perhaps. Arguments: the project's folder, its
# Python, and launch.py's flags.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
source "$1/programs/slurm/common.sh"

# A task to which Slurm has given no GPU must not see those of others on the node.
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-}"

# Each life has a name of its own: what Slurm believes to be lost may still run.
name="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_${SLURM_ARRAY_TASK_ID:-0}_life${SLURM_RESTART_COUNT:-0}"
run_client "$@" --name="$name" --threads="${SLURM_CPUS_PER_TASK:-0}"
if [ "$out_of_time" ] || { failed && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; }; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
