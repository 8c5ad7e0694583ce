# SPDX-License-Identifier: Apache-2.0
"""A training script that knows nothing of deepspeed_ds4sci: what `deepspeed` launches in test_engine_launcher.py."""

import argparse
import json

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel

# DeepSpeed's op for inference on CPUs of one node, which it would compile for minutes, has no part in training.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--result")
parser = deepspeed.add_config_arguments(parser)
arguments = parser.parse_args()

torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=11,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
)
data = [{"input_ids": (tokens := torch.randint(11, (12,))), "labels": tokens} for _ in range(4)]
engine, _, loader, _ = deepspeed.initialize(
    args=arguments, model=model, model_parameters=model.parameters(), training_data=data
)
losses = []
for batch in loader:
    batch = {name: value.to(engine.device) for name, value in batch.items()}
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    losses.append(loss.item())
if torch.distributed.get_rank() == 0:
    with open(arguments.result, "w") as result:
        attention = engine.module.config._attn_implementation
        json.dump({"losses": losses, "attention": attention, "dp": engine.dp_world_size}, result)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
