# SPDX-License-Identifier: Apache-2.0
"""The `ds4sci` block of a DeepSpeed config: one typed model per feature, every field with its unit and default."""

from typing import Any, Literal

from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ConfigDict, Field, model_validator

from deepspeed_ds4sci.sequence.layout import split_mode


class _Block(DeepSpeedConfigModel):
    """Base of the blocks: unknown keys are refused, and so is "auto", which DeepSpeed's base class would drop."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    def __init__(self, **data):
        super().__init__(strict=True, **data)

    def enabled(self) -> bool:
        """Whether the block asks for anything."""
        raise NotImplementedError


class UlyssesRingGrid(_Block):
    """A grid of all-to-all and ring ranks that share one sequence."""

    ulysses: int = Field(ge=1)
    """GPUs that exchange heads for tokens; the number of heads limits it."""

    ring: int = Field(ge=1)
    """GPUs around which key and value blocks travel."""


class SequenceParallelConfig(_Block):
    """Split each sequence over several GPUs."""

    size: int = Field(1, ge=1)
    """GPUs that share one sequence. 1 turns the feature off. Must divide the number of GPUs."""

    mode: Literal["ulysses", "ring", "megatron"] | UlyssesRingGrid = "ulysses"
    """How attention crosses GPUs. `ulysses`: all-to-all over heads. `ring`: key and value blocks travel around the
    GPUs. `{"ulysses": a, "ring": b}`: both, a * b = size. `megatron` is refused."""

    padding: Literal["pad", "refuse"] = "pad"
    """What happens to a batch whose length is no multiple of the GPUs. `pad`: filled up on the right with tokens that
    are masked in attention and do not count in the loss. `refuse`: an error."""

    loss_average: Literal["micro_batch", "step"] = "micro_batch"
    """Tokens over which the loss is averaged. `micro_batch`: the valid tokens of one micro-batch on all GPUs; the
    micro-batches of a step count equally, as in DeepSpeed. `step`: all valid tokens of the step count equally."""

    def enabled(self) -> bool:
        return self.size > 1

    def layout_mode(self) -> str | dict[str, int]:
        """The mode as `sequence.layout.Layout` takes it."""
        return self.mode if isinstance(self.mode, str) else {"ulysses": self.mode.ulysses, "ring": self.mode.ring}

    @model_validator(mode="after")
    def _settings_have_an_effect(self):
        if self.model_fields_set and "size" not in self.model_fields_set:
            raise ValueError(
                f"size is missing, without which {', '.join(sorted(self.model_fields_set))} has no effect"
            )
        return self

    @model_validator(mode="after")
    def _grid_fits(self):
        if self.mode != "megatron":
            split_mode(self.size, self.layout_mode())
        return self


class PositionScalingConfig(_Block):
    """Rotary positions beyond the length trained on."""

    kind: Literal["none", "linear", "ntk", "yarn"] = "none"
    """The scaling of rotary angles. `linear`: all of them divided by the factor. `ntk`: a larger base, so that the
    fastest stay. `yarn`: slow angles divided, fast ones kept, a ramp between, and sharper attention."""

    factor: float = Field(1.0, ge=1.0)
    """Context length divided by the length the model was trained on."""

    original_length: int = Field(0, ge=0)
    """With `yarn`: tokens that the model was trained on. 0: the positions of the model's configuration."""

    def enabled(self) -> bool:
        return self.kind != "none"

    @model_validator(mode="after")
    def _settings_have_an_effect(self):
        if self.kind == "none" and (self.factor != 1.0 or self.original_length):
            raise ValueError('factor and original_length have no effect with kind "none"')
        if self.kind != "none" and self.factor == 1.0:
            raise ValueError(f'a factor of 1 has no effect with kind "{self.kind}"')
        if self.original_length and self.kind != "yarn":
            raise ValueError(f'original_length has an effect with kind "yarn" only, got {self.kind!r}')
        return self


class PositionEmbeddingConfig(_Block):
    """What tells the model where a token is."""

    kind: Literal["model", "learned", "rotary", "alibi"] = "model"
    """`model`: what the model was built with. `learned`: its learned table. `rotary`, `alibi`: in place of what it was
    built with; a learned table is then no part of the model."""

    sharded: bool = False
    """With `learned`: each GPU of a sequence group holds its part of the table, its gradient and optimizer state."""

    scaling: PositionScalingConfig = PositionScalingConfig()
    """Of a rotary model, or with `rotary`."""

    def enabled(self) -> bool:
        return self.kind != "model" or self.sharded or self.scaling.enabled()

    @model_validator(mode="after")
    def _only_a_table_is_sharded(self):
        if self.sharded and self.kind != "learned":
            raise ValueError(f'sharded needs kind "learned", got {self.kind!r}')
        if self.scaling.enabled() and self.kind not in ("model", "rotary"):
            raise ValueError(f"scaling needs rotary positions, got {self.kind!r}")
        return self


class AttentionConfig(_Block):
    """Which kernel computes attention."""

    implementation: Literal[
        "fastest", "flash", "cudnn", "efficient", "flex", "math", "tiled", "flash_attn", "flash_attn_4"
    ] = "fastest"
    """`flash` (FlashAttention-2), `cudnn`, `efficient` and `math` are PyTorch's scaled-dot-product kernels, `flex` its
    compiled one, `flash_attn` the package of that name, `flash_attn_4` the package flash-attn-4 (extra of that name,
    with CUDA 13 flash-attn-4-cu13; Hopper and Blackwell, 16 bits), `tiled` our own in plain PyTorch. `fastest`: what
    PyTorch picks among its own for plain and causal attention, `tiled` for everything else; on Hopper it picks a
    kernel made for it, and `flash` is far slower there. `flash_attn_4` is faster still, but a beta that compiles for
    seconds at first use: only by name. Its gradients are bit-identical from run to run only under
    `torch.use_deterministic_algorithms(True)`. `flash` and `cudnn` take no masks, windows or ALiBi, `flash_attn` no
    masks, `flash_attn_4` no masks or ALiBi."""

    sliding_window: int = Field(0, ge=0)
    """Tokens that each token attends to, itself included. 0: no window."""

    def enabled(self) -> bool:
        return self.implementation != "fastest" or self.sliding_window > 0


class AttentionMaskConfig(_Block):
    """Explicit attention masks, built where they fit."""

    kind: Literal["none", "causal", "document", "custom"] = "none"
    """Which mask to build for each batch. `none`: the attention implementation masks by itself. `causal`: no key after
    the query. `document`: each token sees its own document, which the batch tells by position_ids that start again
    (GenSLM: document_ids). `custom`: the `rule`, or the attention_mask of the batch, [B|1, H|1, S, S] (it may be in
    CPU memory) or a function like the rule. All but a [.., S, S] mask for a model of transformers, which says
    everything, hold together with padding, and with causality where the model has it."""

    cpu_threshold: int = Field(16384, ge=1)
    """Sequence length in tokens above which the mask is built in CPU memory and moved once. `python -m
    deepspeed_ds4sci.sequence.mask_threshold FILE` measures the best one of a GPU and writes it into a config."""

    rule: str = ""
    """With `custom`: "module:function" of a function (batch, head, query, key) -> bool, True = keep, of index tensors
    that broadcast against each other, on the device where the mask is built. Empty: the batch has the mask."""

    def enabled(self) -> bool:
        return self.kind != "none"

    @model_validator(mode="after")
    def _a_rule_is_custom(self):
        if self.rule and self.kind != "custom":
            raise ValueError(f'rule needs kind "custom", got {self.kind!r}')
        if self.rule and not all(self.rule.partition(":")):
            raise ValueError(f'rule must be "module:function", got {self.rule!r}')
        return self


class ActivationCheckpointingConfig(_Block):
    """Recompute activations in the backward pass in place of keeping them."""

    kind: Literal["none", "full", "selective", "keep_attention"] = "none"
    """`full`: whole layers. `selective`: attention only. `keep_attention`: whole layers but for attention itself,
    whose output stays, as large as what the layer starts from; saves most of the recomputation at length."""

    every_n_layers: int = Field(1, ge=1)
    """Checkpoint the first of every n layers."""

    cpu_offload: bool = False
    """Keep what the checkpointed layers start from in CPU memory, page-locked where there is a GPU: in bytes, per
    rank, 2 (bf16) x tokens of the rank x hidden size x checkpointed layers."""

    cpu_offload_attention: bool = False
    """With `keep_attention`: keep what attention returned in CPU memory: in bytes, per rank, 2 (bf16) x tokens of the
    rank x heads x head dim, as the implementation pads it, x checkpointed layers. Mostly what `cpu_offload` takes."""

    def enabled(self) -> bool:
        return self.kind != "none"

    @model_validator(mode="after")
    def _settings_have_an_effect(self):
        if self.kind == "none" and (self.every_n_layers != 1 or self.cpu_offload):
            raise ValueError('every_n_layers and cpu_offload have no effect with kind "none"')
        if self.cpu_offload_attention and self.kind != "keep_attention":
            raise ValueError(f'cpu_offload_attention needs kind "keep_attention", got {self.kind!r}')
        return self


class TilingConfig(_Block):
    """Compute a layer in pieces of the sequence, which bounds its temporary memory."""

    mlp: int = Field(0, ge=0)
    """Tokens of each sequence per piece in the feed-forward layers. 0: off."""

    loss: int = Field(0, ge=0)
    """Tokens per piece in the output layer and the cross entropy, of language models. A batch with labels then gives
    its loss and no logits. 0: off."""

    def enabled(self) -> bool:
        return self.mlp > 0 or self.loss > 0


class DS4SciConfig(_Block):
    """The `ds4sci` block of a DeepSpeed config."""

    sequence_parallel: SequenceParallelConfig = SequenceParallelConfig()
    position_embedding: PositionEmbeddingConfig = PositionEmbeddingConfig()
    attention: AttentionConfig = AttentionConfig()
    attention_mask: AttentionMaskConfig = AttentionMaskConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    tiling: TilingConfig = TilingConfig()

    def enabled(self) -> bool:
        return any(block.enabled() for block in self.blocks().values())

    def blocks(self) -> dict[str, Any]:
        """The feature blocks by name, in the order of the hooks."""
        return {name: getattr(self, name) for name in type(self).model_fields}
