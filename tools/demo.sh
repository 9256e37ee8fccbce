#!/bin/sh
# Runs the demo anew in the folder $1; of what is there it removes an earlier demo and nothing else.
# $PYTHON is the interpreter.
set -eu
case $1 in -*) folder=./$1 ;; *) folder=$1 ;; esac
config=--config=configs/digits.py
type=--lp_launch_type=local_mp
demo="launch.py $config \(--workdir=[^ ]*\|'--workdir=.*'\) $type"  # as command.txt has it

refuse() { printf 'demo: DEMO_DIR=%s %s\n' "$folder" "$1" >&2; exit 2; }

[ -n "$folder" ] || refuse "names no folder."
if [ -f "$folder/command.txt" ] && grep -qx "[^ ]* $demo" "$folder/command.txt"; then
  "$PYTHON" -c 'import fcntl, sys; fcntl.flock(open(sys.argv[1], "a"), fcntl.LOCK_EX | fcntl.LOCK_NB)' \
    "$folder/.lock" 2>/dev/null ||
    refuse "is in use by a demo that is still going; stop it or choose another."
  rm -rf -- "$folder"
elif [ -e "$folder" ] || [ -L "$folder" ]; then
  [ -d "$folder" ] && [ -z "$(ls -A -- "$folder")" ] ||
    refuse "is not an earlier demo's; choose another, or remove it by hand."
fi
exec "$PYTHON" launch.py $config --workdir="$folder" $type
