# SPDX-License-Identifier: Apache-2.0
"""A GenSLM-style decoder that runs unchanged on one rank or on the ranks of a sequence-parallel group.

What differs between the two is plugged in from outside:

    model.attention             any `SequenceParallelAttention`; all layers use it
    model.position_embedding    nn.Embedding or `ShardedPositionEmbedding`, if positions are learned
    model.loss_reduction        (loss sum, number of labelled tokens) of this rank -> loss
    model.mlp_tile, loss_tile   tokens at a time in the MLP and in the loss; None: all

Axes: B batch, L tokens held by this rank (all S without sequence parallelism), V vocabulary.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from deepspeed_ds4sci.models.configs import GenSLMConfig
from deepspeed_ds4sci.sequence.alibi import alibi_slopes
from deepspeed_ds4sci.sequence.attention import SequenceParallelAttention
from deepspeed_ds4sci.sequence.blocks import accumulation_dtype
from deepspeed_ds4sci.sequence.rotary import RotaryEmbedding, apply_rotary
from deepspeed_ds4sci.sequence.scores import MaskRule
from deepspeed_ds4sci.sequence.tiling import cross_entropy_sum, tiled, tiled_cross_entropy

IGNORE_INDEX = -100


class GenSLMOutput(dict):
    """What the model returns: a dict, as DeepSpeed's hooks expect, whose entries are attributes too.

    loss: 0-d, or None without labels. loss_sum: 0-d fp32, num_tokens: 0-d int64: what the loss was formed from.
    logits: [B, L, V], or None where the loss was tiled. hidden_states: [B, L, hidden], after the last norm.
    """

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class LayerContext:
    """What every layer of one forward pass shares."""

    attention: Callable
    attention_arguments: dict
    rotary: tuple[torch.Tensor, torch.Tensor] | None  # cos, sin [B|1, L, R / 2]
    mlp_tile: int | None


class GenSLM(nn.Module):
    """See the module's docstring; sizes in `GenSLMConfig`.

    Args:
        config: a `GenSLMConfig`, or the name of a published one.

    Under `torch.device("meta")` nothing is allocated or drawn; `initialize_weights` draws later.
    """

    def __init__(self, config: GenSLMConfig | str):
        super().__init__()
        config = GenSLMConfig.named(config) if isinstance(config, str) else config
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embedding == "learned"
        self.position_embedding = nn.Embedding(config.max_positions, config.hidden_size) if learned else None
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        rotary = config.position_embedding == "rotary"
        self.rotary = RotaryEmbedding(config.rotary_dim, config.rotary_base, config.rotary_scaling) if rotary else None
        self.layers = nn.ModuleList(GenSLMLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie_weights()
        self.attention: Callable = SequenceParallelAttention()
        self.loss_reduction: Callable = mean_loss
        self.mlp_tile: int | None = None
        self.loss_tile: int | None = None
        if self.head.weight.device.type != "meta":
            self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Normal weights, zero biases; the projections back into the residual stream are smaller by sqrt(2 layers).

        Weights that ZeRO-3 has partitioned (`deepspeed.zero.Init`) are gathered one module at a time and drawn on the
        first rank, so that no rank ever holds the model.

        Source: Radford et al. 2019 (GPT-2).
        """
        self._tie_weights()  # `to_empty` gives the two a tensor each
        residual_std = self.config.init_std / (2 * self.config.num_layers) ** 0.5
        residual = {projection for layer in self.layers for projection in (layer.attention_output, layer.mlp[2])}
        for module in self.modules():
            with _whole_weights(module):
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(module.weight, std=residual_std if module in residual else self.config.init_std)
                    if getattr(module, "bias", None) is not None:
                        nn.init.zeros_(module.bias)
                elif isinstance(module, nn.LayerNorm):
                    nn.init.ones_(module.weight)
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        shift_labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | MaskRule | None = None,
    ) -> GenSLMOutput:
        """One pass; with labels also the loss.

        Args:
            input_ids: [B, L] int64.
            labels: [B, L] aligned with input_ids; shifted here (a decoder's). -100 is not counted. One rank only.
            shift_labels: [B, L] labels shifted before the sequence was split; in place of `labels`.
            position_ids: [B|1, L]; default: the tokens' global positions.
            document_ids: [B, L], or [B, S] of the whole sequence; see `SequenceParallelAttention`. A negative id is
                padding. Positions are not restarted for it.
            attention_mask: [B, L] with 0 for padding, or a custom mask as `SequenceParallelAttention` takes it.

        Raises:
            ValueError: `labels` under sequence parallelism, both kinds of labels, or more tokens than the learned
                table has rows.
        """
        local_len = input_ids.shape[1]
        document_ids, mask = self._masks(input_ids, document_ids, attention_mask)
        if position_ids is None:
            position_ids = self._positions(local_len, input_ids.device)
        shifted = self._shifted(labels, shift_labels, document_ids)
        hidden = self.token_embedding(input_ids)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(position_ids)
        hidden = self.embedding_dropout(hidden)
        config = self.config
        slopes = alibi_slopes(config.num_heads, hidden.device) if config.position_embedding == "alibi" else None
        context = LayerContext(
            self.attention,
            dict(
                causal=config.causal,
                mask=mask,
                alibi_slopes=slopes,
                window=config.window,
                document_ids=document_ids,
                dropout_p=config.attention_dropout if self.training else 0.0,
            ),
            None if self.rotary is None else self.rotary(position_ids, accumulation_dtype(hidden)),
            self.mlp_tile,
        )
        for layer in self.layers:
            hidden = layer(hidden, context)
        hidden = self.final_norm(hidden)
        return self._output(hidden, shifted)

    def _tie_weights(self):
        if self.config.tie_embeddings:
            self.head.weight = self.token_embedding.weight

    def _output(self, hidden, shifted):
        output = GenSLMOutput(loss=None, logits=None, hidden_states=hidden)
        if shifted is None or self.loss_tile is None:
            output["logits"] = self.head(hidden)
        if shifted is None:
            return output
        if self.loss_tile is None:
            loss_sum, num_tokens = cross_entropy_sum(output["logits"], shifted, IGNORE_INDEX)
        else:
            loss_sum, num_tokens = tiled_cross_entropy(hidden, self.head, shifted, self.loss_tile, IGNORE_INDEX)
        output.update(loss=self.loss_reduction(loss_sum, num_tokens), loss_sum=loss_sum, num_tokens=num_tokens)
        return output

    def _positions(self, local_len, device):
        """[1, L] global positions of this rank's tokens."""
        seq_len = local_len * self.attention.size
        if self.config.position_embedding == "learned" and seq_len > self.config.max_positions:
            raise ValueError(
                f"input_ids must have at most {self.config.max_positions} tokens, the rows of the learned position "
                f"table, got {seq_len}"
            )
        return self.attention.positions(local_len, device)[None]

    def _masks(self, input_ids, document_ids, attention_mask):
        """(document ids with padding as -1 or None, custom mask or None)."""
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
            return document_ids, attention_mask
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must be [B, L] = {list(input_ids.shape)} or a custom mask, got "
                f"{list(attention_mask.shape)}"
            )
        if document_ids is None:
            document_ids = torch.zeros_like(input_ids)
        if document_ids.shape != input_ids.shape:
            raise ValueError(
                f"document_ids must be [B, L] = {list(input_ids.shape)} beside a padding mask, got "
                f"{list(document_ids.shape)}"
            )
        return document_ids.masked_fill(attention_mask == 0, -1), None

    def _shifted(self, labels, shifted, document_ids):
        if labels is None:
            return shifted
        if shifted is not None:
            raise ValueError("labels and shift_labels were both given; pass one of them")
        if self.attention.size > 1 and self.config.causal:
            raise ValueError("labels must be shifted before the sequence is split over ranks: pass shift_labels")
        return shift_labels(labels, document_ids) if self.config.causal else labels


class GenSLMLayer(nn.Module):
    """Attention and MLP, each behind a norm, beside the residual stream."""

    def __init__(self, config: GenSLMConfig):
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.heads = (config.num_heads, config.key_value_heads, config.key_value_heads)
        self.parallel_residual = config.parallel_residual
        self.attention_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.query_key_value = nn.Linear(hidden, sum(self.heads) * head_dim)
        self.attention_output = nn.Linear(config.num_heads * head_dim, hidden)
        self.mlp_norm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        activation = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.mlp = nn.Sequential(
            nn.Linear(hidden, config.intermediate_size), activation, nn.Linear(config.intermediate_size, hidden)
        )
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden: torch.Tensor, context: LayerContext) -> torch.Tensor:
        """[B, L, hidden] -> [B, L, hidden]."""
        attended = self.dropout(self._attention(self.attention_norm(hidden), context))
        if self.parallel_residual:
            return hidden + attended + self._mlp(hidden, context)
        hidden = hidden + attended
        return hidden + self._mlp(hidden, context)

    def _attention(self, x, context):
        projected = self.query_key_value(x).unflatten(-1, (sum(self.heads), -1))
        q, k, v = projected.split(self.heads, 2)  # [B, L, heads, D]
        if context.rotary is not None:
            q, k = (apply_rotary(tensor, *context.rotary) for tensor in (q, k))
        return self.attention_output(context.attention(q, k, v, **context.attention_arguments).flatten(2))

    def _mlp(self, hidden, context):
        def block(x):
            return self.dropout(self.mlp(self.mlp_norm(x)))

        return block(hidden) if context.mlp_tile is None else tiled(block, hidden, context.mlp_tile)


def _whole_weights(module):
    """A context in which a module's own weights are whole; what the first rank makes of them is kept."""
    partitioned = [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0)


def mean_loss(loss_sum: torch.Tensor, num_tokens: torch.Tensor) -> torch.Tensor:
    """The mean over labelled tokens; 0 without any."""
    return loss_sum / num_tokens.clamp(min=1)


def shift_labels(labels: torch.Tensor, document_ids: torch.Tensor | None = None) -> torch.Tensor:
    """[B, S] labels moved one token to the left, to be done before the sequence is split over ranks.

    The last token predicts nothing, nor does the last token of a document or padding.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if document_ids is None:
        return shifted
    following = F.pad(document_ids[:, 1:], (0, 1), value=-1)
    return shifted.masked_fill((document_ids != following) | (document_ids < 0), IGNORE_INDEX)
