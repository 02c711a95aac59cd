#!/usr/bin/env bash
# One run on several machines: give this on every one of them, with its own NODE_RANK.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first-machine ./torchrun_multinode.sh CONFIG [section.field=value]...
#
# MASTER_ADDR is an address of machine 0 that all machines reach, MASTER_PORT (29500) a port that is free there. CONFIG, the
# model, the data and exp_manager.exp_dir have the same paths everywhere; exp_dir is on a file system that all share.
# PYTHON chooses the interpreter; without it, the project's .venv, then python.
set -euo pipefail

: "${NNODES:?number of machines}" "${NODE_RANK:?rank of this machine, from 0}" "${MASTER_ADDR:?address of machine 0}"
: "${1:?path of a config file}"

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python
    [[ ! -x "$project/.venv/bin/python" ]] || PYTHON="$project/.venv/bin/python"
fi

# exec: a signal to this script reaches the launcher, which ends its ranks.
exec "$PYTHON" -m megatron_rl.commands.cli train \
    --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --node-rank "$NODE_RANK" \
    "$@" "trainer.num_nodes=$NNODES"
