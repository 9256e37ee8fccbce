#!/bin/bash
# One task of the array of workers, or the evaluator. Slurm replaces no failed task of an array: the task requeues itself.
# Arguments: launch.py's flags.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
source "$KIP_ROOT/programs/slurm/common.sh"

export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES-}"  # to whom Slurm has given no GPU, none on the node belongs

# A life of its own name: what Slurm believes to be lost may still run.
name="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_${SLURM_ARRAY_TASK_ID:-0}_life${SLURM_RESTART_COUNT:-0}"
play "$@" --name="$name" --threads="${SLURM_CPUS_PER_TASK:-0}"
if [ "$out_of_time" ] || { [ "$status" != 0 ] && [ "$status" != 2 ] && [ ! "$told" ]; }; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
