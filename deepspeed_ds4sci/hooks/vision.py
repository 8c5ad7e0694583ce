# SPDX-License-Identifier: Apache-2.0
"""Vision transformers: the sequence is made of an image, inside the model, and ends in one vector.

Every rank of a sequence group embeds the whole image and keeps its tokens; after the last norm the tokens of all ranks
are put together, and what follows is the same on all of them. What they compute alike counts once, as DeepSpeed takes
the mean over ranks.
"""

import functools

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from deepspeed_ds4sci.hooks.family import Family, trains
from deepspeed_ds4sci.hooks.removal import replace_attribute


class ViTFamily(Family):
    """transformers' ViT. The tokens of an image are its patches and one class token."""

    def embeddings(self, model):
        """The module that returns the tokens of an image."""
        return model.base_model.embeddings

    def last_norm(self, model):
        """The module behind the last layer."""
        return model.base_model.layernorm

    def attach(self, model, state):
        if getattr(model.base_model, "pooler", None) is not None and state.groups is not None:
            raise NotImplementedError(
                "ViTModel with a pooling layer cannot be split: what follows its last norm must be the loss or the "
                "output; build it with add_pooling_layer=False"
            )
        super().attach(model, state)
        self._keep_own_tokens(model, state)

    def _keep_own_tokens(self, model, state):
        hook = functools.partial(_own_tokens, state)
        state.handles.append(self.embeddings(model).register_forward_hook(hook))

    def prepare(self, model, state):
        super().prepare(model, state)
        hook = functools.partial(_all_tokens, state)
        state.handles.append(self.last_norm(model).register_forward_hook(hook))

    def shard(self, model, state, arguments):
        return arguments

    def read(self, model, state, arguments):
        return arguments

    def head(self, model):
        """What makes logits takes one vector per image, not tokens."""
        return None

    def finish(self, model, state, output):
        if isinstance(output, torch.Tensor):
            return output
        samples = next(value for value in output.values() if isinstance(value, torch.Tensor) and value.dim()).shape[0]
        loss = output.get("loss")
        if loss is not None:
            output["loss"] = state.mean_loss(loss * samples, torch.tensor(samples, device=loss.device), trains(model))
        for name, value in list(output.items()):
            if isinstance(value, tuple):
                output[name] = tuple(_whole(state, each) for each in value)
        return output


def _own_tokens(state, module, inputs, embedded):
    local, state.batch = state.sharder.shard({"inputs_embeds": embedded})
    return local["inputs_embeds"]


def _all_tokens(state, module, inputs, normed):
    return state.gather(normed)


def _whole(state, hidden):
    """Hidden states of all tokens. Those before the last norm are this rank's part; None is a layer not asked for."""
    if hidden is None or hidden.shape[1] != state.batch.layout.local_len:
        return hidden
    return state.gather(hidden)


class TimmViTFamily(ViTFamily):
    """timm's VisionTransformer, whose attention asks torch's scaled_dot_product_attention; it forms no loss."""

    def embeddings(self, model):
        return model.norm_pre

    def last_norm(self, model):
        return model.norm

    def attach(self, model, state):
        if not type(model).__module__.startswith("timm."):
            raise NotImplementedError(f"VisionTransformer of {type(model).__module__} is not timm's")
        modules = self.attention_modules(model)
        if not all(module.fused_attn for module in modules):
            raise NotImplementedError(
                "timm's attention without torch's fused attention cannot be replaced: unset TIMM_FUSED_ATTN=0, or "
                "call timm.layers.set_fused_attn(True) before the model is built"
            )
        for module in modules:
            attending = functools.partial(_attending, state, module.forward)
            state.handles.append(replace_attribute(module, "forward", attending))
        self._keep_own_tokens(model, state)

    def prepare(self, model, state):
        at_random = sorted({type(module).__name__ for module in model.modules()} & {"DropPath", "PatchDropout"})
        if at_random:
            raise NotImplementedError(
                f"{' and '.join(at_random)} would leave out something else on each of the GPUs that share an image; "
                "build the model with drop_path_rate=0 and patch_drop_rate=0"
            )
        super().prepare(model, state)


def _attending(state, forward, *args, **kwargs):
    with _Attending(state):
        return forward(*args, **kwargs)


class _Attending(TorchFunctionMode):
    """While it is on, `state` computes what torch's scaled_dot_product_attention is asked for."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def __torch_function__(self, function, types, args=(), kwargs=None):
        run = self._attend if function is F.scaled_dot_product_attention else function
        return run(*args, **(kwargs or {}))

    def _attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        """q, k, v: [B, H, L, D] -> [B, H, L, D]."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError("attn_mask and is_causal of timm's models do not go with the ds4sci block")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return self.state.attend(q, k, v, dropout_p=dropout_p, scale=None).transpose(1, 2)
