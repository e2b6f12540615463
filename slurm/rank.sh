#!/bin/bash
# One process of the trainer, `rank.sh COMMAND...`: names its rank as torch.distributed expects it, and notes how it ended.
if [ "${1:-}" = --help ]; then
  awk 'NR > 1 { if (!/^#/ || /^# ===/) exit; sub(/^# ?/, ""); print }' "$0"
  exit
fi
set -u
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
# Signals to the step reach the process below as well: this shell only has to outlive them.
trap : USR1 TERM INT
"$@" &
child=$!
wait "$child"
while kill -0 "$child" 2>/dev/null; do wait "$child"; done
wait "$child"
code=$?
if [ "$code" -ne 0 ]; then
  printf '%s %s %s %s\n' "$(date +%s.%N)" "$code" "$RANK" "${SLURMD_NODENAME:-?}" >>"$OREAL_EXITS"
fi
exit "$code"
