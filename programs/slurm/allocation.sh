#!/bin/bash
# The whole run as steps of the allocation in which this is started (salloc, or a job script); its
# exit status is the run's. Edit freely. Arguments: the coordinator's flags.
# Environment: KIP_ROOT, KIP_PYTHON, KIP_WORKDIR, KIP_WORKERS; KIP_OPTIONS and KIP_WORKER_OPTIONS are
# srun's.
logs=$KIP_WORKDIR/logs

# Sessions of their own: srun takes a terminal's Ctrl-C for itself. Coordinator and evaluator share
# CPUs with workers, and have no GPU.
one=(setsid srun --overlap --nodes=1 --ntasks=1 --gres=none $KIP_OPTIONS)
"${one[@]}" env CUDA_VISIBLE_DEVICES= bash -c '
  echo "$SLURM_JOB_ID.$SLURM_STEP_ID" > "$KIP_WORKDIR/logs/coordinator.step"
  exec "$KIP_PYTHON" "$KIP_ROOT/launch.py" --role=coordinator "$@"' coordinator "$@" &
coordinator=$!
"${one[@]}" --output="$logs/evaluator.log" --open-mode=append env CUDA_VISIBLE_DEVICES= \
  "$KIP_PYTHON" "$KIP_ROOT/launch.py" --role=evaluator --workdir="$KIP_WORKDIR" &
evaluator=$!
# A worker that is lost takes no other with it.
setsid srun --ntasks="$KIP_WORKERS" --no-kill --kill-on-bad-exit=0 --wait=0 \
  --output="$logs/worker_%j_%s_%t.log" $KIP_OPTIONS $KIP_WORKER_OPTIONS bash -c '
  exec "$KIP_PYTHON" "$KIP_ROOT/launch.py" --role=worker --workdir="$KIP_WORKDIR" \
    --threads="${SLURM_CPUS_PER_TASK:-0}" \
    --name="${SLURM_JOB_ID}_${SLURM_STEP_ID}_$SLURM_PROCID"' &
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
