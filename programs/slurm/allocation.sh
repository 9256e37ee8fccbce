#!/bin/bash
# The whole run as steps of the allocation in which this is started (salloc, or a job script); its
# exit status is the run's. Edit freely. Arguments: srun's options -- its options for workers -- the
# coordinator's flags. Environment: KIP_ROOT, KIP_PYTHON, KIP_WORKDIR, KIP_WORKERS.
logs=$KIP_WORKDIR/logs
output=${logs//%/%%}  # srun replaces %j and the like
options=() worker_options=()
while [ "$1" != -- ]; do options+=("$1"); shift; done; shift
while [ "$1" != -- ]; do worker_options+=("$1"); shift; done; shift

# Sessions of their own: srun takes a terminal's Ctrl-C for itself. Coordinator and evaluator share
# CPUs with workers, and have no GPU.
one=(setsid srun --overlap --nodes=1 --ntasks=1 --gres=none "${options[@]}")
"${one[@]}" env CUDA_VISIBLE_DEVICES= bash -c '
  echo "$SLURM_JOB_ID.$SLURM_STEP_ID" > "$KIP_WORKDIR/logs/coordinator.step"
  exec "$KIP_PYTHON" "$KIP_ROOT/launch.py" --role=coordinator "$@"' coordinator "$@" &
coordinator=$!
"${one[@]}" --output="$output/evaluator.log" --open-mode=append env CUDA_VISIBLE_DEVICES= bash -c '
  source "$KIP_ROOT/programs/slurm/common.sh"
  run_client "$KIP_ROOT" "$KIP_PYTHON" --role=evaluator --workdir="$KIP_WORKDIR"
  exit "$status"' &
evaluator=$!
# A worker that is lost takes no other with it.
setsid srun --ntasks="$KIP_WORKERS" --no-kill --kill-on-bad-exit=0 --wait=0 \
  --output="$output/worker_%j_%s_%t.log" "${options[@]}" "${worker_options[@]}" bash -c '
  source "$KIP_ROOT/programs/slurm/common.sh"
  run_client "$KIP_ROOT" "$KIP_PYTHON" --role=worker --workdir="$KIP_WORKDIR" \
    --threads="${SLURM_CPUS_PER_TASK:-0}" \
    --name="${SLURM_JOB_ID}_${SLURM_STEP_ID}_$SLURM_PROCID"
  exit "$status"' &
workers=$!

stop() { scancel --signal=TERM "$(cat "$logs/coordinator.step")"; }  # srun itself would kill it
trap stop INT TERM HUP USR1
while kill -0 $coordinator 2>/dev/null; do
  wait $coordinator; status=$?  # a signal ends `wait` early
done
for _ in {1..100}; do  # the coordinator has told them to stop, unless the run can be resumed
  [ "$status" = 75 ] || ! kill -0 $evaluator $workers 2>/dev/null && break
  sleep 0.2
done
kill $evaluator $workers 2>/dev/null
wait
exit "$status"
