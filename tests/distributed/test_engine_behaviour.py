# SPDX-License-Identifier: Apache-2.0
"""Around training: one path for both forms of initialize, batch sizes, batches in turn, whole outputs, refusals."""

import pytest

from tests.distributed.behaviour_worker import run
from tests.helpers import timm_models
from tests.helpers.distributed import run_distributed

TWO_RANKS = [
    ("one_path",),
    ("device_in_time",),
    ("batch_sizes",),
    ("without_a_block",),
    ("in_turn", 0),
    ("in_turn", 3),
    *(("own_terms", stage) for stage in range(4)),
    ("own_loss", 1),
    ("own_loss", 3),
    ("own_image_loss", 0),
    ("own_image_loss", 3),
    *([("own_image_loss", 0, "timm"), ("own_image_loss", 3, "timm", "full")] if timm_models.INSTALLED else []),
    ("evaluation",),
    ("refusals",),
    ("later_engines",),
    ("copies",),
    ("client_optimizer",),
    ("dropout",),
    ("bf16", 1),
    ("bf16", 2),
    ("bf16", 3),
]


@pytest.fixture(scope="module")
def two_ranks():
    return run_distributed(run, 2, TWO_RANKS)


@pytest.fixture(scope="module")
def four_ranks():
    return run_distributed(run, 4, [("engine_loader",), ("one_group_in_turn",)])


@pytest.mark.distributed(2)
def test_both_forms_of_initialize_are_one_path_and_apply_once(two_ranks):
    automatic, explicit = (two_ranks[0]["one_path",][form] for form in (False, True))
    assert automatic == explicit
    lines, results, hooks, _ = automatic
    assert results == 4
    assert hooks == 1


@pytest.mark.distributed(2)
def test_rank_0_says_in_one_line_per_hook_what_it_changed(two_ranks):
    assert two_ranks[0]["one_path",][False][0] == [
        "ds4sci.sequence_parallel: 2 GPT2Attention modules attend over 2 ranks by ulysses; data-parallel size 1",
        "ds4sci.position_embedding: transformer.wpe [64, 16] is held as [32, 16] on each of 2 ranks, its gradient and "
        "optimizer state too",
    ]
    assert two_ranks[1]["one_path",][False][0] == []


@pytest.mark.distributed(2)
def test_each_rank_is_on_its_own_device_before_the_hooks_communicate(two_ranks):
    assert [results["device_in_time",] for results in two_ranks] == [[0], [1]]


@pytest.mark.distributed(2)
def test_batch_arithmetic_divides_by_the_data_parallel_size(two_ranks):
    assert two_ranks[0]["batch_sizes",] == (1, 1, 1, 1)


@pytest.mark.distributed(2)
def test_a_block_that_asks_for_nothing_leaves_deepspeed_alone(two_ranks):
    assert two_ranks[0]["without_a_block",] == [(False, "sdpa")] * 3


@pytest.mark.distributed(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_different_batches_are_taken_in_turn_by_the_whole_group(two_ranks, stage):
    for results in two_ranks:
        step, steps, micro_steps, evaluation = results["in_turn", stage]
        assert step <= 2e-6 and evaluation <= 1e-5
        assert (steps, micro_steps) == (1, 2)


@pytest.mark.distributed(4)
def test_all_groups_take_turns_in_training_where_one_must(four_ranks):
    for results in four_ranks:
        step, steps, micro_steps, past_the_engine, evaluation = results["one_group_in_turn",]
        assert step <= 2e-6 and evaluation <= 1e-5
        assert (steps, micro_steps) == (1, 2)
        assert past_the_engine.startswith("ValueError: the 2 ranks of a sequence group called the model with")


@pytest.mark.distributed(2)
@pytest.mark.parametrize("stage", range(4))
def test_terms_on_weights_that_a_script_adds_to_the_loss_count_once(two_ranks, stage):
    for results in two_ranks:
        assert results["own_terms", stage] <= 2e-6


@pytest.mark.distributed(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_a_script_computes_its_own_loss_from_whole_logits(two_ranks, stage):
    worst, shape = two_ranks[0]["own_loss", stage]
    assert worst <= 2e-6
    assert shape == (1, 13, 33)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("stage", [0, 3])
def test_a_script_computes_its_own_loss_from_logits_and_hidden_states_of_images(two_ranks, stage):
    for results in two_ranks:
        worst, difference = results["own_image_loss", stage]
        assert worst <= 2e-6 and difference <= 1e-5


@pytest.mark.distributed(2)
@pytest.mark.skipif(not timm_models.INSTALLED, reason=timm_models.REASON)
@pytest.mark.parametrize("stage_and_kind", [(0,), (3, "full")], ids=str)
def test_the_logits_of_timm_too(two_ranks, stage_and_kind):
    stage, *kind = stage_and_kind
    for results in two_ranks:
        worst, difference = results[("own_image_loss", stage, "timm", *kind)]
        assert worst <= 2e-6 and difference <= 1e-5


@pytest.mark.distributed(2)
@pytest.mark.skipif(not timm_models.INSTALLED, reason=timm_models.REASON)
def test_refuses_to_drop_something_else_on_each_rank(two_ranks):
    message = "NotImplementedError: DropPath would leave out something else on each of the GPUs that share an image"
    assert two_ranks[0]["refusals",]["images that lose patches"].startswith(message)


@pytest.mark.distributed(2)
def test_evaluation_gives_whole_logits_and_embeddings(two_ranks):
    for results in two_ranks:
        found = results["evaluation",]
        assert found["shapes"]
        assert found["logits"] <= 1e-5 and found["hidden"] <= 1e-5 and found["loss"] <= 1e-5


@pytest.mark.distributed(2)
@pytest.mark.parametrize(
    "what, message",
    [
        ("logits of a batch with labels", "NotImplementedError: with labels in the batch the outputs stay split"),
        ("functions of those logits", "NotImplementedError: with labels in the batch the outputs stay split"),
        ("return_dict", "NotImplementedError: return_dict=False is not supported"),
        ("past_key_values", "NotImplementedError: the argument 'past_key_values' of GPT2LMHeadModel cannot be split"),
        ("logits_to_keep", "NotImplementedError: the argument 'logits_to_keep' of GPT2LMHeadModel cannot be split"),
        ("no tokens", "ValueError: GPT2LMHeadModel got no input_ids or inputs_embeds"),
        ("different batches past the engine", "ValueError: the 2 ranks of a sequence group called the model with"),
        ("different batches without labels", "NotImplementedError: the ranks of a sequence group brought different"),
        (
            "more tokens than positions",
            "ValueError: input_ids must have at most 64 tokens, the rows of the learned position table, got 66",
        ),
        (
            "more tokens than positions, GenSLM",
            "ValueError: input_ids must have at most 64 tokens, the rows of the learned position table, got 66",
        ),
        ("a position beyond the table", "ValueError: position_ids must be in [0, 64), got values from 49 to 64"),
        ("mask of another length", "ValueError: attention_mask must have 16 tokens on axis 1, got shape (1, 15)"),
        ("three axes", "ValueError: attention_mask must be [B, S] or [B|1, H|1, S, S], got shape (1, 16, 16)"),
        ("loss function", "NotImplementedError: ds4sci.sequence_parallel computes the cross entropy of transformers'"),
        ("loss function without labels", "no error"),
        (
            "recomputation of transformers",
            "NotImplementedError: the recomputation that GPT2LMHeadModel has of its own",
        ),
        ("recomputation at start", "NotImplementedError: the recomputation that GPT2LMHeadModel has of its own"),
        ("unknown model", "NotImplementedError: sequences of Linear cannot be split over GPUs, nor can its"),
        ("mpu", "NotImplementedError: a ds4sci block makes its own process groups; leave out the mpu argument"),
        ("size", "ValueError: ds4sci.sequence_parallel.size must divide the number of ranks = 2, got 3"),
        ("length", "ValueError: the batch has 15 tokens per sequence, which is no multiple of 2"),
        (
            "table of a rotary model",
            "NotImplementedError: ds4sci.position_embedding.kind = learned needs a model with",
        ),
        ("tiles of no layers", "ValueError: ds4sci.tiling is enabled but changes nothing in GPT2LMHeadModel"),
        ("images with a pooling layer", "NotImplementedError: ViTModel with a pooling layer cannot be split"),
        ("masks of images", "NotImplementedError: ds4sci.attention_mask does not go with ViTForImageClassification"),
        ("positions of images", "NotImplementedError: ViTForImageClassification learns positions in the plane"),
        ("nothing changed", "ValueError: ds4sci.sequence_parallel is enabled but changes nothing in GPT2LMHeadModel"),
        ("table with another optimizer", "NotImplementedError: a sharded position table is trained with SGD, Adam"),
    ],
)
def test_refuses(two_ranks, what, message):
    for results in two_ranks:
        assert results["refusals",][what].startswith(message)


@pytest.mark.distributed(2)
def test_a_later_engine_starts_from_the_model_as_it_was(two_ranks):
    found = two_ranks[0]["later_engines",]
    assert {name: found[name] for name in ("llama", "genslm-rotary", "esm", "vit")} == dict.fromkeys(
        ("llama", "genslm-rotary", "esm", "vit"), (True, True, True)
    )
    assert found["first engine"].startswith("RuntimeError: ViTForImageClassification was given to another engine")
    assert found["refused by a later hook"].startswith('ValueError: ds4sci.attention_mask.kind = "causal" does not go')
    assert found["unchanged then"]
    assert found["after a table"] == (
        "NotImplementedError: transformer.wpe was split over the ranks for an earlier engine, which cannot be undone; "
        "make a new model for a new engine"
    )


@pytest.mark.distributed(2)
def test_a_copy_of_a_model_has_hooks_of_its_own(two_ranks):
    errors, message = two_ranks[0]["copies",]
    assert len(errors) == 4 and max(errors.values()) <= 2e-6
    assert message.startswith(
        "NotImplementedError: a model whose position table is sharded cannot be copied: transformer.wpe is no"
    )


@pytest.mark.distributed(2)
def test_a_client_optimizer_may_hold_the_replaced_table(two_ranks):
    for results in two_ranks:
        assert results["client_optimizer",] <= 2e-6


@pytest.mark.distributed(2)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_trains_with_an_fp32_table(two_ranks, stage):
    distance, dtype = two_ranks[0]["bf16", stage]
    assert distance <= 0.02
    assert dtype == "torch.float32"


@pytest.mark.distributed(2)
def test_dropout_differs_between_ranks_and_leaves_the_scripts_generator_alone(two_ranks):
    untouched, equal_masks, share = two_ranks[0]["dropout",]
    assert untouched and not equal_masks
    assert 0.3 < share < 0.7


@pytest.mark.distributed(4)
def test_an_engine_built_loader_gives_a_sequence_group_the_same_samples(four_ranks):
    samples = [results["engine_loader",] for results in four_ranks]
    assert samples[0] == samples[1] and samples[2] == samples[3]
    assert sorted(samples[0] + samples[2]) == list(range(8))
