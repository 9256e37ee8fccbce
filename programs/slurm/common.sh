# What all jobs do: start launch.py, pass the warning of the time limit on to it, and tell why it ended. Make the job's environment here.

play() {  # sets `status`; `out_of_time` where Slurm has warned of the time limit, `told` where it (or scancel) has asked to stop
  out_of_time= told=
  "$KIP_PYTHON" "$KIP_ROOT/launch.py" "$@" &
  child=$!
  trap 'out_of_time=1; kill -TERM $child 2>/dev/null' USR1
  trap told=1 TERM  # launch.py gets it from Slurm too, and asked twice it would end without a checkpoint
  wait "$child"; status=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done  # a signal ends `wait` early
  echo "ended with status $status"
}
