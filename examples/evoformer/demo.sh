#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains the small Evoformer on what this machine has: its GPUs, else two CPU processes. The run is cut off shortly
# before its end and resumed from its checkpoint. Needs `python` and `deepspeed` on PATH; `make demo` sees to that.
#
#   DS4SCI_DEMO_STEPS=20     a short run of 2 or more steps that need not beat the column profile
#   DS4SCI_DEMO_OUTPUT=DIR   where log, plot and checkpoints go; an earlier log there is replaced
set -euo pipefail
cd "$(dirname "$0")"
root=../..
output=${DS4SCI_DEMO_OUTPUT:-runs/demo}

options=()
if [ -n "${DS4SCI_DEMO_STEPS:-}" ]; then
    steps=$DS4SCI_DEMO_STEPS
    if ! [[ $steps =~ ^[1-9][0-9]*$ ]] || [ "$steps" -lt 2 ]; then
        echo "demo: DS4SCI_DEMO_STEPS must be a whole number from 2 on (one step before the cut, one after it), got $steps" >&2
        exit 1
    fi
    options+=(--eval-every "$steps")
else
    steps=800
    options+=(--require-beat-profile)
fi
cut=$((steps - steps / 20 - 1))

if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "demo: on the GPUs of this machine, bf16, ZeRO-2"
    devices=()
    config=$root/configs/evoformer_bf16_zero2.json
else
    echo "demo: no GPU that torch can use; two CPU processes, ZeRO-2, optimizer offload"
    devices=(--num_gpus 2)
    config=$root/configs/evoformer_cpu_zero2_offload.json
    export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
fi
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

train() {
    deepspeed --quiet --master_port "$port" "${devices[@]}" train.py \
        --config "$config" --output "$output" --steps "$steps" "${options[@]}" "$@"
}

train --stop-after "$cut"
echo "demo: interrupted at step $cut of $steps; resuming from the checkpoint"
train --resume
echo "demo: $(cd "$output" && pwd) holds log.jsonl, plot.png, checkpoints/"
