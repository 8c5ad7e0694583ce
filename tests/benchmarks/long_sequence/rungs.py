# SPDX-License-Identifier: Apache-2.0
"""The rungs: what is switched on, in the ds_config JSON alone, and where the search starts."""

from dataclasses import dataclass, field, replace
from typing import Any, get_args

from deepspeed_ds4sci.config import check_combinations, read_block
from deepspeed_ds4sci.config.schema import AttentionConfig
from deepspeed_ds4sci.sequence.local_attention import unavailable_reason

ATTENTION = get_args(AttentionConfig.model_fields["implementation"].annotation)
"""Names of `ds4sci.attention.implementation`."""

BASE = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "steps_per_print": 10**9,
    "bf16": {"enabled": True},
    # torch's fused AdamW on either device: DeepSpeed's own would be compiled at first use.
    "zero_force_ds_cpu_optimizer": False,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True, "fused": True}},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 50_000_000},
}
OFFLOADED = {
    "stage": 2,
    "reduce_bucket_size": 50_000_000,
    # Pageable: page-locked buffers of DeepSpeed's are rounded up to powers of two.
    "offload_optimizer": {"device": "cpu", "pin_memory": False},
}


@dataclass(frozen=True)
class Rung:
    """One set of options.

    ladder: "mask" (explicit mask), "flash" (none), or "alst" (DeepSpeed's own path). features: the ds4sci block.
    guess: tokens that the search tries first on an 80 GB GPU. zero: False trains without ZeRO. positions: of our
    decoder. device_mask: the script builds a [S, S] mask on the device, as Megatron's does. tricks: DeepSpeed's own
    path, see `worker.llama`.
    """

    name: str
    ladder: str
    says: str
    guess: int
    features: dict[str, Any] = field(default_factory=dict)
    offload_optimizer: bool = False
    zero: bool = True
    gpus: int = 1
    positions: str = "rotary"
    device_mask: bool = False
    tricks: tuple[str, ...] = ()

    def ds_config(self, tiny: bool = False) -> dict:
        """The whole DeepSpeed config. tiny: fp32 for a CPU, pieces of the size of a tiny run."""
        config = {**BASE}
        if self.offload_optimizer:
            config["zero_optimization"] = OFFLOADED
        elif not self.zero:
            config["zero_optimization"] = {"stage": 0}
        features = self.features
        if tiny:
            config.pop("bf16")
            features = _tiny(features)
        return config | ({"ds4sci": features} if features else {})


def _tiny(features):
    """The same options for a CPU and hundreds of tokens: kernels that it has, small pieces, a low threshold."""
    features = {name: dict(block) for name, block in features.items()}
    if "attention" in features and unavailable_reason(features["attention"]["implementation"], "cpu"):
        del features["attention"]
    if "tiling" in features:
        features["tiling"] = dict.fromkeys(features["tiling"], 32)
    if "attention_mask" in features:
        features["attention_mask"]["cpu_threshold"] = 100
    return features


def _ladder() -> list[Rung]:
    # What torch picks, as DeepSpeed's own path does: FlashAttention-2, or cuDNN's kernel where that is faster.
    fused = {"attention": {"implementation": "fastest"}}
    full = {"activation_checkpointing": {"kind": "full"}}
    tiles = {"tiling": {"mlp": 16384, "loss": 16384}}
    to_host = {"activation_checkpointing": {"kind": "full", "cpu_offload": True}}
    # Tiles of an MLP that is hardly wider than the model save little and are computed once more.
    kept = {"activation_checkpointing": {"kind": "keep_attention"}, "tiling": {"loss": 16384}}
    kept_to_host = {**kept, "activation_checkpointing": {"kind": "keep_attention", "cpu_offload": True}}
    all_to_host = {"kind": "keep_attention", "cpu_offload": True, "cpu_offload_attention": True}
    all_to_host = {**kept, "activation_checkpointing": all_to_host}
    two = {"sequence_parallel": {"size": 2, "mode": "ulysses"}}
    masked = {"attention_mask": {"kind": "causal", "cpu_threshold": 1}}
    learned = {"positions": "learned"}
    table = {"position_embedding": {"kind": "learned", "sharded": True}}
    mask = [
        Rung("mask-baseline", "mask", "mask built on the device", 12288, device_mask=True, **learned),
        Rung("mask-cpu", "mask", "+ mask built in CPU memory", 12288, masked, **learned),
        Rung("mask-cpu-sp2", "mask", "+ sequence parallel over 2 GPUs", 24576, masked | two, gpus=2, **learned),
        Rung("mask-cpu-sp2-table", "mask", "+ sharded table", 24576, masked | two | table, gpus=2, **learned),
    ]
    no_mask = [
        Rung("math", "flash", "plain attention", 4096, {"attention": {"implementation": "math"}}),
        Rung("flash", "flash", "+ fused attention", 12288, fused),
        Rung("recompute", "flash", "+ activation checkpointing", 98304, fused | full),
        Rung("tiling", "flash", "+ tiling", 106496, fused | full | tiles),
        Rung("host-checkpoints", "flash", "+ checkpoints in CPU memory", 163840, fused | to_host | tiles),
        Rung(
            "host-optimizer", "flash", "+ optimizer offload", 327680, fused | to_host | tiles, offload_optimizer=True
        ),
        Rung(
            "two-gpus",
            "flash",
            "+ 2 GPUs",
            655360,
            fused | to_host | tiles | two,
            offload_optimizer=True,
            gpus=2,
        ),
        Rung("keep-attention", "flash", "tiled loss, attention outputs kept", 65536, fused | kept),
        Rung(
            "keep-attention-offload",
            "flash",
            "attention outputs kept, optimizer offload",
            131072,
            fused | kept,
            offload_optimizer=True,
        ),
        Rung(
            "keep-attention-host",
            "flash",
            "attention outputs kept, checkpoints in CPU memory, optimizer offload",
            131072,
            fused | kept_to_host,
            offload_optimizer=True,
        ),
        Rung(
            "keep-attention-checkpoints",
            "flash",
            "attention outputs kept, checkpoints in CPU memory, optimizer on the GPU",
            131072,
            fused | kept_to_host,
        ),
        Rung(
            "attention-to-host",
            "flash",
            "attention outputs and checkpoints in CPU memory, optimizer on the GPU",
            196608,
            fused | all_to_host,
        ),
        Rung(
            "recompute-offload",
            "flash",
            "plain activation checkpointing, optimizer offload",
            131072,
            fused | full,
            offload_optimizer=True,
        ),
    ]
    alst = [
        Rung("alst-sdpa", "alst", "SDPA", 12288),
        Rung("alst-recompute", "alst", "+ checkpointing", 98304, tricks=("recompute",)),
        Rung("alst-tiled", "alst", "+ TiledMLP, TiledFusedLogitsLoss", 106496, tricks=("recompute", "tiled")),
        Rung(
            "alst-host-checkpoints",
            "alst",
            "+ checkpoints in CPU memory",
            163840,
            tricks=("recompute", "tiled", "host"),
        ),
        Rung(
            "alst-host-optimizer",
            "alst",
            "+ optimizer offload",
            262144,
            tricks=("recompute", "tiled", "host"),
            offload_optimizer=True,
        ),
        Rung(
            "alst-tiled-offload",
            "alst",
            "tiled, optimizer offload, checkpoints on the GPU",
            131072,
            tricks=("recompute", "tiled"),
            offload_optimizer=True,
        ),
        Rung(
            "alst-two-gpus",
            "alst",
            "+ UlyssesSPAttentionHF over 2 GPUs",
            524288,
            tricks=("recompute", "tiled", "host"),
            offload_optimizer=True,
            gpus=2,
        ),
    ]
    return [*mask, *no_mask, *alst]


RUNGS: dict[str, Rung] = {rung.name: rung for rung in _ladder()}

# What is worth most comes first: a run that is cut off has it.
BY_VALUE = (
    *(
        "host-optimizer",
        "attention-to-host",
        "keep-attention-checkpoints",
        "keep-attention-host",
        "keep-attention-offload",
        "recompute-offload",
    ),
    *("alst-host-optimizer", "alst-tiled-offload"),
    *("recompute", "flash", "mask-cpu", "mask-baseline", "tiling", "host-checkpoints", "math", "keep-attention"),
    *("alst-recompute", "alst-sdpa", "alst-tiled", "alst-host-checkpoints"),
    *("two-gpus", "alst-two-gpus", "mask-cpu-sp2", "mask-cpu-sp2-table"),
)


def chosen_rungs(names: str, gpus: int) -> list[Rung]:
    """Rungs by name or ladder, separated by commas, most valuable first; "all" is all that `gpus` GPUs allow.

    Raises:
        ValueError: an unknown name, or a named rung that needs more GPUs.
    """
    if names == "all":
        return [RUNGS[name] for name in BY_VALUE if RUNGS[name].gpus <= gpus]
    wanted = []
    for name in names.split(","):
        ladder = [rung for rung in RUNGS.values() if rung.ladder == name and rung.gpus <= gpus]
        if name not in RUNGS and not ladder:
            raise ValueError(f"rungs must be of all, mask, flash, alst, {', '.join(RUNGS)}; got {name!r}")
        wanted += [RUNGS[name]] if name in RUNGS else ladder
    short = [f"{rung.name} ({rung.gpus})" for rung in wanted if rung.gpus > gpus]
    if short:
        raise ValueError(f"rungs need more than the {gpus} GPU(s) that are there: {', '.join(short)}")
    return wanted


def with_attention(rung: Rung, implementation: str) -> Rung:
    """The rung with another implementation of attention, if it names one that is not "math".

    Raises:
        ValueError, NotImplementedError: the rung's other options do not go with it.
    """
    named = rung.features.get("attention", {}).get("implementation", "math")
    if named == "math":
        return rung
    features = rung.features | {"attention": {"implementation": implementation}}
    check_combinations(read_block({"ds4sci": features}), {"ds4sci": features})
    return replace(rung, features=features, says=f"{rung.says} ({implementation})")
