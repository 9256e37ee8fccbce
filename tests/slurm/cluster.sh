#!/bin/bash
# A Slurm of its own on this machine: one controller and NODES slurmd, as root. Needs Debian's slurm-wlm and munge.
#     cluster.sh up FOLDER [NODES]      then: export SLURM_CONF=FOLDER/slurm.conf
#     cluster.sh node FOLDER INDEX      starts a slurmd (again)
#     cluster.sh down FOLDER
set -eu
command=$1 folder=$(realpath -m "$2") nodes=${3:-4}
host=$(hostname -s)

node() { SLURM_CONF=$folder/slurm.conf slurmd -N "node$1" -L "$folder/node$1.log"; }

case $command in
  up)
    mkdir -p "$folder/state"
    dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
    chmod 700 "$folder" && chmod 400 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
      --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" --num-threads=4
    read -ra port < <(python3 -c '
import socket, sys
probes = [socket.socket() for _ in range(int(sys.argv[1]) + 1)]
for probe in probes: probe.bind(("", 0))
print(*(probe.getsockname()[1] for probe in probes))' "$nodes")
    {
      cat <<CONF
ClusterName=kip
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${port[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SlurmdTimeout=15
KillWait=15
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/%n.pid
SlurmdSpoolDir=$folder/spool-%n
StateSaveLocation=$folder/state
GresTypes=gpu
PartitionName=all Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE
CONF
      for i in $(seq "$nodes"); do
        echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=${port[$i]} CPUs=4 RealMemory=4000 Gres=gpu:2"
      done
    } > "$folder/slurm.conf"
    for i in 0 1; do mknod "$folder/gpu$i" c 1 3; echo "Name=gpu File=$folder/gpu$i"; done > "$folder/gres.conf"  # as /dev/null
    SLURM_CONF=$folder/slurm.conf slurmctld -c
    for i in $(seq "$nodes"); do node "$i"; done
    ;;
  node) node "$3" ;;
  down)
    SLURM_CONF=$folder/slurm.conf timeout 20 scancel --user="$(id -un)" || true
    for file in "$folder"/*.pid; do
      [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
    done
    ;;
  *) sed -n '2,5s/^# *//p' "$0"; exit 2 ;;
esac
