# SPDX-License-Identifier: Apache-2.0
"""What cannot work, refused at start with the reason: settings of the block that this version does not have, and
settings of DeepSpeed's own that do not go with sequence parallelism."""

import json

import torch

from deepspeed_ds4sci.config.schema import DS4SciConfig
from deepspeed_ds4sci.sequence.local_attention import unkept_reason, unsupported_reason
from deepspeed_ds4sci.sequence.scores import ScoreRules, window_limits


def check_combinations(config: DS4SciConfig, ds_config: dict) -> None:
    """Refuses what this version cannot do.

    Args:
        config: the typed block.
        ds_config: the whole DeepSpeed config that the block was in.

    Raises:
        NotImplementedError: a setting of the block that is not there yet; the message names the key.
        ValueError: settings that contradict each other.
    """
    for key, wanted, reason in _not_there_yet(config):
        if wanted:
            raise NotImplementedError(f"ds4sci.{key} is not supported: {reason}")
    _check_attention(config)
    if config.activation_checkpointing.kind == "keep_attention":
        reason = unkept_reason(config.attention.implementation)
        if reason is not None:
            raise NotImplementedError(
                f'ds4sci.activation_checkpointing.kind = "keep_attention" does not go with '
                f'ds4sci.attention.implementation = "{config.attention.implementation}": {reason}, so there is no '
                'output to keep; choose another implementation, or kind "full"'
            )
    if config.position_embedding.sharded and not config.sequence_parallel.enabled():
        raise ValueError(
            "ds4sci.position_embedding.sharded needs ds4sci.sequence_parallel.size of at least 2: with one GPU per "
            "sequence there is nobody to share the table with"
        )
    if config.sequence_parallel.enabled():
        _check_sequence_parallel(config, ds_config)


def _not_there_yet(config):
    """(dotted key, whether it is asked for, reason) of everything the schema knows and this version lacks."""
    parallel, position = config.sequence_parallel, config.position_embedding
    return (
        (
            "sequence_parallel.mode = megatron",
            parallel.mode == "megatron",
            "splitting activations between tensor-parallel blocks needs tensor parallelism, which does not go with "
            'this block; use "ulysses" or "ring"',
        ),
        (
            "position_embedding.kind = learned without sharded",
            position.kind == "learned" and not position.sharded,
            'it changes nothing; leave the kind at "model"',
        ),
        (
            "sequence_parallel.loss_average = step",
            parallel.loss_average == "step",
            "the micro-batches of a step count equally, as in DeepSpeed",
        ),
    )


def _check_attention(config):
    """Refuses a named implementation that cannot do what the block asks of it, whatever the model is."""
    attention, masked = config.attention, config.attention_mask.enabled()
    if attention.implementation in ("fastest", "flash_attn"):  # the package's version is known where it is installed
        return
    left, right = window_limits(True, None if masked else attention.sliding_window or None)
    rules = ScoreRules(
        1.0,
        left,
        None if masked else right,
        slopes=torch.ones(1) if config.position_embedding.kind == "alibi" else None,
        mask=torch.ones(1, 1, 1, 1, dtype=torch.bool) if masked else None,
    )
    reason = unsupported_reason(attention.implementation, rules)
    if reason is not None:
        raise NotImplementedError(f"ds4sci.attention.implementation: {reason}")


def _check_sequence_parallel(config, ds_config):
    size = config.sequence_parallel.size
    for key in ("sequence_parallel_size", "data_parallel_size"):
        if key in ds_config:
            raise ValueError(
                f"{key} and ds4sci.sequence_parallel.size both split sequences; leave DeepSpeed's key out: alone it "
                "does not reduce gradients over the GPUs that share a sequence"
            )
    for key, wanted, reason in _against_sequence_parallel(config, ds_config):
        if wanted:
            raise NotImplementedError(f"{key} does not go with ds4sci.sequence_parallel.size = {size}: {reason}")


def _section(ds_config, *path):
    """The object at a path of keys; an empty one where there is none."""
    section, seen = ds_config, []
    for key in path:
        section = section.get(key, {})
        seen.append(key)
        if not isinstance(section, dict):
            raise ValueError(f"{'.'.join(seen)} must be a JSON object, got {json.dumps(section)}")
    return section


def _against_sequence_parallel(config, ds_config):
    zero = _section(ds_config, "zero_optimization")
    routing = _section(ds_config, "data_efficiency", "data_routing", "random_ltd")
    one_meaning = "the gradient scale is chosen for DeepSpeed's mean over all ranks"
    rows = (
        (
            "tensor_parallel.autotp_size",
            _section(ds_config, "tensor_parallel").get("autotp_size", 0) > 1,
            "the ranks of a sequence group hold the same weights",
        ),
        ("gradient_allreduce_op = sum", ds_config.get("gradient_allreduce_op") == "sum", one_meaning),
        (
            "zero_optimization.zero_hpz_partition_size",
            zero.get("zero_hpz_partition_size", 1) > 1,
            "its second partition group is built without regard to sequence groups",
        ),
        (
            "zero_optimization.zero_quantized_gradients",
            bool(zero.get("zero_quantized_gradients", False)),
            "its gradient reduction has no test here",
        ),
        (
            "hybrid_engine",
            _section(ds_config, "hybrid_engine").get("enabled", False),
            "generation is not sharded",
        ),
        (
            "elasticity",
            _section(ds_config, "elasticity").get("enabled", False),
            "it computes batch sizes from all GPUs",
        ),
        (
            "compile.deepcompile",
            _section(ds_config, "compile").get("deepcompile", False),
            "it bypasses hooks",
        ),
        (
            "data_efficiency.data_routing.random_ltd",
            routing.get("enabled", False),
            "dropping tokens changes who holds which position",
        ),
        ("expert_parallel", _section(ds_config, "expert_parallel").get("enabled", False), "its groups overlap ours"),
        ("sparse_gradients", ds_config.get("sparse_gradients", False), "sparse reduction has no test here"),
        ("gradient_predivide_factor", ds_config.get("gradient_predivide_factor", 1.0) != 1.0, one_meaning),
        (
            "managed_gradient_accumulation = false",
            ds_config.get("managed_gradient_accumulation", True) is False,
            "the hooks follow DeepSpeed's own accumulation boundary",
        ),
    )
    if config.position_embedding.sharded:
        rows += (
            (
                "fp16",
                _section(ds_config, "fp16").get("enabled", False) in (True, "auto"),
                "the sharded position table has no loss scaling; use bf16",
            ),
            (
                "zero_optimization.compute_grad_norm = false",
                zero.get("compute_grad_norm", True) is False,
                "the table is part of the norm",
            ),
        )
    return rows
