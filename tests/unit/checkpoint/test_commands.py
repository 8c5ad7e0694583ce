# SPDX-License-Identifier: Apache-2.0
"""The commands on checkpoints: what they refuse, and a checkpoint without ZeRO. Others: tests/distributed."""

import json

import pytest
import torch

from deepspeed_ds4sci.checkpoint.__main__ import main
from deepspeed_ds4sci.checkpoint.table_files import write_shard
from deepspeed_ds4sci.models import GenSLM, GenSLMConfig
from deepspeed_ds4sci.sequence.position_table import TableShard

CONFIG = {
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 32,
    "max_positions": 12,
    "position_embedding": "learned",
    "parallel_residual": False,
    "activation": "gelu_tanh",
    "tie_embeddings": True,
}


@pytest.fixture
def checkpoint(tmp_path):
    """(directory, the model): saved without ZeRO, its table in two shards."""
    model = GenSLM(GenSLMConfig(**CONFIG))
    folder = tmp_path / "global_step7"
    folder.mkdir()
    (tmp_path / "latest").write_text("global_step7")
    state = model.state_dict()
    table = state.pop("position_embedding.weight")
    torch.save(
        {"module": {name: each.bfloat16() for name, each in state.items()}}, folder / "mp_rank_00_model_states.pt"
    )
    for rank, (start, stop) in enumerate(((0, 6), (6, 12))):
        write_shard(folder, rank, 2, "position_embedding", TableShard(table[start:stop], start, stop, 12), {}, {})
    return tmp_path, model


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_export_for_hugging_face(checkpoint, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    directory, model = checkpoint
    (directory / "genslm.json").write_text(json.dumps(CONFIG))
    out = directory / "model.safetensors"
    assert run("export", directory, out, "--genslm", directory / "genslm.json") == 0
    from safetensors.torch import load_file

    config = GPT2Config(vocab_size=69, n_embd=16, n_layer=1, n_head=2, n_positions=12, n_inner=32)
    theirs = GPT2LMHeadModel(config).eval()
    state = load_file(out)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    theirs.load_state_dict(state)
    tokens = torch.randint(5, 69, (2, 12))
    with torch.no_grad():
        ours = model.bfloat16().float().eval()(tokens).logits
        assert (theirs(tokens).logits - ours).abs().max() < 0.02  # the table was not rounded to 16 bits
    assert f"to {out}" in capsys.readouterr().out


def test_export_into_a_folder(checkpoint):
    directory, model = checkpoint
    (directory / "out").mkdir()
    assert run("export", directory, directory / "out", "--tag", "global_step7") == 0
    state = torch.load(directory / "out" / "pytorch_model.bin")
    assert torch.equal(state["position_embedding.weight"], model.position_embedding.weight)


def test_a_checkpoint_that_a_crash_left_under_its_other_name_is_found(checkpoint):
    """It was being replaced by a newer one of its name."""
    directory, _ = checkpoint
    assert run("export", directory, directory / "before.bin") == 0
    (directory / "global_step7").rename(directory / "global_step7.replaced")
    assert run("export", directory, directory / "after.bin") == 0
    before, after = (torch.load(directory / name) for name in ("before.bin", "after.bin"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_refused(checkpoint, capsys):
    directory, _ = checkpoint
    folder, out = directory / "global_step7", directory / "out.bin"
    cases = [
        (("export", directory / "nowhere", out), "has no file `latest`; name a tag"),
        (("export", directory, out, "--tag", "global_step8"), "there is no checkpoint"),
        (("export", directory, out, "--genslm", "gpt-5"), "--genslm must be a published name or a JSON file"),
        (("universal", directory / "global_step8"), "there is no checkpoint"),
        (("universal", folder), "has no optimizer states"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err
    (directory / "bad.json").write_text('{"hidden_size": 16, "layers": 2}')
    assert run("export", directory, out, "--genslm", directory / "bad.json") == 2
    assert "must hold the fields of GenSLMConfig" in capsys.readouterr().err
    weights = folder / "mp_rank_00_model_states.pt"
    weights.write_bytes(weights.read_bytes()[:100])
    assert run("export", directory, out) == 2
    assert "mp_rank_00_model_states.pt is damaged" in capsys.readouterr().err
    weights.unlink()
    assert run("export", directory, out) == 2
    assert "must hold one mp_rank_*_model_states.pt, got 0" in capsys.readouterr().err
    assert not out.exists()
