# SPDX-License-Identifier: Apache-2.0
"""Where each known trap of long-sequence training is tested, numbered as in the project's list of fifteen."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TRAINING = "distributed/test_engine_training.py"
MUTATIONS = "distributed/mutation_worker.py"
BEHAVIOUR = "distributed/test_engine_behaviour.py"
CHECKPOINT = "distributed/test_engine_checkpoint.py"

# What a trap's test is called, or the row of the judge that runs into it. 1 and 2 are about tensor parallelism, which
# a ds4sci block refuses.
TRAPS = {
    1: [("unit/test_config.py", "tensor_parallel.autotp_size")],
    2: [("unit/test_config.py", "tensor_parallel.autotp_size")],
    3: [(MUTATIONS, "def wrong_group"), (MUTATIONS, "def replicated_table"), (CHECKPOINT, "saved_shard_by_shard")],
    4: [(MUTATIONS, "def replicated_table")],
    5: [(TRAINING, 'variant="odd-length"'), (BEHAVIOUR, "test_evaluation_gives_whole_logits_and_embeddings")],
    6: [(MUTATIONS, "def wrong_scale"), (TRAINING, "for stage in range(4)")],
    7: [(MUTATIONS, "def unshifted_labels")],
    8: [(MUTATIONS, "def loss_of_this_rank_alone"), (TRAINING, 'variant="ignored-shard"')],
    9: [(BEHAVIOUR, "test_dropout_differs_between_ranks"), (TRAINING, 'variant="recomputed"')],
    10: [(TRAINING, 'variant="odd-length"'), (BEHAVIOUR, '("length", "ValueError')],
    11: [(TRAINING, '("gpt_neox", "gpt2", "llama", "esm")')],
    12: [(TRAINING, 'variant="custom-mask"'), (TRAINING, 'Case("genslm-alibi", mode="ring"')],
    13: [("unit/hooks/test_relative_positions.py", "test_angles_are_exact_beyond_a_million_positions")],
    15: [(BEHAVIOUR, "test_batch_arithmetic_divides"), (CHECKPOINT, "another_number_of_ranks_per_sequence")],
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_its_test(trap):
    for path, name in TRAPS[trap]:
        assert name in (TESTS / path).read_text(), f"trap {trap}: {name} is gone from {path}"
