# SPDX-License-Identifier: Apache-2.0
"""Loads OpenFold weights into the modules of this package.

The parameter names are those of OpenFold's current `EvoformerBlock`. Released checkpoints come in four layouts:

    current     msa_att_row. msa_att_col._msa_att. msa_transition. outer_product_mean. pair_stack.tri_mul_out. ...
    core        core.msa_transition. core.outer_product_mean. core.tri_mul_out. core.pair_transition. ...
    flat        msa_transition. tri_mul_out. pair_transition. ..., and msa_att_col.layer_norm_m. msa_att_col.mha.
    fused       linear_ab_p and linear_ab_g in the triangle multiplications (AlphaFold-Multimer weights)
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_PAIR_MODULES = "tri_mul_out|tri_mul_in|tri_att_start|tri_att_end|pair_transition"

# Applied in this order to every name; each pattern leaves current names alone.
_RENAMES = (
    (re.compile(r"(^|\.)core\."), r"\1"),
    (re.compile(rf"(^|(?<!pair_stack)\.)({_PAIR_MODULES})\."), r"\1pair_stack.\2."),
    (re.compile(r"(^|\.)msa_att_col\.(?!_msa_att\.)"), r"\1msa_att_col._msa_att."),
)
_FUSED = re.compile(r"^(.*\.)?linear_ab_(p|g)\.(weight|bias)$")
_SHOWN = 8


def load_openfold_state_dict(
    module: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True, *, prefix: str = ""
) -> tuple[list[str], list[str]]:
    """Copies OpenFold parameters into `module`, whichever of OpenFold's layouts they are in.

    Args:
        module: an `EvoformerBlock`, an `EvoformerStack` or one of their submodules; changed in place.
        state_dict: OpenFold's names to tensors, cast to the dtype and device of `module`.
        strict: refuse missing and unexpected names. Shapes must always match.
        prefix: use only the names that start with this, without it: "evoformer." or "evoformer.blocks.3." for a whole
            OpenFold model.

    Returns:
        (missing, unexpected): names of `module` without a value, and names of `state_dict` without a place; both empty
        when strict.

    Raises:
        ValueError: no name starts with `prefix`; two names mean the same parameter; a shape does not match; or, when
            strict, names are missing or unexpected. Nothing has been copied then.
    """
    own = module.state_dict()
    selected = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
    if not selected:
        raise ValueError(f"state_dict must have names that start with {prefix!r}, got {_listing(state_dict)}")
    values: dict[str, Tensor] = {}
    source: dict[str, str] = {}
    for name, value in selected.items():
        for target, part in _current_names(name, value, own):
            if target in values:
                raise ValueError(
                    f"state_dict must name each parameter once, got {source[target]!r} and {name!r} for {target!r}"
                )
            values[target], source[target] = part, name
    missing = sorted(own.keys() - values.keys())
    unexpected = sorted({source[target] for target in values.keys() - own.keys()})
    if strict and (missing or unexpected):
        raise ValueError(
            f"state_dict does not fit {type(module).__name__}: "
            f"missing {_listing(missing)}; unexpected {_listing(unexpected)}. Is prefix={prefix!r} right?"
        )
    wrong = [
        f"{source[name]} must be {list(own[name].shape)}, got {list(values[name].shape)}"
        for name in sorted(own.keys() & values.keys())
        if own[name].shape != values[name].shape
    ]
    if wrong:
        raise ValueError(f"state_dict has parameters of another shape: {_listing(wrong)}")
    with torch.no_grad():
        for name in own.keys() & values.keys():
            own[name].copy_(values[name])
    return missing, unexpected


def _current_names(name: str, value: Tensor, own: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """OpenFold's name in any layout -> [(name in this package, tensor)]; two of them for a fused projection.

    A submodule such as `TriangleAttentionEndingNode` or `PairStack` has shorter names than a block; a name that the
    module knows as it stands is kept.
    """
    if name in own:
        return [(name, value)]
    fused = _FUSED.match(name)
    if fused:
        stem, kind, parameter = fused.group(1) or "", fused.group(2), fused.group(3)
        halves = zip("ab", value.tensor_split(2, dim=0), strict=True)
        parts = [(f"{stem}linear_{letter}_{kind}.{parameter}", half) for letter, half in halves]
        return [_current_names(part_name, half, own)[0] for part_name, half in parts]
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return [(name, value)]


def _listing(names) -> str:
    """At most `_SHOWN` of the names and how many there are."""
    names = list(names)
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} [{shown}]"
