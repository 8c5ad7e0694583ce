# SPDX-License-Identifier: Apache-2.0
"""The models of a run: our 2.5B decoder, a Llama of the same size, and tiny ones of the same make."""

import math
from dataclasses import asdict, replace

from deepspeed_ds4sci.models import GenSLMConfig
from tests.benchmarks.long_sequence.rungs import Rung

_TINY = dict(hidden_size=64, num_layers=4, num_heads=4, intermediate_size=128, max_positions=2048)
# Llama's third feed-forward matrix makes 2560 as large as 3840 in two.
_LLAMA = dict(hidden_size=3840, layers=28, heads=30, intermediate=2560)
_TINY_LLAMA = dict(hidden_size=64, layers=4, heads=4, intermediate=96)


def genslm(rung: Rung, longest: int, tiny: bool) -> GenSLMConfig:
    """Our decoder for sequences of up to `longest` tokens."""
    sizes = asdict(GenSLMConfig.named("gpt-neox-2.5B")) | (_TINY if tiny else {})
    # A learned table has a row per position; the other kinds know no end.
    return GenSLMConfig(**sizes | dict(position_embedding=rung.positions, max_positions=longest))


def llama_arguments(tiny: bool) -> dict:
    """For transformers' LlamaConfig."""
    sizes = _TINY_LLAMA if tiny else _LLAMA
    return dict(
        vocab_size=69,
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        intermediate_size=sizes["intermediate"],
        max_position_embeddings=2**24,
        bos_token_id=1,
        eos_token_id=2,
    )


def llama_as_decoder(tiny: bool) -> GenSLMConfig:
    """A decoder with as many multiplications per token as the Llama, for counting operations."""
    sizes = _TINY_LLAMA if tiny else _LLAMA
    return GenSLMConfig(
        sizes["hidden_size"], sizes["layers"], sizes["heads"], sizes["intermediate"] * 3 // 2, max_positions=2048
    )


def job_of(
    rung: Rung,
    cases: list[tuple[int, int]],
    *,
    tiny: bool,
    compute_layers: int | None,
    steps: int = 2,
    repeat_under: float = math.inf,
    beside_others: bool = False,
    device_gib: float | None = None,
    climb: dict | None = None,
) -> dict:
    """What `launch.run_cases` runs.

    Args:
        steps: per case, the last is timed. repeat_under: seconds; after a longer step none follows.
        beside_others: see `worker.HostMemory`. device_gib: see `worker.limit_device`.
        climb: fields of a `Climb`: after the cases its lengths are tried, at most `limit` tokens.

    Raises:
        ValueError: computing fewer layers for a rung that keeps more of a layer than what it starts from, which layers
            that are not computed have none of.
    """
    if compute_layers is not None:
        kind = rung.features.get("activation_checkpointing", {}).get("kind")
        if kind != "full" and "recompute" not in rung.tricks:
            raise ValueError(f'--compute-layers needs a rung that recomputes whole layers, got "{rung.name}"')
    longest = max([length for _, length in cases] + ([climb["limit"]] if climb else []))
    model = llama_arguments(tiny) if rung.ladder == "alst" else asdict(genslm(rung, longest, tiny))
    return {
        "kind": "alst" if rung.ladder == "alst" else "genslm",
        "model": model,
        "ds_config": rung.ds_config(tiny),
        "cases": [list(case) for case in cases],
        "climb": climb,
        "steps": steps,
        "repeat_under": repeat_under,
        "compute_layers": compute_layers,
        "beside_others": beside_others,
        "device_gib": device_gib,
        "device_mask": rung.device_mask,
        "tricks": list(rung.tricks),
    }


def counted_config(rung: Rung, tiny: bool, compute_layers: int | None) -> GenSLMConfig:
    """The configuration whose operations are counted: only computed layers."""
    config = llama_as_decoder(tiny) if rung.ladder == "alst" else genslm(rung, 2048, tiny)
    return config if compute_layers is None else replace(config, num_layers=compute_layers)
