#!/bin/bash
# A private Slurm of two nodes on loopback addresses, without systemd or accounting.
#     tests/slurm/up.sh DIR PORT       then: export SLURM_CONF=DIR/slurm.conf
# PORT is slurmctld's; the two above it are the nodes'. Down again: scontrol shutdown, and
# kill "$(cat DIR/run/munged.pid)".
set -euo pipefail
dir=$(realpath -m "$1") port=$2
host=$(hostname -s) user=$(id -un) cpus=$(getconf _NPROCESSORS_ONLN)
memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 * 45 / 100)) # MB of each node
mkdir -p "$dir"/{state,log,run,munge} "$dir"/spool/127.0.0.{2,3}
chmod 755 "$dir"
chmod 700 "$dir/munge"
(umask 077 && head -c 1024 /dev/urandom > "$dir/munge/key")
munged --force --key-file="$dir/munge/key" --socket="$dir/run/munge.sock" \
    --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" \
    --seed-file="$dir/munge/seed" --num-threads=2
# A credential's life (cred_expire) is also how long a requeued job waits; 120 s unless said.
cat > "$dir/slurm.conf" << CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
KillWait=5
InactiveLimit=0
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
NodeName=127.0.0.2 NodeHostname=$host NodeAddr=127.0.0.2 Port=$((port + 1)) CPUs=$cpus RealMemory=$memory
NodeName=127.0.0.3 NodeHostname=$host NodeAddr=127.0.0.3 Port=$((port + 2)) CPUs=$cpus RealMemory=$memory
PartitionName=low Nodes=127.0.0.[2-3] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 MaxTime=60
PartitionName=high Nodes=127.0.0.[2-3] PriorityTier=10 PreemptMode=OFF MaxTime=60
CONF
export SLURM_CONF="$dir/slurm.conf"
slurmctld -c
for node in 127.0.0.2 127.0.0.3; do slurmd -N "$node"; done
for _ in $(seq 100); do
    [ "$(sinfo --noheader --Node --partition=low --states=idle 2> /dev/null | wc -l)" = 2 ] && exit 0
    sleep 0.2
done
echo "the nodes are not idle after 20 s:" >&2
sinfo --Node --long >&2
exit 1
