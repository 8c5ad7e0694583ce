# SPDX-License-Identifier: Apache-2.0
"""What one rank computes for the features of a case: plain models, with masks spelled out element by element."""

import copy
import importlib
from dataclasses import replace

import torch

from tests.helpers.naive_masks import naive_mask


def reference_model(case, model):
    """A model that does by itself what the case's features ask of `model`; same weights."""
    block = case.features.get("position_embedding", {})
    kind, scaling = block.get("kind", "model"), block.get("scaling")
    if kind in ("model", "learned") and scaling is None:
        return copy.deepcopy(model)
    if case.model.startswith("genslm"):
        return _genslm(model, kind, scaling)
    if case.model == "gpt2":
        reference = copy.deepcopy(model)
        reference.transformer.wpe.weight.requires_grad_(False).zero_()
        reference.config._attn_implementation = _rotated() if kind == "rotary" else "sdpa"
        return reference
    if kind == "alibi":
        reference = copy.deepcopy(model)
        setattr(reference.base_model, "rotary_embeddings" if case.model == "esm" else "rotary_emb", _Still())
        return reference
    return _scaled(model, scaling)


class _Still(torch.nn.Module):
    """No rotation, for heads of four channels."""

    def forward(self, x, position_ids):
        return torch.ones(1, position_ids.shape[1], 4), torch.zeros(1, position_ids.shape[1], 4)


def _genslm(model, kind, scaling):
    from deepspeed_ds4sci.models import GenSLM
    from deepspeed_ds4sci.sequence.rotary import RotaryScaling

    own = model.config.position_embedding
    config = replace(
        model.config,
        position_embedding=own if kind == "model" else kind,
        rotary_scaling=scaling and RotaryScaling(**{"original_length": model.config.max_positions, **scaling}),
    )
    reference = GenSLM(config)
    reference.load_state_dict(model.state_dict(), strict=False)
    return reference


def _scaled(model, scaling):
    """By transformers' own scaling; NTK is a larger base."""
    config, factor = copy.deepcopy(model.config), scaling["factor"]
    if scaling["kind"] == "ntk":
        dim = 2 * next(value.numel() for name, value in model.named_buffers() if name.endswith(".inv_freq"))
        larger = 10000.0 * factor ** (dim / (dim - 2))
        if hasattr(config, "rope_theta"):
            config.rope_theta = larger
        else:
            config.rope_parameters["rope_theta"] = larger
    else:
        config.rope_parameters.update(rope_type=scaling["kind"], factor=factor)
        if scaling["kind"] == "yarn":
            config.rope_parameters["original_max_position_embeddings"] = scaling["original_length"]
    reference = type(model)(config)
    buffers = {name for name, _ in model.named_buffers()}
    weights = {name: value for name, value in model.state_dict().items() if name not in buffers}
    reference.load_state_dict(weights, strict=False)
    return reference.train()


def _rotated():
    """The name of transformers' attention behind a rotation of queries and keys as complex numbers, in fp64."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def turn(x):  # [B, H, S, D]: channel i is the real, channel i + D / 2 the imaginary part
        half = x.shape[-1] // 2
        frequencies = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(x.shape[2])[:, None] * frequencies
        turned = torch.complex(*x.double().split(half, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), -1).to(x.dtype)

    def attend(module, query, key, *others, **settings):
        return sdpa_attention_forward(module, turn(query), turn(key), *others, **settings)

    ALL_ATTENTION_FUNCTIONS.register("rotated_by_complex_numbers", attend)
    return "rotated_by_complex_numbers"


def run(case, model, batch, place):
    """The reference model's output for a batch, which `place` puts where the model is."""
    batch = place(reference_batch(case, batch))
    mask = batch.get("attention_mask")
    if case.model != "esm" or mask is None or mask.dim() == 2:
        return model(**batch)
    # Its embeddings take padding only, so its attention gets the mask past them.
    model.esm._create_attention_masks = lambda **_: (mask, None)
    del batch["attention_mask"]
    return model(**batch)


def reference_batch(case, batch):
    """The batch with the mask that the case's features ask for, where they ask for one."""
    mask_block, window = case.features.get("attention_mask", {}), _window(case)
    alibi = case.features.get("position_embedding", {}).get("kind") == "alibi" and not case.model.startswith("genslm")
    if not mask_block and window is None and not alibi:
        return batch
    given, rows = batch.get("attention_mask"), batch["input_ids"].shape[0]
    if given is not None and given.dim() == 4 and not case.model.startswith("genslm"):
        return batch  # says everything
    rule = None
    if mask_block.get("rule"):
        module, _, name = mask_block["rule"].partition(":")
        function = getattr(importlib.import_module(module), name)

        def rule(*numbers):
            return function(*(torch.tensor(number) for number in numbers))

    mask = naive_mask(
        batch["input_ids"].shape[1],
        causal=case.model not in ("esm", "genslm-encoder"),
        window=window,
        documents=_documents(case, batch),
        lengths=given.sum(1).tolist() if given is not None and given.dim() == 2 else None,
        rule=rule,
        batch=rows,
        heads=1 if rule is None else 4,
    )
    if given is not None and given.dim() == 4:
        mask = mask & given
    if alibi:
        positions = torch.arange(mask.shape[-1])
        slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])[:, None, None]  # of four heads
        bias = -slopes * (positions[:, None] - positions[None]).abs()
        mask = torch.where(mask, bias, float("-inf"))
    return {**batch, "attention_mask": mask}


def _window(case):
    return case.features.get("attention", {}).get("sliding_window")


def _documents(case, batch):
    if case.model.startswith("genslm"):
        return batch.get("document_ids")
    if "position_ids" not in batch or batch.get("use_cache"):
        return None
    return torch.nn.functional.pad(batch["position_ids"].diff(dim=1) != 1, (1, 0)).cumsum(1)
