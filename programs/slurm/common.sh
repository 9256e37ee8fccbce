# What all jobs do: start launch.py, pass Slurm's warning of the time limit on to it, and log its exit
# status. Set up the job's environment here. The functions' arguments are the jobs' own: the
# project's folder, its Python, and launch.py's flags.

# `out_of_time`: Slurm has warned of the time limit. `asked_to_stop`: by Slurm or scancel.
out_of_time= asked_to_stop= child=
trap 'out_of_time=1; kill -TERM $child 2>/dev/null' USR1
# launch.py gets this signal from Slurm, too; asked twice it would end without a checkpoint.
trap asked_to_stop=1 TERM

# Sets `status`.
run_role() {
  local root=$1 python=$2
  "$python" "$root/launch.py" "${@:3}" &
  child=$!
  wait "$child"; status=$?
  while kill -0 "$child" 2>/dev/null; do wait "$child"; status=$?; done  # a signal ends `wait` early
  echo "ended with status $status"
}

# `run_role`, again and again while it fails: the coordinator may be away for longer than a worker
# waits for it. Ends with the run (status 0), after bad input (2), when it is to stop, and after ten
# failures in a row, if none took ten minutes to come.
run_client() {
  local failures=0 pause begin
  while
    begin=$SECONDS
    run_role "$@"
    [ $((SECONDS - begin)) -lt 600 ] || failures=0
    failures=$((failures + 1))
    failed && [ "$failures" -lt 10 ]
  do
    pause=$((failures < 6 ? 5 << failures : 300))
    echo "started again in $pause s"
    sleep "$pause" & child=$!
    wait "$child"
    failed || break  # it was asked to stop meanwhile
  done
}

# Whether a worker or evaluator has ended before its time.
failed() {
  [[ $status != @(0|2|75) ]] && [ ! "$asked_to_stop$out_of_time" ]  # 75: it was asked to stop
}
