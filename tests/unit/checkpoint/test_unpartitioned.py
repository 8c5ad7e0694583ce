# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of ZeRO stage 0 as a universal one: whichever way DeepSpeed holds the optimizer, and what is refused.

Loading the result at other stages: tests/distributed.
"""

import pytest
import torch

from deepspeed_ds4sci.checkpoint import to_universal
from deepspeed_ds4sci.checkpoint.manifest import read_manifest, write_manifest
from deepspeed_ds4sci.checkpoint.universal_files import saved_state

GROUPS = [["a", "b"], ["c"]]
SHAPES = {"a": (2, 3), "b": (4,), "c": (3, 1)}


def trained(dtype=torch.float32, optimizer=torch.optim.AdamW, idle=()):
    """(weights, optimizer) after two steps; `idle` have no gradients."""
    torch.manual_seed(0)
    weights = {name: torch.randn(shape).to(dtype).float().requires_grad_() for name, shape in SHAPES.items()}
    made = optimizer([{"params": [weights[name] for name in names]} for names in GROUPS], lr=0.1)
    for _ in range(2):
        for name, weight in weights.items():
            weight.grad = None if name in idle else torch.randn_like(weight)
        made.step()
    return {name: weight.detach() for name, weight in weights.items()}, made


def save(tmp_path, weights, optimizer, groups=GROUPS, dtype=torch.float32):
    folder = tmp_path / "global_step2"
    folder.mkdir()
    module = {name: weight.to(dtype) for name, weight in weights.items()}
    content = {"module": module, "optimizer": optimizer, "lr_scheduler": {"steps": 2}, "dp_world_size": 1}
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    write_manifest(folder, layout={}, **({} if groups is None else {"parameter_groups": groups}))
    return folder


def wrapped(weights, optimizer, flat):
    """The state dict of DeepSpeed's optimizers of 16-bit weights: a weight in fp32 each, or one for each group."""
    inner = optimizer.state_dict()
    groups = [[weights[name] for name in names] for names in GROUPS]
    if not flat:
        return {"optimizer_state_dict": inner, "fp32_groups": groups}
    state, first = {}, 0
    for number, group in enumerate(groups):
        each = [inner["state"][first + index] for index in range(len(group))]
        joined = {key: torch.cat([one[key].flatten() for one in each]) for key in ("exp_avg", "exp_avg_sq")}
        state[number] = {"step": int(each[0]["step"]), **joined}
        first += len(group)
    flats = [torch.cat([weight.flatten() for weight in group]) for group in groups]
    return {"optimizer_state_dict": {**inner, "state": state}, "fp32_groups_flat": flats}


@pytest.mark.parametrize("kind", ["plain", "wrapped", "flat"])
def test_every_parameter_keeps_its_bits(tmp_path, kind):
    dtype = torch.float32 if kind == "plain" else torch.bfloat16
    weights, optimizer = trained(dtype)
    content = optimizer.state_dict() if kind == "plain" else wrapped(weights, optimizer, kind == "flat")
    out = to_universal(save(tmp_path, weights, content, dtype=dtype))
    expected = list(optimizer.state.values())
    for number, (name, weight) in enumerate(weights.items()):
        state = saved_state(out, name, optimizer_states=True)
        assert torch.equal(state["fp32"], weight) and float(state["step"]) == 2
        assert torch.equal(state["exp_avg"], expected[number]["exp_avg"])
        assert torch.equal(state["exp_avg_sq"], expected[number]["exp_avg_sq"])
    assert read_manifest(out)["universal"] is True
    kept = torch.load(out / "mp_rank_00_model_states.pt")
    assert kept["lr_scheduler"] == {"steps": 2} and kept["optimizer"] is None
    settings = torch.load(out / "zero" / "optimizer_state.pt")["param_groups"]
    assert [group["lr"] for group in settings] == [0.1, 0.1]


def test_a_parameter_without_gradients_gets_zeros_as_zero_would_have(tmp_path):
    weights, optimizer = trained(idle=("b",))
    out = to_universal(save(tmp_path, weights, optimizer.state_dict()))
    state = saved_state(out, "b", optimizer_states=True)
    assert torch.equal(state["fp32"], weights["b"]) and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    assert float(state["step"]) == 2


def test_what_is_refused(tmp_path):
    def message(name, weights, optimizer, **kwargs):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError) as caught:
            to_universal(save(tmp_path / name, weights, optimizer, **kwargs))
        assert not (tmp_path / name / "global_step2_universal").exists()
        assert "load it at stage 0, or pass load_optimizer_states=False" in str(caught.value)
        return str(caught.value)

    weights, adam = trained()
    assert "no optimizer states, or none whose parameters' names" in message("names", weights, {}, groups=None)
    sgd = trained(optimizer=lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.9))[1]
    assert "(exp_avg, exp_avg_sq, step), got momentum_buffer" in message("sgd", weights, sgd.state_dict())
    fresh = torch.optim.AdamW(weights.values())
    assert "(exp_avg, exp_avg_sq, step), got none" in message("fresh", weights, fresh.state_dict())
    state = adam.state_dict()
    state["state"][1]["step"] = torch.tensor(1.0)
    assert "took different numbers of optimizer steps, [1.0, 2.0]" in message("steps", weights, state)
    half = wrapped(weights, adam, flat=False)
    assert "is of fp16, whose loss scale" in message("fp16", weights, half, dtype=torch.float16)


def test_a_checkpoint_without_weights(tmp_path):
    (tmp_path / "global_step2").mkdir()
    with pytest.raises(ValueError, match="global_step2 lacks the file mp_rank_00_model_states.pt"):
        to_universal(tmp_path / "global_step2")


def test_zero_states_of_another_optimizer_are_refused(tmp_path, monkeypatch):
    from deepspeed.checkpoint import ds_to_universal

    def convert(arguments):
        raise KeyError("exp_avg")

    (tmp_path / "global_step2").mkdir()
    (tmp_path / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    monkeypatch.setattr(ds_to_universal, "main", convert)
    with pytest.raises(ValueError, match="has optimizer states without 'exp_avg'; a universal checkpoint has Adam's"):
        to_universal(tmp_path / "global_step2")
