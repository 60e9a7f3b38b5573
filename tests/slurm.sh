#!/bin/sh
# tests/slurm.sh [FOLDER]: runs two notebooks as jobs of a real Slurm of one node, started here by hand and ended again.
# Needs Debian's slurm-wlm and munge, no systemd and no root; FOLDER is a checkout after `make test` or `make report` (the
# one around this script). It works on a copy of what is measured with, without the results: the checkout stays as it is.
set -eu
root=$(cd "${1:-$(dirname "$0")/..}" && pwd)
for program in munged slurmctld slurmd sbatch sinfo scancel; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" > /dev/null || { echo "$program is missing: apt install slurm-wlm munge"; exit 2; }
done
PATH=$PATH:/usr/sbin:/sbin
work=$(mktemp -d /tmp/fluxnb-slurm.XXXXXX) # a short path: sockets have a limit
host=$(hostname -s)
end() {
    status=$?
    for name in slurmd slurmctld munged; do
        [ -f "$work/$name.pid" ] && kill "$(cat "$work/$name.pid")" 2> /dev/null || true
    done
    sleep 1
    [ "$status" = 0 ] && rm -rf "$work" || echo "logs are in $work"
    exit "$status"
}
trap end EXIT INT TERM

chmod 755 "$work"
mkdir "$work/state" "$work/spool"
head -c 1024 /dev/urandom > "$work/key"
chmod 400 "$work/key"
munged --force --key-file="$work/key" --socket="$work/socket" --pid-file="$work/munged.pid" \
    --log-file="$work/munged.log" --seed-file="$work/seed"
cat > "$work/slurm.conf" << CONF
ClusterName=fluxnb
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$work/socket
SlurmctldPort=27817
SlurmdPort=27818
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$work/slurm.conf"
slurmctld
slurmd -N "$host"
for _ in $(seq 30); do
    timeout 10 sinfo --noheader --format=%t 2> /dev/null | grep -q idle && break
    sleep 1
done
timeout 10 sinfo

mkdir -p "$work/project/reports"
cp -r "$root/fluxnb" "$root/notebooks" "$root/params" "$work/project"
cp -r "$root/reports/embedded" "$work/project/reports"
cd "$work/project"
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$(command -v "$python")" ] || { echo "$python is missing: run make test once, or set PYTHON"; exit 2; }
rows() { [ -f reports/own/single_gpu/cpu/results.csv ] && wc -l < reports/own/single_gpu/cpu/results.csv || echo 0; }
before=$(rows)
PYTHONPATH=$work/project timeout 900 "$python" -m fluxnb report --gpu cpu --only 00 --only 02 --force --launch slurm
[ "$(rows)" -gt "$before" ] || { echo "no row was added"; exit 1; }
[ -z "$(timeout 10 squeue --noheader)" ] || { echo "a job is left"; exit 1; }
echo "Slurm: two notebooks ran as jobs, $(($(rows) - before)) new rows in one table"

# a job that is cancelled behind its back is a failed notebook, and the run ends
(PYTHONPATH=$work/project timeout 300 "$python" -m fluxnb report --gpu cpu --only 03 --force --launch slurm > "$work/cancelled.log" 2>&1 && code=0 || code=$?; echo "$code" > "$work/code") &
for _ in $(seq 60); do
    job=$(timeout 10 squeue --noheader --states=R --format=%i)
    [ -n "$job" ] && break
    sleep 0.5
done
sleep 3
timeout 10 scancel "$job"
wait $!
[ "$(cat "$work/code")" = 1 ] && grep -q "ended by signal\|ended without a result" "$work/cancelled.log" || { cat "$work/cancelled.log"; exit 1; }
echo "Slurm: a job that was cancelled is a failed notebook with its reason"
