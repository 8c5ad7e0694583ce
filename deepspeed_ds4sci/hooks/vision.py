# SPDX-License-Identifier: Apache-2.0
"""Vision transformers: the sequence is made of an image, inside the model, and ends in one vector.

Every rank of a sequence group embeds the whole image and keeps its tokens; after the last norm the tokens of all ranks
are put together, and what follows is the same on all of them. What they compute twice counts once: the gradient of
the output is a rank's share of it.
"""

import torch

from deepspeed_ds4sci.hooks.family import Family
from deepspeed_ds4sci.sequence.loss import gather_sequence, scale_gradient


class ViTFamily(Family):
    """transformers' ViT. The tokens of an image are its patches and one class token."""

    def attach(self, model, state):
        if getattr(model.base_model, "pooler", None) is not None and state.groups is not None:
            raise NotImplementedError(
                "ViTModel with a pooling layer cannot be split: what follows its last norm must be the loss or the "
                "output; build it with add_pooling_layer=False"
            )
        super().attach(model, state)

        def keep_own_tokens(module, inputs, embedded):
            local, state.batch = state.sharder.shard({"inputs_embeds": embedded})
            return local["inputs_embeds"]

        state.handles.append(model.base_model.embeddings.register_forward_hook(keep_own_tokens))

    def prepare(self, model, state):
        super().prepare(model, state)

        def put_together(module, inputs, normed):
            batch, groups = state.batch, state.groups
            return gather_sequence(normed, batch.layout, groups.sp_group, groups.sp_size)[:, : batch.seq_len]

        state.handles.append(model.base_model.layernorm.register_forward_hook(put_together))

    def shard(self, model, state, arguments):
        return arguments

    def read(self, model, state, arguments):
        return arguments

    def head(self, model):
        """What makes logits takes one vector per image, not tokens."""
        return None

    def finish(self, model, state, output):
        share = state.divisor / (state.groups.dp_size * state.groups.sp_size)
        samples = next(value for value in output.values() if isinstance(value, torch.Tensor) and value.dim()).shape[0]
        for name, value in list(output.items()):
            if name == "loss":
                count = torch.tensor(samples, device=value.device)
                output[name] = state.mean_loss(value * samples, count, model.training and torch.is_grad_enabled())
            elif isinstance(value, torch.Tensor):
                output[name] = scale_gradient(value, share)
        return output
