# SPDX-License-Identifier: Apache-2.0
"""The blocks that are timed, their inputs, and one training step of them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepspeed_ds4sci.nn import EvoformerBlock
from tests.benchmarks.case import DROPPED, DTYPES

# AlphaFold's channels, heads and widths are the defaults of EvoformerBlock.
TINY_WIDTHS = dict(
    c_m=16,
    c_z=12,
    c_hidden_msa_att=8,
    c_hidden_opm=4,
    c_hidden_mul=12,
    c_hidden_pair_att=8,
    num_heads_msa=2,
    num_heads_pair=2,
    transition_n=2,
)


@dataclass(frozen=True)
class BlockCase:
    """One block: its name, sequences (0: the pair stack alone), residues, and whether its widths are tiny."""

    name: str
    n_seq: int
    n_res: int
    tiny: bool = False
    dtype: str = "bf16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


CASES = {
    "block": BlockCase("block", 512, 384),  # AlphaFold 2, fine-tuning
    "pair-stack": BlockCase("pair-stack", 0, 768),  # AlphaFold 3, fine-tuning crop
}
TINY_CASES = {
    "block": BlockCase("block", 18, 24, tiny=True),  # DeepSpeed's op takes lengths above 16 only
    "pair-stack": BlockCase("pair-stack", 0, 24, tiny=True),
}


@dataclass
class Problem:
    """A block and everything that a forward and backward pass of it needs.

    module: every parameter random. AlphaFold starts the last layer of each update at zero, which would hide attention
    from the output and its inputs from the gradient. Dropout is off, so that variants are comparable number by number.
    inputs: (m, z) of the block, (z,) of the pair stack, batch axis of 1, requiring gradients.
    masks: bool, keep = True, one for each input.
    grad_outputs: gradients of the outputs, which have the shapes of the inputs.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    grad_outputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, case: BlockCase, device: torch.device, seed: int = 0) -> "Problem":
        widths = TINY_WIDTHS if case.tiny else {}
        block = EvoformerBlock(**widths, msa_dropout=0.0, pair_dropout=0.0)
        c_m, c_z = block.outer_product_mean.c_m, block.pair_stack.tri_att_start.c_z
        module = (block if case.n_seq else block.pair_stack).to(device, case.torch_dtype)
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype)

        with torch.no_grad():
            for name, parameter in module.named_parameters():
                # Norms near the identity, biases small, weights of variance 1 / fan-in: a trained block's magnitudes.
                scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.1
                centre = 1.0 if "layer_norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + scale * normal(*parameter.shape))
        shapes = [(1, case.n_seq, case.n_res, c_m)] if case.n_seq else []
        shapes.append((1, case.n_res, case.n_res, c_z))
        masks = []
        for shape in shapes:
            keep = torch.rand(shape[:-1], generator=generator, device=device) >= DROPPED
            keep[:, 0] = keep[:, :, 0] = True  # a query without any key means something else to every peer
            masks.append(keep)
        inputs = tuple(normal(*shape).requires_grad_() for shape in shapes)
        return cls(module, inputs, tuple(masks), tuple(normal(*shape) for shape in shapes))

    def upcast(self) -> "Problem":
        """The same numbers in fp32, in a module of its own."""
        module = copy.deepcopy(self.module).float()
        inputs = tuple(x.detach().float().requires_grad_() for x in self.inputs)
        return Problem(module, inputs, self.masks, tuple(x.float() for x in self.grad_outputs))

    def run(self, forward: Callable | None = None) -> dict[str, Tensor]:
        """Forward and backward of the module, or of a compiled form of it.

        Returns outputs by name ("m", "z"), gradients of the inputs ("dm", "dz") and of each parameter ("d" + name).
        """
        forward = self.module if forward is None else forward  # not `or`: a compiled module cannot say if it is true
        outputs = forward(*self.inputs, *self.masks)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        names, parameters = zip(*self.module.named_parameters(), strict=True)
        gradients = torch.autograd.grad(outputs, (*self.inputs, *parameters), self.grad_outputs)
        tables = ("m", "z")[-len(outputs) :]
        results = dict(zip(tables, (output.detach() for output in outputs), strict=True))
        results.update(zip((f"d{name}" for name in (*tables, *names)), gradients, strict=True))
        return results
