#!/bin/bash
# lab.sh FOLDER NODES [accounting]: a private Slurm cluster in namespaces of its own; a controller and NODES machines on a
# bridge; with `accounting` slurmdbd, too, which demands the account `lab`, while slurmctld soon forgets ended jobs.
# Each machine has its own network, processes, /tmp, /dev/shm and host name, and eight GPUs that are links to /dev/null.
# It prints "ready" and lives until its standard input closes; then every process of it is gone with its namespace.
set -u
if [ -z "${LAB_INSIDE:-}" ]; then
  user=""
  [ "$(id -u)" = 0 ] || user="--user --map-current-user --keep-caps"
  exec env LAB_INSIDE=1 unshare $user --net --mount --pid --uts --ipc --fork --kill-child --mount-proc bash "$0" "$@"
fi
BASE=$1 NODES=$2 ACCOUNTING=${3:-} NET=10.77.0
mkdir -p $BASE/{etc,log,state,dev,munge,mrun,shared,home/.ray}
chmod 700 $BASE/munge; chmod 755 $BASE/mrun
export SLURM_CONF=$BASE/etc/slurm.conf
echo somebody-elses-token > $BASE/home/.ray/auth_token      # with it, a Ray of several nodes never forms unless told how
hostname ctl
ip link set lo up
ip link add br0 type bridge; ip addr add $NET.254/24 dev br0; ip link set br0 up
{ echo "127.0.0.1 localhost"; echo "$NET.254 ctl"; for i in $(seq $NODES); do echo "$NET.$i node$i"; done; } > $BASE/etc/hosts
{ grep -v ^hosts /etc/nsswitch.conf; echo 'hosts: files'; } > $BASE/etc/nsswitch.conf
mount --make-rprivate /
mount --bind $BASE/etc/hosts /etc/hosts
mount --bind $BASE/etc/nsswitch.conf /etc/nsswitch.conf
dd if=/dev/urandom of=$BASE/munge/key bs=1024 count=1 status=none; chmod 400 $BASE/munge/key
for i in $(seq 0 7); do ln -sfn /dev/null $BASE/dev/nvidia$i; done
storage="AccountingStorageType=accounting_storage/none
MinJobAge=3600"
[ -z "$ACCOUNTING" ] || storage="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=ctl
AccountingStoragePass=$BASE/mrun/munge.sock
AccountingStorageEnforce=associations,limits,qos
MinJobAge=2"
cat > $BASE/etc/slurm.conf <<C
ClusterName=lab
SlurmctldHost=ctl($NET.254)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$BASE/mrun/munge.sock,cred_expire=5
StateSaveLocation=$BASE/state
SlurmdSpoolDir=$BASE/spool-%n
SlurmctldPidFile=$BASE/log/slurmctld.pid
SlurmdPidFile=$BASE/log/slurmd-%n.pid
SlurmctldLogFile=$BASE/log/slurmctld.log
SlurmdLogFile=$BASE/log/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
$storage
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=2
KillWait=15
SlurmdTimeout=15
TCPTimeout=2
MessageTimeout=10
NodeName=DEFAULT CPUs=8 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
$(for i in $(seq $NODES); do echo "NodeName=node$i NodeAddr=$NET.$i"; done)
PartitionName=main Nodes=ALL Default=YES MaxTime=1-0 DefaultTime=5 PriorityTier=10 State=UP
PartitionName=spot Nodes=ALL MaxTime=2:00:00 DefaultTime=5 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
C
echo "AutoDetect=off
NodeName=node[1-$NODES] Name=gpu File=$BASE/dev/nvidia[0-7]" > $BASE/etc/gres.conf
munged --key-file=$BASE/munge/key --socket=$BASE/mrun/munge.sock --pid-file=$BASE/mrun/munged.pid \
  --log-file=$BASE/mrun/munged.log --seed-file=$BASE/mrun/munged.seed || exit 90
database() {
  db="--no-defaults --socket=$BASE/mrun/db.sock" me=$(id -un)
  mariadb-install-db --no-defaults --user=$me --datadir=$BASE/db --auth-root-authentication-method=normal --skip-test-db
  mariadbd $db --user=$me --datadir=$BASE/db --bind-address=127.0.0.1 --port=3307 --pid-file=$BASE/mrun/db.pid &
  for k in $(seq 300); do mariadb-admin $db -u root ping && break; sleep 0.1; done
  mariadb $db -u root -e "grant all on *.* to slurm@'127.0.0.1' identified by 'slurm'; grant all on *.* to slurm@localhost identified by 'slurm'"
  { echo "AuthType=auth/munge"; echo "AuthInfo=socket=$BASE/mrun/munge.sock"; echo "DbdHost=ctl"; echo "SlurmUser=$me"
    echo "StorageType=accounting_storage/mysql"; echo "StorageHost=127.0.0.1"; echo "StoragePort=3307"; echo "StorageUser=slurm"
    echo "StoragePass=slurm"; echo "StorageLoc=lab"; echo "PidFile=$BASE/log/slurmdbd.pid"; echo "LogFile=$BASE/log/slurmdbd.log"
  } > $BASE/etc/slurmdbd.conf
  chmod 600 $BASE/etc/slurmdbd.conf
  slurmdbd || return
  for k in $(seq 300); do sacctmgr -n show cluster && break; sleep 0.1; done
  sacctmgr -i add cluster lab; sacctmgr -i add account lab cluster=lab; sacctmgr -i add user $me account=lab
}
[ -z "$ACCOUNTING" ] || database > $BASE/log/database.log 2>&1 || exit 93
slurmctld -f $SLURM_CONF || exit 91
cat > $BASE/node.sh <<'N'
set -u; i=$1 BASE=$2 NET=$3
hostname node$i
mount -t proc proc /proc
mkdir -p $BASE/tmp-$i; chmod 1777 $BASE/tmp-$i; mount --bind $BASE/tmp-$i /tmp
mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
for k in $(seq 500); do ip link show eth0 >/dev/null 2>&1 && break; sleep 0.02; done
ip link set lo up; ip addr add $NET.$i/24 dev eth0; ip link set eth0 up; ip route add default via $NET.254
ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0; ip link set docker0 up   # the same on every node
while :; do slurmd -D -f $SLURM_CONF -N node$i >>$BASE/log/slurmd-node$i.out 2>&1; sleep 60; done
N
for i in $(seq $NODES); do
  mkdir -p $BASE/spool-node$i
  unshare --net --pid --mount --uts --ipc --fork --kill-child bash $BASE/node.sh $i $BASE $NET < /dev/null &
  up=$!
  for k in $(seq 250); do
    c=$(pgrep -P $up | head -1)
    [ -n "$c" ] && [ "$(readlink /proc/$c/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break
    sleep 0.02
  done
  echo $c > $BASE/log/node$i.init
  ip link add veth$i type veth peer name eth0 netns $c; ip link set veth$i master br0 up
done
for k in $(seq 600); do [ "$(sinfo -h -p main -t idle -N -o %N 2>/dev/null | wc -l)" = $NODES ] && break; sleep 0.05; done
[ "$(sinfo -h -p main -t idle -N -o %N | wc -l)" = $NODES ] || { tail -5 $BASE/log/*.log; exit 92; }
echo ready
read -r line
