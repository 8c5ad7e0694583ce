# SPDX-License-Identifier: Apache-2.0
"""This project's op, in its canonical layout."""

import torch

from tests.benchmarks.case import Case, Inputs
from tests.benchmarks.peers.base import Call, Peer, leaf, wanted_leaves


class Ours(Peer):
    """`evoformer_attention` with a named implementation, or with the one it picks by itself.

    fuses_gate: a gate is handed to the op; else plain PyTorch applies it to the op's output.
    """

    shares_pair_bias = True
    takes_gate = True

    def __init__(self, implementation: str | None, fuses_gate: bool = True):
        self.implementation = implementation
        self.fuses_gate = fuses_gate
        self.name = f"ours[{implementation or 'default'}]{'' if fuses_gate else '-gate-apart'}"

    def unavailable_reason(self, device_type: str) -> str | None:
        from deepspeed_ds4sci import evoformer_attention

        dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
        probe = torch.zeros(1, 1, 1, 1, 8, dtype=dtype, device=device_type)
        try:
            evoformer_attention(probe, probe, probe, implementation=self.implementation)
        except (NotImplementedError, ValueError) as error:
            return str(error).splitlines()[0]
        return None

    def bind(self, case: Case, inputs: Inputs) -> Call:
        """NotImplementedError if the named implementation does not take the case."""
        from deepspeed_ds4sci import evoformer_attention
        from deepspeed_ds4sci.ops._dispatch import choose, problem_of

        choose(problem_of(inputs.q, inputs.k, inputs.pair_bias, case.head_dim**-0.5), self.implementation)
        q, k, v = leaf(inputs.q), leaf(inputs.k), leaf(inputs.v)
        mask_bias = inputs.mask_bias()
        pair_bias = None if inputs.pair_bias is None else leaf(inputs.pair_bias)

        gate = None if inputs.gate is None else leaf(inputs.gate)
        fused = gate if self.fuses_gate else None

        def forward():
            o = evoformer_attention(
                q, k, v, mask_bias=mask_bias, pair_bias=pair_bias, gate=fused, implementation=self.implementation
            )
            return o if fused is gate else torch.sigmoid(gate) * o

        leaves = wanted_leaves(case, q, k, v, pair_bias)
        return Call(forward, leaves if gate is None else leaves | {"gate": gate}, inputs.do.clone())
