#!/usr/bin/env bash
# A private SLURM on this machine, for tests: two nodes of four pretended cores and two pretended GPUs each.
# usage: mini_slurm.sh start DIR PORT     uses PORT, PORT + 1 and PORT + 2; then: export SLURM_CONF=DIR/slurm.conf
#        mini_slurm.sh stop DIR           cancels what runs and ends the daemons, by their pid files
# Needs Debian's slurmctld, slurmd, slurm-client and munge; works as root and as any user.
set -euo pipefail
command=$1
dir=$(realpath -m "$2")
host=$(hostname -s)
other=zz2 # behind the first by name; the first is a name that resolves, as the rendezvous of a job needs it
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin:/sbin

wait_until() { # wait_until SECONDS COMMAND...
  local tries=$(($1 * 10))
  shift
  until "$@"; do
    [ $((tries -= 1)) -gt 0 ] || return 1
    sleep 0.1
  done
}

both_idle() { [ "$(sinfo -h -N -o %t 2>/dev/null | grep -cx idle)" = 2 ]; }
no_jobs() { [ -z "$(squeue -h 2>/dev/null)" ]; }
is_gone() { ! kill -0 "$1" 2>/dev/null; }

start() {
  local port=$1 index
  umask 022
  mkdir -p "$dir"/{state,log,munge,spool/"$host",spool/"$other"}
  dd if=/dev/urandom of="$dir/munge/key" bs=128 count=1 status=none
  chmod 600 "$dir/munge/key"
  for index in 0 1; do mknod "$dir/gpu$index" c 195 "$index" 2>/dev/null || : >"$dir/gpu$index"; done
  echo "NodeName=$host,$other Name=gpu File=$dir/gpu[0-1]" >"$dir/gres.conf"
  cat >"$SLURM_CONF" <<CONF
ClusterName=mini
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CredType=cred/munge
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=1000
GresTypes=gpu
NodeName=$host,$other NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 State=UP
CONF
  munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
  slurmctld
  slurmd -N "$host"
  slurmd -N "$other"
  wait_until 30 both_idle || {
    echo "the nodes did not come up; the logs are in $dir/log" >&2
    tail -n 20 "$dir"/log/*.log >&2
    return 1
  }
}

stop() {
  local file pid pids=()
  if [ -s "$dir/slurmctld.pid" ]; then
    scancel --signal=KILL --full --user="$(id -un)" 2>/dev/null || true
    scancel --user="$(id -un)" 2>/dev/null || true
    wait_until 15 no_jobs || true
  fi
  for file in "$dir"/slurmd.*.pid "$dir/slurmctld.pid" "$dir/munge/pid"; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")
    if kill "$pid" 2>/dev/null; then pids+=("$pid"); fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    wait_until 20 is_gone "$pid" || kill -9 "$pid" 2>/dev/null || true
  done
}

case $command in
  start) start "$3" ;;
  stop) stop ;;
  *)
    echo "usage: $0 start DIR PORT | stop DIR" >&2
    exit 2
    ;;
esac
