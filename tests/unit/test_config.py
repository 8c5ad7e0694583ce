# SPDX-License-Identifier: Apache-2.0
"""The ds4sci block: what is read, what is refused and with which words, and what `config check` says."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import BaseModel

from deepspeed_ds4sci.config import check_combinations, load_file, read_block
from deepspeed_ds4sci.config.__main__ import main
from deepspeed_ds4sci.config.schema import DS4SciConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("long_sequence_*.json"))


def block(**features):
    return {"train_batch_size": 8, "ds4sci": features}


def test_no_block_is_none_and_an_empty_block_asks_for_nothing():
    assert read_block({"train_batch_size": 8}) is None
    assert not read_block(block()).enabled()


@pytest.mark.parametrize(
    "features, message",
    [
        ({"sequence_paralel": {}}, r"ds4sci\.sequence_paralel: unknown key; did you mean 'sequence_parallel'"),
        ({"sequence_parallel": {"sise": 2}}, r"ds4sci\.sequence_parallel\.sise: unknown key; did you mean 'size'"),
        ({"tiling": {"colour": 2}}, r"ds4sci\.tiling\.colour: unknown key; known keys: mlp, loss"),
        (
            {"sequence_parallel": {"size": 4, "mode": {"ulysses": 2, "rign": 2}}},
            r"ds4sci\.sequence_parallel\.mode\.rign: unknown key; did you mean 'ring'",
        ),
        ({"position_embedding": {"scaling": {"knd": 1}}}, r"ds4sci\.position_embedding\.scaling\.knd: unknown key"),
        ({"sequence_parallel": {"size": "auto"}}, r"ds4sci\.sequence_parallel\.size: .*got 'auto'"),
        ({"sequence_parallel": {"mode": "auto"}}, r"ds4sci\.sequence_parallel\.mode: .*got 'auto'"),
        ({"sequence_parallel": {"size": 0}}, r"ds4sci\.sequence_parallel\.size: .*greater than or equal to 1, got 0"),
        (
            {"sequence_parallel": {"size": 4, "mode": {"ulysses": 2, "ring": 3}}},
            r"ulysses \* ring = size = 4, got 2 \* 3",
        ),
        (
            {"sequence_parallel": {"mode": "ring", "padding": "refuse"}},
            r"sequence_parallel: .*size is missing, without which mode, padding has no effect",
        ),
        ({"attention_mask": {"kind": "block"}}, r"ds4sci\.attention_mask\.kind: .*'document'.*got 'block'"),
        ({"position_embedding": {"sharded": True}}, r'sharded needs kind "learned", got \'model\''),
        ({"position_embedding": {"scaling": {"factor": 2.0}}}, r'scaling: factor .* no effect with kind "none"'),
        (
            {"position_embedding": {"scaling": {"kind": "ntk"}}},
            r'scaling: a factor of 1 has no effect .*"ntk"',
        ),
        (
            {"position_embedding": {"scaling": {"kind": "ntk", "factor": 2.0, "original_length": 9}}},
            r'original_length has an effect with kind "yarn" only',
        ),
        (
            {"position_embedding": {"kind": "alibi", "scaling": {"kind": "ntk", "factor": 2.0}}},
            r"position_embedding: scaling needs rotary positions, got 'alibi'",
        ),
        ({"activation_checkpointing": {"cpu_offload": True}}, r"have no effect with kind"),
        (
            {"activation_checkpointing": {"kind": "full", "cpu_offload_attention": True}},
            r'cpu_offload_attention needs kind "keep_attention", got .full.',
        ),
        ({"attention_mask": {"kind": "causal", "rule": "a:b"}}, r'rule needs kind "custom", got \'causal\''),
        ({"attention_mask": {"kind": "custom", "rule": "a.b"}}, r'rule must be "module:function", got \'a\.b\''),
    ],
)
def test_refuses_with_the_dotted_path(features, message):
    with pytest.raises(ValueError, match=message):
        read_block(block(**features))


def test_every_error_of_a_block_is_reported_at_once():
    with pytest.raises(ValueError) as error:
        read_block(block(tiling={"mpl": 1, "loss": -1}))
    assert "ds4sci.tiling.mpl" in str(error.value) and "ds4sci.tiling.loss" in str(error.value)


def test_refuses_a_block_that_is_no_object():
    with pytest.raises(ValueError, match=r"ds4sci must be a JSON object, got 3"):
        read_block({"ds4sci": 3})


@pytest.mark.parametrize("name", ["ds4sc", "ds4sic", "DS4Sci", "ds4_sci", "ds4scii", "deepspeed4science"])
def test_notices_a_misspelt_block_name(name):
    with pytest.raises(ValueError, match=f"unknown key '{name}' .*misspelt 'ds4sci'"):
        read_block({name: {}})


def test_does_not_take_a_key_of_deepspeed_for_the_block():
    keys = ["dump_state", "data_efficiency", "data_types", "disable_allgather", "dataloader_drop_last", "datastates"]
    assert read_block({key: {} for key in keys}) is None


def with_parallel(**others):
    return {**block(sequence_parallel={"size": 2}), **others}


@pytest.mark.parametrize(
    "ds_config, error, message",
    [
        (block(sequence_parallel={"size": 2, "mode": "megatron"}), NotImplementedError, "mode = megatron .*tensor"),
        (block(position_embedding={"kind": "learned"}), NotImplementedError, "learned without sharded"),
        (
            block(position_embedding={"kind": "learned", "sharded": True}),
            ValueError,
            r"sharded needs ds4sci\.sequence_parallel\.size of at least 2",
        ),
        *(
            (
                block(attention={"implementation": name}, activation_checkpointing={"kind": "keep_attention"}),
                NotImplementedError,
                f'"keep_attention" does not go with ds4sci.attention.implementation = "{name}": .*{reason}, so there',
            )
            for name, reason in (("math", "none of which is attention"), ("flex", "is no operation of torch"))
        ),
        (with_parallel(sequence_parallel_size=2), ValueError, "sequence_parallel_size and ds4sci"),
        (with_parallel(tensor_parallel={"autotp_size": 2}), NotImplementedError, "tensor_parallel.autotp_size"),
        (with_parallel(gradient_allreduce_op="sum"), NotImplementedError, "gradient_allreduce_op = sum"),
        (
            with_parallel(zero_optimization={"stage": 3, "zero_hpz_partition_size": 2}),
            NotImplementedError,
            "zero_hpz_partition_size",
        ),
        (
            with_parallel(zero_optimization={"stage": 3, "zero_quantized_gradients": True}),
            NotImplementedError,
            "zero_quantized_gradients",
        ),
        (with_parallel(gradient_predivide_factor=2.0), NotImplementedError, "gradient_predivide_factor"),
        (
            block(sequence_parallel={"size": 2, "loss_average": "step"}),
            NotImplementedError,
            "sequence_parallel.loss_average = step",
        ),
        (with_parallel(hybrid_engine={"enabled": True}), NotImplementedError, "hybrid_engine"),
        (with_parallel(elasticity={"enabled": True}), NotImplementedError, "elasticity"),
        (with_parallel(compile={"deepcompile": True}), NotImplementedError, "deepcompile"),
        (
            with_parallel(data_efficiency={"data_routing": {"random_ltd": {"enabled": True}}}),
            NotImplementedError,
            "random_ltd",
        ),
        (with_parallel(expert_parallel={"enabled": True}), NotImplementedError, "expert_parallel"),
        (with_parallel(sparse_gradients=True), NotImplementedError, "sparse_gradients"),
        *(
            (with_parallel(**{key: value}), ValueError, f"{key} must be a JSON object, got {shown}")
            for key, value, shown in (
                ("zero_optimization", True, "true"),
                ("tensor_parallel", None, "null"),
                ("compile", [1], r"\[1\]"),
            )
        ),
        (
            with_parallel(data_efficiency={"data_routing": 3}),
            ValueError,
            r"data_efficiency\.data_routing must be a JSON object, got 3",
        ),
        (
            block(attention={"implementation": "flash", "sliding_window": 5}),
            NotImplementedError,
            'ds4sci.attention.implementation: "flash" does not support window',
        ),
        (
            block(attention={"implementation": "cudnn"}, attention_mask={"kind": "causal"}),
            NotImplementedError,
            'ds4sci.attention.implementation: "cudnn" does not support mask',
        ),
        (
            block(attention={"implementation": "flash"}, position_embedding={"kind": "alibi"}),
            NotImplementedError,
            'ds4sci.attention.implementation: "flash" does not support alibi',
        ),
        (with_parallel(managed_gradient_accumulation=False), NotImplementedError, "managed_gradient_accumulation"),
    ],
)
def test_refuses_combinations_that_cannot_work(ds_config, error, message):
    with pytest.raises(error, match=message):
        check_combinations(read_block(ds_config), ds_config)


@pytest.mark.parametrize(
    "others, message",
    [
        ({"fp16": {"enabled": True}}, "fp16 does not go"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm"),
    ],
)
def test_refuses_what_the_sharded_table_cannot_do(others, message):
    ds_config = with_parallel(**others)
    ds_config["ds4sci"]["position_embedding"] = {"kind": "learned", "sharded": True}
    with pytest.raises(NotImplementedError, match=message):
        check_combinations(read_block(ds_config), ds_config)


def test_every_field_is_documented():
    def undocumented(model, path):
        for name, field in model.model_fields.items():
            if isinstance(field.default, BaseModel):
                yield from undocumented(type(field.default), f"{path}.{name}")
            elif not field.description:
                yield f"{path}.{name}"

    assert list(undocumented(DS4SciConfig, "ds4sci")) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_configs_are_valid(path, capsys):
    ds_config = load_file(path)
    assert read_block(ds_config).enabled()
    assert main(["check", str(path)]) == 0
    assert f"{path}: valid" in capsys.readouterr().out
    DeepSpeedConfig(dict(ds_config))


def test_there_are_example_configs():
    assert len(CONFIGS) >= 3


def write(path, text):
    path.write_text(text)
    return str(path)


def test_check_explains_in_plain_words(tmp_path, capsys):
    features = {
        "sequence_parallel": {"size": 4, "mode": "ring", "padding": "refuse"},
        "position_embedding": {"kind": "learned", "sharded": True},
    }
    ds_config = {**block(**features), "zero_optimization": {"stage": 2}}
    assert main(["check", write(tmp_path / "ds.json", json.dumps(ds_config))]) == 0
    out = capsys.readouterr().out
    for words in (
        "Each sequence is split over 4 GPUs; attention crosses them by key and value blocks that travel in a ring.",
        "A length that is no multiple of 8 tokens is an error.",
        "ZeRO stage 2 partitions over all GPUs",
        "holds its part of the learned position table",
        "ds4sci.sequence_parallel.padding = 'refuse' (default 'pad'): What happens to a batch",
    ):
        assert words in out


@pytest.mark.parametrize(
    "features, words",
    [
        (
            {"attention": {"implementation": "math", "sliding_window": 9}},
            ('Attention is computed by "math" or, where that cannot be, refused.', "attends to 9 tokens, itself"),
        ),
        (
            {"attention_mask": {"kind": "document"}, "sequence_parallel": {"size": 4, "mode": "ring"}},
            (
                "under a mask of documents, built for each batch: on the device up to 16384 tokens, above in CPU",
                "Each GPU holds one of every 4 rows of it.",
            ),
        ),
        (
            {"attention_mask": {"kind": "custom", "rule": "a:b"}, "sequence_parallel": {"size": 4}},
            ("under the mask of a:b", "Each GPU holds all rows of it."),
        ),
        (
            {"position_embedding": {"kind": "alibi"}},
            ("The model gets ALiBi, a penalty that grows with distance, in place of those it was built with.",),
        ),
        (
            {"position_embedding": {"scaling": {"kind": "yarn", "factor": 4.0}}},
            ("Rotary angles are scaled (yarn) for 4 times the length trained on.",),
        ),
        ({"attention_mask": {"cpu_threshold": 4096}}, ("attention_mask.cpu_threshold has no effect",)),
        (
            {"activation_checkpointing": {"kind": "keep_attention", "every_n_layers": 2, "cpu_offload": True}},
            (
                "One of every 2 layers is computed again in the backward pass, but for attention; what it starts from",
                "What layers start from waits in CPU memory and comes back one layer ahead",
            ),
        ),
        (
            {"activation_checkpointing": {"kind": "keep_attention", "cpu_offload_attention": True}},
            ("What attention returns waits in CPU memory and comes back one layer ahead",),
        ),
    ],
)
def test_check_explains_each_feature(tmp_path, capsys, features, words):
    assert main(["check", write(tmp_path / "ds.json", json.dumps(block(**features)))]) == 0
    out = capsys.readouterr().out
    assert all(each in out for each in words), out


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"ds4sci": {', "is not valid JSON"),
        ("[1]", "must hold one JSON object, got list"),
        ('{"ds4sci": {}, "ds4sci": {}}', "gives the key 'ds4sci' twice"),
        ('{"ds4sci": {"tiling": {"mpl": 1}}}', "ds4sci.tiling.mpl: unknown key"),
        ('{"ds4sci": {"position_embedding": {"kind": "learned"}}}', "learned without sharded is not supported"),
        ('{"ds4sc": {}}', "misspelt 'ds4sci'"),
    ],
)
def test_check_refuses_with_the_file_name(tmp_path, capsys, text, message):
    path = write(tmp_path / "ds.json", text)
    assert main(["check", path]) == 1
    err = capsys.readouterr().err
    assert err.startswith(path) and message in err


def test_check_says_that_a_file_is_missing(tmp_path, capsys):
    assert main(["check", str(tmp_path / "none.json")]) == 1
    assert "cannot be read: No such file" in capsys.readouterr().err


def test_check_of_a_file_without_a_block(tmp_path, capsys):
    assert main(["check", write(tmp_path / "ds.json", '{"train_batch_size": 1}')]) == 0
    assert "no ds4sci block" in capsys.readouterr().out


def test_a_block_at_its_defaults_is_explained_as_such(tmp_path, capsys):
    assert main(["check", write(tmp_path / "ds.json", '{"ds4sci": {}}')]) == 0
    assert "Every feature is at its default" in capsys.readouterr().out
