# SPDX-License-Identifier: Apache-2.0
"""Evoformer modules on the fused attention op; parameter names are OpenFold's."""

from deepspeed_ds4sci.nn.attention import (
    MSAColumnAttention,
    MSARowAttentionWithPairBias,
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
)
from deepspeed_ds4sci.nn.evoformer import EvoformerBlock, EvoformerStack, PairStack
from deepspeed_ds4sci.nn.openfold import load_openfold_state_dict
from deepspeed_ds4sci.nn.updates import (
    OuterProductMean,
    Transition,
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)

__all__ = [
    "EvoformerBlock",
    "EvoformerStack",
    "MSAColumnAttention",
    "MSARowAttentionWithPairBias",
    "OuterProductMean",
    "PairStack",
    "Transition",
    "TriangleAttentionEndingNode",
    "TriangleAttentionStartingNode",
    "TriangleMultiplicationIncoming",
    "TriangleMultiplicationOutgoing",
    "load_openfold_state_dict",
]
