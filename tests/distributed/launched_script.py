# SPDX-License-Identifier: Apache-2.0
"""A training script that knows nothing of deepspeed_ds4sci: what `deepspeed` launches in test_engine_launcher.py."""

import argparse
import json

import deepspeed
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--result")
parser = deepspeed.add_config_arguments(parser)
arguments = parser.parse_args()

torch.manual_seed(0)
model = GPTNeoXForCausalLM(
    GPTNeoXConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
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
