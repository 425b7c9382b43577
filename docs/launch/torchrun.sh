#!/usr/bin/env bash
# Train on several hosts. Start this on every host with the same arguments: `docs/launch/torchrun.sh HOSTS FIRST_HOST CONFIG RUN_DIRECTORY [OPTION ...]`
#
# The hosts meet at FIRST_HOST, port 29400 (or PORT). If a process dies, torchrun restarts all of them, and the run resumes from its
# newest checkpoint. The run directory must be on a file system that all hosts share.
set -euo pipefail

hosts=${1:?usage: torchrun.sh HOSTS FIRST_HOST CONFIG RUN_DIRECTORY [OPTION ...]}
first=${2:?usage: torchrun.sh HOSTS FIRST_HOST CONFIG RUN_DIRECTORY [OPTION ...]}
config=${3:?usage: torchrun.sh HOSTS FIRST_HOST CONFIG RUN_DIRECTORY [OPTION ...]}
run=${4:?usage: torchrun.sh HOSTS FIRST_HOST CONFIG RUN_DIRECTORY [OPTION ...]}
shift 4

exec torchrun --nnodes="$hosts" --nproc-per-node="${RANKS_PER_HOST:-gpu}" --max-restarts=10 \
    --rdzv-backend=c10d --rdzv-endpoint="$first:${PORT:-29400}" --rdzv-id="$(basename "$run")" \
    -m msf_faiss_cli pretrain "$config" --out "$run" "$@"
