#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains a tiny genome model on what this machine has: its GPUs, else two CPU processes that share each sequence. The
# run is cut off shortly before its end and resumed from its checkpoint. Needs `python` and `deepspeed` on PATH;
# `make demo` sees to that.
#
#   DS4SCI_DEMO_STEPS=20            a short run of 2 or more steps that need not beat the Markov model
#   DS4SCI_GENSLM_DEMO_OUTPUT=DIR   where log, plots and checkpoints go; an earlier log there is replaced
set -euo pipefail
cd "$(dirname "$0")"
root=../..
output=${DS4SCI_GENSLM_DEMO_OUTPUT:-runs/demo}

options=()
if [ -n "${DS4SCI_DEMO_STEPS:-}" ]; then
    steps=$DS4SCI_DEMO_STEPS
    if ! [[ $steps =~ ^[1-9][0-9]*$ ]] || [ "$steps" -lt 2 ]; then
        echo "demo: DS4SCI_DEMO_STEPS must be a whole number from 2 on (one step before the cut, one after it), got $steps" >&2
        exit 1
    fi
    options+=(--eval-every "$steps")
else
    steps=200
    options+=(--require-beat-markov)
fi
cut=$((steps - steps / 20 - 1))

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "demo: a genome model on a GPU of this machine, bf16, ZeRO-1"
    devices=(--num_gpus 1)
    config=$root/configs/genslm_25M_bf16_zero1.json
else
    echo "demo: a genome model on two CPU processes that share each sequence, ZeRO-2, sharded position table, masks above their threshold"
    devices=(--num_gpus 2)
    config=$root/configs/genslm_cpu_zero2_sequence_parallel.json
    export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
fi
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

train() {
    deepspeed --quiet --master_port "$port" "${devices[@]}" train.py \
        --deepspeed_config "$config" --output "$output" --steps "$steps" "${options[@]}" "$@"
}

train --stop-after "$cut"
echo "demo: interrupted at step $cut of $steps; resuming from the checkpoint"
train --resume
echo "demo: $(cd "$output" && pwd) holds log.jsonl, plot.png, embeddings.npz, embeddings.png, checkpoints/, tensorboard/"
