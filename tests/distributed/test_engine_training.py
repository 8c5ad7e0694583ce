# SPDX-License-Identifier: Apache-2.0
"""Training with sequences split over ranks is the training of one rank: loss, every gradient, and the step.

One launch per world size runs all its rows. The rows are chosen so that every model meets every ZeRO stage, both
modes and both accumulation settings; data parallelism, padding, masks and documents appear where they could go wrong.
"""

import pytest

from tests.distributed.engine_worker import Case, run_cases
from tests.helpers.distributed import run_distributed

LIMIT = 2e-6  # of the tensor's largest value
LIMIT_OF_FIVE_ADAMW_STEPS = 1e-5

ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-4, "torch_adam": True}}}
FIVE_CLIPPED_STEPS = {**ADAMW, "clipping": 0.3, "steps": 5, "variant": "adamw-clipped"}

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
GRID = {"ulysses": 2, "ring": 2}


def recomputed(kind, cpu_offload=False, **others):
    return {"activation_checkpointing": {"kind": kind, "cpu_offload": cpu_offload, **others}}


def tiled(**parts):
    return {"tiling": parts or {"mlp": 3, "loss": 5}}


def mask(kind, **others):
    return {"attention_mask": {"kind": kind, "cpu_threshold": 8, **others}}


def positions(kind="model", scaling=None):
    return {"position_embedding": {"kind": kind, **({"scaling": scaling} if scaling else {})}}


YARN = {"kind": "yarn", "factor": 4.0, "original_length": 4}
RULE = "tests.helpers.mask_rules:strided_by_head"
# One rank has whole sequences: what a block changes besides.
ONE_RANK = [
    Case("llama", size=1, stage=3, variant="padding", features=mask("causal")),
    Case("gpt2", size=1, accumulation=2, variant="documents", features=mask("document")),
    Case("esm", size=1, stage=2, features=mask("custom", rule=RULE)),
    Case("genslm-rotary", size=1, stage=1, variant="documents", features=mask("document")),
    Case("gpt_neox", size=1, stage=1, variant="window", features={"attention": {"sliding_window": 5}}),
    Case("vit", size=1, stage=1, variant="tiled", features={"attention": {"implementation": "tiled"}}),
    Case("gpt_neox", size=1, stage=2, accumulation=2, variant="tiled", features=tiled()),
    Case("llama", size=1, stage=3, variant="tiled-and-recomputed", features={**tiled(), **recomputed("full")}),
    Case("esm", size=1, stage=3, variant="tiled", features=tiled()),
    Case("gpt2", size=1, stage=2, variant="to-alibi", features=positions("alibi")),
    Case("gpt2", size=1, stage=1, variant="to-rotary", features=positions("rotary")),
    Case("llama", size=1, stage=3, variant="yarn", features=positions(scaling=YARN)),
    Case(
        "llama",
        size=1,
        stage=2,
        variant="tiled-and-kept",
        features={"attention": {"implementation": "tiled"}, **recomputed("keep_attention", True)},
    ),
]

TWO_RANKS = [
    *(
        Case(model, stage=stage, mode="ulysses" if (stage + index) % 2 else "ring", accumulation=1 + (stage // 2))
        for index, model in enumerate(("gpt_neox", "gpt2", "llama", "esm"))
        for stage in range(4)
    ),
    *(Case("gpt2", sharded_table=True, stage=stage, accumulation=1 + stage % 2) for stage in range(4)),
    # A gradient larger than the bucket goes another way than the others.
    Case("gpt2", stage=3, variant="all-reduce", zero={"reduce_scatter": False, "reduce_bucket_size": 1000}),
    Case("gpt2", sharded_table=True, stage=1, mode="ring", seq_len=13, variant="odd-length"),
    Case("llama", mode="ring", seq_len=13, variant="odd-length"),
    Case("esm", mode="ulysses", seq_len=15, stage=3, variant="odd-length"),
    Case("llama", mode="ulysses", variant="padding"),
    Case("esm", mode="ring", stage=1, variant="padding"),
    Case("gpt_neox", mode="ring", variant="documents"),
    Case("gpt_neox", mode="ulysses", stage=3, variant="documents"),
    Case("llama", mode="ring", variant="positions"),
    Case("gpt2", mode="ring", variant="custom-mask"),
    Case("llama", mode="ulysses", variant="custom-mask"),
    Case("gpt2", variant="ignored-shard"),
    *(Case("genslm-learned", sharded_table=True, stage=stage, accumulation=2 - stage % 2) for stage in range(4)),
    Case("genslm-learned", sharded_table=True, mode="ring", stage=2, seq_len=13, variant="odd-length"),
    Case("genslm-rotary", mode="ring", stage=1, accumulation=2),
    Case("genslm-rotary", mode="ulysses", stage=3, variant="padding"),
    Case("genslm-alibi", mode="ulysses", stage=0, variant="documents"),
    Case("genslm-alibi", mode="ring", stage=2, seq_len=13, variant="odd-length"),
    Case("genslm-alibi", mode="ring", stage=3, variant="custom-mask"),
    Case("genslm-encoder", mode="ulysses", stage=1, seq_len=13, variant="odd-length"),
    Case("genslm-rotary", stage=3, variant="tiled", features=tiled()),
    Case("gpt_neox", stage=3, accumulation=2, variant="tiled", features={**tiled(), **recomputed("full", True)}),
    Case("gpt2", mode="ring", stage=3, variant="tiled", features=tiled()),
    Case("gpt2", sharded_table=True, stage=1, accumulation=2, variant="tiled", features=tiled()),
    Case("llama", stage=2, seq_len=13, variant="padding", features={**tiled(), **recomputed("keep_attention")}),
    Case("esm", mode="ring", stage=3, seq_len=13, variant="padding", features=tiled()),
    Case("esm", variant="tiled", features=tiled()),
    Case("vit", variant="tiled", features=tiled(mlp=2)),
    Case("genslm-rotary", stage=2, variant="recomputed", features={"activation_checkpointing": {"kind": "selective"}}),
    Case("llama", stage=3, variant="recomputed", features={"activation_checkpointing": {"kind": "full"}}),
    Case(
        "gpt_neox",
        mode="ring",
        variant="recomputed",
        features={"activation_checkpointing": {"kind": "full", "every_n_layers": 2}},
    ),
    Case("esm", stage=1, variant="recomputed", features={"activation_checkpointing": {"kind": "selective"}}),
    Case("llama", mode="ring", stage=3, variant="kept-attention", features=recomputed("keep_attention", True)),
    Case("genslm-rotary", mode="ulysses", stage=1, variant="kept-attention", features=recomputed("keep_attention")),
    Case(
        "llama",
        stage=3,
        accumulation=2,
        variant="kept-attention-waiting",
        features=recomputed("keep_attention", True, cpu_offload_attention=True),
    ),
    Case("genslm-alibi", mode="ring", stage=2, accumulation=2, variant="waiting", features=recomputed("full", True)),
    Case("gpt2", stage=3, sharded_table=True, variant="waiting", features=recomputed("full", True)),
    Case("llama", mode="ring", stage=3, seq_len=13, variant="padding", features=mask("causal")),
    Case("gpt2", stage=1, sharded_table=True, seq_len=13, variant="documents", features=mask("document")),
    Case("gpt_neox", mode="ring", stage=2, variant="documents", features=mask("document", cpu_threshold=99)),
    Case("llama", mode="ring", stage=1, seq_len=13, variant="custom-mask", features=mask("custom")),
    Case("gpt2", stage=2, variant="custom-mask", features=mask("custom")),
    Case("esm", mode="ring", seq_len=13, features=mask("custom", rule=RULE)),
    Case("genslm-rotary", stage=3, seq_len=13, features=mask("custom", rule=RULE)),
    Case("genslm-alibi", mode="ring", stage=1, seq_len=13, variant="documents", features=mask("document")),
    Case("llama", mode="ring", stage=2, seq_len=13, variant="window", features={"attention": {"sliding_window": 5}}),
    Case("genslm-rotary", seq_len=13, variant="window", features={"attention": {"sliding_window": 5}}),
    Case("gpt2", mode="ring", stage=2, seq_len=13, variant="to-alibi", features=positions("alibi")),
    Case("gpt2", stage=3, seq_len=13, variant="to-rotary", features=positions("rotary")),
    Case("llama", stage=1, variant="to-alibi", features=positions("alibi")),
    Case("esm", mode="ring", stage=1, seq_len=13, variant="to-alibi", features=positions("alibi")),
    Case("llama", mode="ring", stage=3, variant="yarn", features=positions(scaling=YARN)),
    Case("gpt_neox", variant="linear", features=positions(scaling={"kind": "linear", "factor": 4.0})),
    Case("esm", stage=2, variant="ntk", features=positions(scaling={"kind": "ntk", "factor": 4.0})),
    Case("genslm-learned", mode="ring", seq_len=13, stage=2, variant="to-alibi", features=positions("alibi")),
    Case("genslm-learned", stage=3, variant="to-ntk", features=positions("rotary", {"kind": "ntk", "factor": 2.0})),
    Case("vit"),
    Case("vit", mode="ring", stage=3, accumulation=2),
    Case("vit", mode="ring", stage=1, variant="recomputed", features=recomputed("full")),
    Case("gpt2", sharded_table=True, stage=0, **FIVE_CLIPPED_STEPS),
    Case("gpt2", sharded_table=True, stage=2, **FIVE_CLIPPED_STEPS),
    Case("gpt2", sharded_table=True, stage=3, **FIVE_CLIPPED_STEPS),
    Case("llama", stage=1, **FIVE_CLIPPED_STEPS),
    *(
        Case("gpt2", sharded_table=True, stage=stage, zero=zero, **{**FIVE_CLIPPED_STEPS, "variant": "offload"})
        for stage, zero in ((1, OFFLOAD), (2, OFFLOAD), (3, {**OFFLOAD, "offload_param": {"device": "cpu"}}))
    ),
]

FOUR_RANKS = [
    *(Case("gpt_neox", size=2, stage=stage, mode="ring", variant="padding") for stage in range(4)),
    *(Case("gpt2", size=2, stage=stage, sharded_table=True, accumulation=2, variant="padding") for stage in range(4)),
    Case("llama", size=4, mode="ring", stage=2),
    Case("llama", size=4, mode=GRID, stage=3),
    Case("llama", size=4, mode="ulysses"),
    Case("esm", size=4, mode=GRID, stage=1, seq_len=19, variant="odd-length"),
    Case("gpt2", size=4, mode=GRID, stage=3, sharded_table=True, seq_len=18, variant="odd-length"),
    Case("gpt2", size=4, mode=GRID, stage=1, seq_len=19, features=mask("custom", rule=RULE)),
    Case("genslm-rotary", size=4, mode=GRID, stage=2, seq_len=19, variant="documents", features=mask("document")),
    Case("gpt2", size=4, mode=GRID, stage=3, seq_len=19, variant="to-alibi", features=positions("alibi")),
    Case("genslm-rotary", size=4, mode=GRID, stage=1, variant="yarn", features=positions(scaling=YARN)),
    Case("llama", size=2, stage=3, variant="tiled", features=tiled()),
    Case("vit", size=2, stage=2, mode="ring", accumulation=2),
    Case("vit", size=4, stage=3, mode=GRID),
    Case("gpt2", size=2, stage=2, sharded_table=True, **FIVE_CLIPPED_STEPS),
]


@pytest.fixture(scope="module")
def one_rank():
    return run_distributed(run_cases, 1, ONE_RANK, timeout=600)


@pytest.fixture(scope="module")
def two_ranks():
    return run_distributed(run_cases, 2, TWO_RANKS, timeout=600)


@pytest.fixture(scope="module")
def four_ranks():
    return run_distributed(run_cases, 4, FOUR_RANKS, timeout=600)


def check(case, results):
    limits = {"loss": LIMIT, "gradient": LIMIT, "step": LIMIT_OF_FIVE_ADAMW_STEPS if case.steps > 1 else LIMIT}
    for rank, errors in enumerate(results):
        assert isinstance(errors[case.id], dict), f"rank {rank}: {errors[case.id]}"
        for kind, (error, where) in errors[case.id].items():
            assert error <= limits[kind], f"{kind} on rank {rank}: {error:.2e} of the largest value in {where}"


@pytest.mark.distributed(1)
@pytest.mark.parametrize("case", ONE_RANK, ids=lambda case: case.id)
def test_one_rank_trains_like_a_plain_model(case, one_rank):
    check(case, one_rank)


@pytest.mark.distributed(2)
@pytest.mark.parametrize("case", TWO_RANKS, ids=lambda case: case.id)
def test_two_ranks_train_like_one(case, two_ranks):
    check(case, two_ranks)


@pytest.mark.distributed(4)
@pytest.mark.parametrize("case", FOUR_RANKS, ids=lambda case: case.id)
def test_four_ranks_train_like_one(case, four_ranks):
    check(case, four_ranks)
