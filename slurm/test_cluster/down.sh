#!/usr/bin/env bash
# Ends what up.sh started, by process id: slurm/test_cluster/down.sh DIRECTORY
if [ "${1:---help}" = --help ]; then
  awk 'NR > 1 { if (!/^#/ || /^# ===/) exit; sub(/^# ?/, ""); print }' "$0"
  exit
fi
set -uo pipefail
base=$(cd "$1" && pwd)
export SLURM_CONF=$base/slurm.conf
# Jobs first, so that their processes end with them.
timeout 10 squeue --noheader --format=%A 2>/dev/null | sort -u | xargs -r timeout 10 scancel 2>/dev/null
for _ in $(seq 75); do
  [ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ] && break
  sleep 0.2
done
pids=()
for file in "$base"/run/node*.pid "$base"/run/slurmctld.pid "$base"/run/munged.pid; do
  [ -s "$file" ] || continue
  pid=$(<"$file")
  kill -TERM "$pid" 2>/dev/null && pids+=("$pid")
done
for pid in "${pids[@]:+${pids[@]}}"; do
  for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
  kill -KILL "$pid" 2>/dev/null
done
if grep -qF "# oreal test cluster $base" /etc/hosts && [ -w /etc/hosts ]; then
  rest=$(grep -vF "# oreal test cluster $base" /etc/hosts)
  printf '%s\n' "$rest" >/etc/hosts
fi
rm -rf "$base/run"
echo "stopped ${#pids[@]} daemons"
