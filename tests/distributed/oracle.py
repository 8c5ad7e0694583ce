# SPDX-License-Identifier: Apache-2.0
"""What one rank computes for the features of a case: plain models, with masks spelled out element by element."""

import copy
import importlib

import torch

from tests.helpers.naive_masks import naive_mask


def reference_model(case, model):
    """A model that does by itself what the case's features ask of `model`; same weights."""
    return copy.deepcopy(model)


def run(case, model, batch):
    """The reference model's output for a batch."""
    batch = reference_batch(case, batch)
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
    if not mask_block and window is None:
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
    return {**batch, "attention_mask": mask}


def _window(case):
    return case.features.get("attention", {}).get("sliding_window")


def _documents(case, batch):
    if case.model.startswith("genslm"):
        return batch.get("document_ids")
    if "position_ids" not in batch or batch.get("use_cache"):
        return None
    return torch.nn.functional.pad(batch["position_ids"].diff(dim=1) != 1, (1, 0)).cumsum(1)
