#!/usr/bin/env bash
# A real SLURM of several nodes on this one machine, for tests: loopback only, own key, own directories, any user.
#
#   slurm/test_cluster/up.sh DIRECTORY [NODES]     then  export SLURM_CONF=DIRECTORY/slurm.conf
#   slurm/test_cluster/down.sh DIRECTORY
#
# With the file DIRECTORY/hosts the daemons run on the hosts that its lines name, the controller on the first:
# NAME ADDRESS PROGRAM, where PROGRAM runs its arguments on that host.
#
# Each node has 16 imagined CPUs and 8 imagined GPUs (links to /dev/null). Partition `batch` can be preempted by
# `urgent`. Needs `make slurm-deps`.
if [ "${1:---help}" = --help ]; then
  awk 'NR > 1 { if (!/^#/ || /^# ===/) exit; sub(/^# ?/, ""); print }' "$0"
  exit
fi
set -euo pipefail
PATH=$PATH:/usr/sbin
for program in munged slurmctld slurmd; do
  command -v "$program" >/dev/null || { echo "$program is missing: make slurm-deps" >&2; exit 3; }
done
mkdir -p "$1"
base=$(cd "$1" && pwd)
# Several clusters may run at once: each takes the first block of ports where no controller listens.
port=27000
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 2000)); done
user=$(id -un)
for file in "$base"/run/*.pid; do
  [ -s "$file" ] && kill -0 "$(<"$file")" 2>/dev/null && { echo "already running: $file" >&2; exit 4; }
done
rm -rf "$base"/{run,state,spool}
mkdir -p "$base"/{dev,log,run,state,spool,munge}
chmod 755 "$base" "$base/run"
chmod 700 "$base/munge" "$base/state"

# --force: a parent directory that others may write, like /tmp, is an error to munged otherwise.
[ -s "$base/munge/key" ] || (umask 077 && head -c 128 /dev/urandom >"$base/munge/key")
munged --force --num-threads=2 --key-file="$base/munge/key" --seed-file="$base/munge/seed" \
  --socket="$base/run/munge.sock" --pid-file="$base/run/munged.pid" --log-file="$base/log/munged.log" \
  2>"$base/log/munged.err"

if [ -s "$base/hosts" ]; then
  mapfile -t hosts <"$base/hosts"
  listen=  # at all addresses: that of a host's own name may be 127.0.1.1
else
  hosts=("$(hostname -s) 127.0.0.1 env")
  listen=CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
  # Each node has a loopback address of its own, so that equal ports of two nodes do not collide. down.sh removes the lines.
  for i in $(seq "${2:-4}"); do
    echo "127.0.1.$i node$i # oreal test cluster $base" >>/etc/hosts
    hosts+=("node$i 127.0.0.1 env")
  done
fi
read -r controller controller_address on_controller <<<"${hosts[0]}"
nodes=("${hosts[@]:1}")
names=$(printf '%s\n' "${nodes[@]%% *}" | paste -sd,)
for i in $(seq 0 7); do ln -sfn /dev/null "$base/dev/gpu$i"; done
echo "NodeName=$names Name=gpu File=$base/dev/gpu[0-7]" >"$base/gres.conf"
cat >"$base/slurm.conf" <<CONF
ClusterName=oreal_test
SlurmctldHost=$controller($controller_address)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again.
AuthInfo=socket=$base/run/munge.sock,cred_expire=5
SlurmctldPort=$port
$listen
SrunPortRange=$((port + 1000))-$((port + 1999))
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
SlurmctldPidFile=$base/run/slurmctld.pid
SlurmdPidFile=$base/run/%n.pid
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
MailProg=/bin/true
ReturnToService=2
JobRequeue=1
MinJobAge=3600
KillWait=5
MessageTimeout=30
SlurmdTimeout=60
InactiveLimit=0
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,bf_yield_sleep=100,bf_continue,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
CONF
for i in "${!nodes[@]}"; do
  read -r name address _ <<<"${nodes[i]}"
  echo "NodeName=$name NodeHostname=$name NodeAddr=$address Port=$((port + 1 + i)) CPUs=16 RealMemory=8000 Gres=gpu:8" \
    >>"$base/slurm.conf"
done
cat >>"$base/slurm.conf" <<CONF
PartitionName=batch Nodes=ALL Default=YES MaxTime=1:00:00 State=UP PriorityTier=1 GraceTime=300 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=1:00:00 State=UP PriorityTier=10 PreemptMode=OFF
CONF
export SLURM_CONF=$base/slurm.conf
"$on_controller" slurmctld -c -i 2>>"$base/log/slurmctld.err"
for node in "${nodes[@]}"; do
  read -r name _ on_node <<<"$node"
  mkdir -p "$base/spool/$name"
  "$on_node" slurmd -N "$name" 2>>"$base/log/$name.err"
done
for _ in $(seq 300); do
  idle=$(sinfo --noheader --Node --partition=batch --format='%t' 2>/dev/null | grep -c '^idle$' || true)
  [ "$idle" = "${#nodes[@]}" ] && { echo "$idle nodes are idle: export SLURM_CONF=$base/slurm.conf"; exit 0; }
  sleep 0.2
done
echo "the nodes did not come up: $base/log" >&2
exit 5
