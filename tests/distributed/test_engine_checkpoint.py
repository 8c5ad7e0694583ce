# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of split sequences and sharded tables: exact resume, other layouts, export, damage, a crash."""

import re
from pathlib import Path

import pytest

from tests.distributed.checkpoint_worker import FLIPPED, run
from tests.helpers.distributed import run_distributed

LIMIT_OF_FOUR_ADAMW_STEPS = 2e-6  # of the tensor's largest value: another layout adds up in another order
GRID = {"ulysses": 2, "ring": 2}

SWITCHES_OF_TWO_RANKS = [
    ((1, 2, "ulysses"), (2, 2, "ring")),
    ((1, 2, "ring"), (3, 2, "ulysses")),
    ((3, 2, "ulysses"), (1, 2, "ulysses")),
    ((2, 2, "ulysses"), (1, 1, "ulysses")),
    ((1, 1, "ulysses"), (1, 2, "ring")),
    ((0, 2, "ring"), (1, 2, "ulysses")),
    ((3, 2, "ulysses"), (0, 2, "ulysses")),
]
RESTAGED = [
    ((0, True), (2, True)),
    ((0, False), (3, True)),
    ((1, True), (0, False)),
    ((0, False), (2, False), "bf16"),
    ((3, False), (0, False), "bf16"),
]
SWITCHES_OF_FOUR_RANKS = [
    ((1, 2, "ulysses"), (1, 4, GRID)),
    ((3, 4, "ring"), (3, 2, "ulysses")),
]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    calls = [
        *(("resume", stage) for stage in range(4)),
        *(("switched", *switch) for switch in SWITCHES_OF_TWO_RANKS),
        *(("restaged", *pair) for pair in RESTAGED),
        *(("exported", stage) for stage in (0, 1, 3)),
        ("damaged",),
        ("flipped_bits",),
        ("unsharded",),
        ("other_stage_refused",),
        ("data_position",),
    ]
    return by_call(calls, run_distributed(run, 2, with_folders(calls, tmp_path_factory), timeout=900))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("two-to-four"))
    run_distributed(run, 2, [("saved_by_two_ranks", folder)])
    calls = [("switched", *switch) for switch in SWITCHES_OF_FOUR_RANKS]
    launch = [*with_folders(calls, tmp_path_factory), ("loaded_by_four_ranks", folder)]
    return by_call([*calls, ("loaded_by_four_ranks",)], run_distributed(run, 4, launch, timeout=900))


def by_call(calls, results):
    """[{call: result}] per rank; a call may hold a dict, which is no key."""
    return [{str(call): each for call, each in zip(calls, found.values(), strict=True)} for found in results]


def with_folders(calls, factory):
    return [(name, str(factory.mktemp(name)), *arguments) for name, *arguments in calls]


@pytest.mark.distributed(2)
@pytest.mark.parametrize("stage", range(4))
def test_resumes_bit_exactly(two_ranks, stage):
    for results in two_ranks:
        assert results[str(("resume", stage))][0] == []


@pytest.mark.distributed(2)
def test_the_table_is_saved_shard_by_shard(two_ranks):
    files = two_ranks[0][str(("resume", 2))][1]
    assert {"ds4sci_position_table_00000_of_00002.pt", "ds4sci_position_table_00001_of_00002.pt"} <= set(files)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("switch", SWITCHES_OF_TWO_RANKS, ids=str)
def test_goes_on_in_another_mode_stage_or_without_splitting(two_ranks, switch):
    for results in two_ranks:
        error, name = results[str(("switched", *switch))]
        assert error <= LIMIT_OF_FOUR_ADAMW_STEPS, name


@pytest.mark.distributed(2)
@pytest.mark.parametrize("pair", RESTAGED, ids=str)
def test_optimizer_states_are_the_same_bits_at_another_stage_and_back(two_ranks, pair):
    for results in two_ranks:
        assert results[str(("restaged", *pair))] == ([], [])


@pytest.mark.distributed(4)
@pytest.mark.parametrize("switch", SWITCHES_OF_FOUR_RANKS, ids=str)
def test_goes_on_with_another_number_of_ranks_per_sequence(four_ranks, switch):
    for results in four_ranks:
        error, name = results[str(("switched", *switch))]
        assert error <= LIMIT_OF_FOUR_ADAMW_STEPS, name


@pytest.mark.distributed(4)
def test_goes_on_with_more_ranks_after_conversion_and_not_without(four_ranks):
    for results in four_ranks:
        (error, name), message = results[str(("loaded_by_four_ranks",))]
        assert error <= LIMIT_OF_FOUR_ADAMW_STEPS, name
        assert "was saved with ranks = 2, and this engine has 4" in message
        assert "python -m deepspeed_ds4sci.checkpoint universal" in message


@pytest.mark.distributed(2)
def test_another_stage_without_conversion_is_refused_and_changes_nothing(two_ranks):
    for results in two_ranks:
        found, changed = results[str(("other_stage_refused",))]
        assert "was saved with zero = stage 1 or 2, and this engine has stage 3" in found["stage 3"]
        assert "was saved with zero = stage 1 or 2, and this engine has off" in found["stage 0"]
        assert "was saved with zero = off, and this engine has stage 1 or 2" in found["from stage 0"]
        for name in ("stage 3", "stage 0", "from stage 0"):
            assert "python -m deepspeed_ds4sci.checkpoint universal" in found[name]
        assert (
            "global_step1_universal is a universal checkpoint: checkpoint.load_universal in the" in found["universal"]
        )
        assert "is no universal checkpoint: checkpoint.load_universal in the config must be false" in found["plain"]
        assert "lacks the parameter transformer.h.1.ln_1.bias" in found["parameter"]
        assert "the saved parameter transformer.wte.weight must be [33, 16], got [3]" in found["shape"]
        assert "the saved optimizer must have 1 parameter groups, got 2" in found["groups"]
        assert changed == []


@pytest.mark.distributed(2)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_every_whole_state_dict_has_the_whole_table(two_ranks, stage):
    found, refusal = two_ranks[0][str(("exported", stage))]
    assert len(found) == (5 if stage else 4)
    for way, (different, distance) in found.items():
        assert different == [] and distance <= 1e-5, way
    assert "state_dict() of the model would lack transformer.wpe" in refusal
    assert two_ranks[1][str(("exported", stage))][0] == {}


@pytest.mark.distributed(2)
def test_the_engines_loader_goes_on_with_the_next_batch(two_ranks):
    for results in two_ranks:
        found = results[str(("data_position",))]
        assert len(found["rest"]) == 7
        assert found["loaded"] == found["begun"] == found["rest"]
        assert found["next epoch"]


@pytest.mark.distributed(2)
@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", "global_step1 lacks the file ds4sci_position_table_00001_of_00002.pt"),
        ("damaged", "ds4sci_position_table_00001_of_00002.pt is damaged: it has "),
        ("missing of DeepSpeed", "global_step1 lacks the file zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("manifest", "ds4sci_checkpoint.json is damaged and cannot be read"),
        ("tag", "ValueError: there is no checkpoint "),
        ("shape", "the saved position table must be [96, 16], got [64, 16]"),
        ("crash", "RuntimeError: the machine stopped"),
    ],
)
def test_says_what_is_wrong_with_a_checkpoint(two_ranks, what, message):
    for results in two_ranks:
        assert message in results[str(("damaged",))][what]


@pytest.mark.distributed(2)
def test_a_crash_in_a_save_leaves_the_previous_checkpoint_chosen_and_loadable(two_ranks):
    for results in two_ranks:
        assert results[str(("damaged",))]["chosen"] == "global_step1"
        assert results[str(("damaged",))]["differs"] == []


@pytest.mark.distributed(2)
def test_a_refused_load_leaves_the_engine_as_it_was(two_ranks):
    for results in two_ranks:
        assert results[str(("damaged",))]["changed"] == []


@pytest.mark.distributed(2)
@pytest.mark.parametrize("name", FLIPPED)
def test_a_flipped_bit_is_found_before_anything_is_changed(two_ranks, name):
    for results in two_ranks:
        messages, changed = results[str(("flipped_bits",))][name]
        for message in messages:  # of load_checkpoint, export and universal
            assert re.search(
                rf"{name} is damaged: its CRC-32 is [0-9a-f]{{8}}, and was [0-9a-f]{{8}} when it", message
            )
            assert "can be loaded by its tag: global_step1 (newest first)" in message
        assert changed == []


@pytest.mark.distributed(2)
def test_after_a_flipped_bit_the_checkpoint_before_loads_by_its_tag(two_ranks):
    for results in two_ranks:
        assert results[str(("flipped_bits",))]["before"] == []


@pytest.mark.distributed(2)
def test_a_checkpoint_without_the_list_loads_with_a_warning(two_ranks):
    lines, others = (results[str(("flipped_bits",))]["unlisted"] for results in two_ranks)
    assert (
        len([line for line in lines if "has no ds4sci_checkpoint.json, so its files cannot be checked" in line]) == 1
    )
    assert others == []


@pytest.mark.distributed(2)
def test_each_rank_sums_up_what_it_wrote(two_ranks):
    assert two_ranks[0][str(("flipped_bits",))]["writers"] == {
        "ds4sci_position_table_00000_of_00002.pt": 0,
        "ds4sci_position_table_00001_of_00002.pt": 1,
        "ds4sci_random_00000_of_00002.pt": 0,
        "ds4sci_random_00001_of_00002.pt": 1,
        "mp_rank_00_model_states.pt": 0,
        "zero_pp_rank_0_mp_rank_00_optim_states.pt": 0,
        "zero_pp_rank_1_mp_rank_00_optim_states.pt": 1,
    }


@pytest.mark.distributed(2)
def test_takes_the_table_of_an_unsharded_checkpoint(two_ranks):
    for results in two_ranks:
        taken, refused, changed, _ = results[str(("unsharded",))]
        assert taken and changed == []
        for what in ("with states", "stage 3"):
            assert "saved without position_embedding.sharded, and this engine is with; convert it" in refused[what]
        assert "saved with position_embedding.sharded, and this engine is without; convert it" in refused["back"]


@pytest.mark.distributed(2)
def test_a_tag_may_name_folders(two_ranks):
    for results in two_ranks:
        assert Path(results[str(("unsharded",))][3]).match("run/sharded/mp_rank_00_model_states.pt")
