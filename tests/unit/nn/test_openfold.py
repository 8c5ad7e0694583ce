# SPDX-License-Identifier: Apache-2.0
"""Parameter names are OpenFold's; weights in each of its layouts load; what does not fit is named."""

import pytest
import torch

from deepspeed_ds4sci.nn import TriangleMultiplicationIncoming, load_openfold_state_dict
from tests.unit.nn.helpers import C_Z, make_block, make_inputs, make_stack, randomise

_NORM = ("weight", "bias")
_MHA = ("linear_q.weight", "linear_k.weight", "linear_v.weight") + tuple(
    f"linear_{n}.{p}" for n in "og" for p in ("weight", "bias")
)


def _names(module: str, norms=(), linears=(), no_bias=(), mha=False) -> list[str]:
    names = [f"{module}.{n}.{p}" for n in (*norms, *linears) for p in _NORM]
    names += [f"{module}.{n}.weight" for n in no_bias]
    return names + ([f"{module}.mha.{n}" for n in _MHA] if mha else [])


_TRI_MUL = dict(
    norms=("layer_norm_in", "layer_norm_out"),
    linears=("linear_a_p", "linear_a_g", "linear_b_p", "linear_b_g", "linear_g", "linear_z"),
)
_TRI_ATT = dict(norms=("layer_norm",), no_bias=("linear",), mha=True)
_TRANSITION = dict(norms=("layer_norm",), linears=("linear_1", "linear_2"))

# The parameters of `EvoformerBlock` in OpenFold's current layout, module by module.
CURRENT_NAMES = [
    *_names("msa_att_row", norms=("layer_norm_m", "layer_norm_z"), no_bias=("linear_z",), mha=True),
    *_names("msa_att_col._msa_att", norms=("layer_norm_m",), mha=True),
    *_names("msa_transition", **_TRANSITION),
    *_names("outer_product_mean", norms=("layer_norm",), linears=("linear_1", "linear_2", "linear_out")),
    *_names("pair_stack.tri_mul_out", **_TRI_MUL),
    *_names("pair_stack.tri_mul_in", **_TRI_MUL),
    *_names("pair_stack.tri_att_start", **_TRI_ATT),
    *_names("pair_stack.tri_att_end", **_TRI_ATT),
    *_names("pair_stack.pair_transition", **_TRANSITION),
]


def to_core_layout(name: str) -> str:
    if name.startswith(("msa_transition", "outer_product_mean")):
        return f"core.{name}"
    return name.replace("pair_stack.", "core.")


def to_flat_layout(name: str) -> str:
    return name.replace("pair_stack.", "").replace("msa_att_col._msa_att.", "msa_att_col.")


def to_fused_layout(state: dict) -> dict:
    """linear_a_* and linear_b_* of the triangle multiplications joined along the output channels."""
    fused = {name: value for name, value in state.items() if "linear_a_" not in name and "linear_b_" not in name}
    for name, value in state.items():
        if "linear_a_" in name:
            other = state[name.replace("linear_a_", "linear_b_")]
            fused[name.replace("linear_a_", "linear_ab_")] = torch.cat([value, other])
    return fused


LAYOUTS = {
    "current": lambda state: state,
    "core": lambda state: {to_core_layout(name): value for name, value in state.items()},
    "flat": lambda state: {to_flat_layout(name): value for name, value in state.items()},
    "fused": to_fused_layout,
    "fused_core": lambda state: {to_core_layout(name): value for name, value in to_fused_layout(state).items()},
}


def test_the_recorded_layout_is_the_blocks_own():
    block = make_block()
    assert sorted(CURRENT_NAMES) == sorted(block.state_dict())
    assert len(CURRENT_NAMES) == len(set(CURRENT_NAMES)) == 93


def test_a_few_names_as_openfold_spells_them():
    core = LAYOUTS["core"](make_block().state_dict())
    for name in (
        "msa_att_row.layer_norm_m.weight",
        "msa_att_row.linear_z.weight",
        "msa_att_row.mha.linear_q.weight",
        "msa_att_col._msa_att.mha.linear_o.bias",
        "core.tri_mul_out.linear_a_p.weight",
        "core.tri_att_end.linear.weight",
        "core.tri_att_end.mha.linear_g.bias",
        "core.outer_product_mean.linear_out.bias",
        "core.msa_transition.linear_1.weight",
        "core.pair_transition.linear_2.weight",
    ):
        assert name in core


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_loads_from_each_layout(layout):
    source, target = make_block(), randomise(make_block(), seed=5)
    assert load_openfold_state_dict(target, LAYOUTS[layout](source.state_dict())) == ([], [])
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name
    source.eval(), target.eval()
    for a, b in zip(source(*make_inputs()), target(*make_inputs()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stack_loads_from_inside_a_whole_model(layout):
    source, target = make_stack(num_blocks=2), randomise(make_stack(num_blocks=2), seed=5)
    state = {f"evoformer.linear.{p}": source.state_dict()[f"linear.{p}"] for p in ("weight", "bias")}
    for i, block in enumerate(source.blocks):
        renamed = LAYOUTS[layout](block.state_dict())
        state |= {f"evoformer.blocks.{i}.{name}": value for name, value in renamed.items()}
    state["structure_module.ipa.head_weights"] = torch.zeros(3)
    load_openfold_state_dict(target, state, prefix="evoformer.")
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


@pytest.mark.parametrize("child", ["pair_stack", "pair_stack.tri_mul_in", "pair_stack.tri_att_end", "msa_att_col"])
def test_submodules_load_under_their_own_names(child):
    source, target = make_block().get_submodule(child), randomise(make_block(), seed=5).get_submodule(child)
    load_openfold_state_dict(target, source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_the_dtype_of_the_module_stays():
    target = make_block(torch.float32)
    load_openfold_state_dict(target, make_block(torch.float64).state_dict())
    assert all(value.dtype == torch.float32 for value in target.state_dict().values())


def test_state_dict_round_trip():
    source, target = make_stack(), randomise(make_stack(), seed=5)
    target.load_state_dict(source.state_dict(), strict=True)
    source.eval(), target.eval()
    for a, b in zip(source(*make_inputs()), target(*make_inputs()), strict=True):
        assert torch.equal(a, b)


def test_missing_and_unexpected_names_are_listed():
    state = LAYOUTS["core"](make_block().state_dict())
    del state["core.tri_mul_out.linear_z.bias"]
    state["core.tri_mul_out.linear_q.bias"] = torch.zeros(1)
    block = randomise(make_block(), seed=5)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    message = (
        r"state_dict does not fit EvoformerBlock: missing 1 \[pair_stack.tri_mul_out.linear_z.bias\]; "
        r"unexpected 1 \[core.tri_mul_out.linear_q.bias\]. Is prefix='' right\?"
    )
    with pytest.raises(ValueError, match=message):
        load_openfold_state_dict(block, state)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    missing, unexpected = load_openfold_state_dict(block, state, strict=False)
    assert missing == ["pair_stack.tri_mul_out.linear_z.bias"]
    assert unexpected == ["core.tri_mul_out.linear_q.bias"]
    assert torch.equal(block.state_dict()["pair_stack.tri_mul_out.linear_z.bias"], before[missing[0]])


def test_a_wrong_shape_is_named_even_when_not_strict():
    state = make_block().state_dict()
    state["msa_att_row.linear_z.weight"] = torch.zeros(3, 9)
    with pytest.raises(ValueError, match=r"msa_att_row.linear_z.weight must be \[3, 8\], got \[3, 9\]"):
        load_openfold_state_dict(make_block(), state, strict=False)


def test_a_wrong_prefix_is_named():
    with pytest.raises(ValueError, match=r"names that start with 'evoformer\.', got 93 \[msa_att_row"):
        load_openfold_state_dict(make_block(), make_block().state_dict(), prefix="evoformer.")


def test_two_names_for_one_parameter_are_refused():
    state = make_block().state_dict()
    state |= {"core.pair_transition.linear_2.bias": torch.zeros(C_Z)}
    with pytest.raises(ValueError, match="must name each parameter once, got .*pair_transition.linear_2.bias"):
        load_openfold_state_dict(make_block(), state)


def test_fused_halves_go_to_a_and_b():
    module = TriangleMultiplicationIncoming(C_Z, 2)
    state = to_fused_layout(module.state_dict())
    state["linear_ab_p.weight"] = torch.arange(4 * C_Z, dtype=torch.float32).reshape(4, C_Z)
    load_openfold_state_dict(module, state)
    assert torch.equal(module.linear_a_p.weight, state["linear_ab_p.weight"][:2])
    assert torch.equal(module.linear_b_p.weight, state["linear_ab_p.weight"][2:])
