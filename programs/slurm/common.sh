# What all jobs do: start launch.py, pass Slurm's warning of the time limit on to it, and log its exit
# status. Set up the job's environment here.

# Sets `status`, and `out_of_time` if Slurm has warned of the time limit, `asked_to_stop` if Slurm or
# scancel has asked it to stop.
run_role() {
  out_of_time= asked_to_stop=
  "$KIP_PYTHON" "$KIP_ROOT/launch.py" "$@" &
  child=$!
  trap 'out_of_time=1; kill -TERM $child 2>/dev/null' USR1
  # launch.py gets this signal from Slurm, too; asked twice it would end without a checkpoint.
  trap asked_to_stop=1 TERM
  wait "$child"; status=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done  # a signal ends `wait` early
  echo "ended with status $status"
}
