# SPDX-License-Identifier: Apache-2.0
"""Two ranks against one in fp32. `tests/gpu/test_two_gpus.py` checks the same rows."""

from tests.distributed.engine_worker import Case

LIMIT = 2e-6  # of the tensor's largest value

CASES = [
    *(
        Case("genslm-learned", mode=mode, stage=stage, sharded_table=True, accumulation=1 + stage % 2)
        for mode in ("ulysses", "ring")
        for stage in (0, 1, 3)
    ),
    Case("genslm-alibi", mode="ring", stage=2, seq_len=13, variant="odd-length"),
    Case("gpt2", mode="ulysses", stage=2, sharded_table=True),
    Case("llama", mode="ring", stage=3, variant="padding"),
    Case("gpt_neox", mode="ulysses", stage=1, variant="documents"),
]


def merged(results: list[dict]) -> list[dict]:
    """One row per case from what the ranks of `run_cases` found: the largest errors of any rank."""
    rows = []
    for case in CASES:
        found = [errors[case.id] for errors in results]
        failed = next((each for each in found if isinstance(each, str)), None)
        if failed is not None:
            rows.append({"case": case.id, "error": failed})
            continue
        worst = {kind: max(each[kind][0] for each in found) for kind in ("loss", "gradient", "step")}
        rows.append({"case": case.id, **worst, "holds": max(worst.values()) <= LIMIT})
    return rows
