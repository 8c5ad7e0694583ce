# SPDX-License-Identifier: Apache-2.0
"""The parts of a run: launches of ranks, and what their results are put together to."""

import json
import os
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.climb import Climb
from tests.benchmarks.two_gpus import equality, workers
from tests.benchmarks.two_gpus.masks import masks
from tests.benchmarks.two_gpus.sizes import Sizes
from tests.distributed.engine_worker import run_cases
from tests.helpers.distributed import RankFailure, run_distributed

MODES = ("ulysses", "ring")
ONE = "one rank"
_MAX_LAUNCHES = 6  # of one search; each but the last ends with a failure


@dataclass(frozen=True)
class Ranks:
    """Where ranks run: `backend` as of `run_distributed`, and the seconds that a launch may take."""

    backend: str
    timeout: int

    def launch(self, function, world_size, *arguments, first=0):
        """`run_distributed` on GPUs first, first + 1, ... of those that this process sees."""
        visible = {}
        if self.backend == "nccl":
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(seen[first : first + world_size])}
        return run_distributed(
            function, world_size, *arguments, timeout=self.timeout, backend=self.backend, **self.memory(), **visible
        )

    def memory(self):
        # Lengths that vary from step to step would leave holes otherwise.
        return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if self.backend == "nccl" else {}


def _model(config):
    return (
        f"GenSLM, hidden {config.hidden_size}, {config.num_layers} layers, {config.num_heads} heads, "
        f"{config.position_embedding} positions"
    )


def run_equality(ranks: Ranks, sizes: Sizes) -> dict:
    results = ranks.launch(run_cases, 2, equality.CASES)
    return {"limit": equality.LIMIT, "rows": equality.merged(results)}


def _results(futures: dict) -> tuple[dict, dict]:
    """({name: result}, {name: traceback}) of launches, of which some may fail."""
    results, failed = {}, {}
    for name, future in futures.items():
        try:
            results[name] = future.result()
        except Exception:  # the others' results stand
            failed[name] = traceback.format_exc()
    return results, failed


def run_curves(ranks: Ranks, sizes: Sizes) -> dict:
    base, yardstick = f"{ONE}, bf16", f"{ONE}, fp32"
    with ThreadPoolExecutor(2) as pool:  # a GPU each
        alone = {
            base: pool.submit(ranks.launch, workers.curves, 1, sizes, None, True),
            yardstick: pool.submit(ranks.launch, workers.curves, 1, sizes, None, False, first=1),
        }
    with ThreadPoolExecutor(1) as pool:  # both GPUs, one after the other
        together = {
            f"two ranks, {mode}": pool.submit(ranks.launch, workers.curves, 2, sizes, mode, True) for mode in MODES
        }
    found, failed = _results(alone | together)
    runs = {name: results[0] for name, results in found.items()}
    expected = runs[base]["losses"] if base in runs else None
    distances = {
        name: max(abs(mine - theirs) for mine, theirs in zip(run["losses"], expected, strict=True))
        for name, run in runs.items()
        if expected is not None
    }
    model = f"{_model(sizes.curves)}, {sizes.curve_tokens} tokens"
    return {
        "model": model,
        "steps": sizes.curve_steps,
        "base": base,
        "runs": runs,
        "distances": distances,
        "failed": failed,
    }


def run_table(ranks: Ranks, sizes: Sizes) -> dict:
    found = {ONE: ranks.launch(workers.table_bytes, 1, sizes, None)[0]}
    for rank, row in enumerate(ranks.launch(workers.table_bytes, 2, sizes, "ulysses")):
        found[f"rank {rank} of two"] = row
    return found


def _search(ranks, sizes, world_size, mode):
    """Launches until the longest length is known. A rank that runs out of memory ends its launch."""
    start, multiple, limit = sizes.longest_start, sizes.longest_multiple, sizes.longest.max_positions
    with TemporaryDirectory(prefix="ds4sci-longest-") as folder:
        path = Path(folder) / "probes.jsonl"
        path.touch()
        for _ in range(_MAX_LAUNCHES):
            probes = [json.loads(line) for line in path.read_text().splitlines()]
            found = Climb(start, multiple, limit, capacity=0)
            for probe in probes:
                found.record(probe["seq_len"], probe["peak_bytes"])
            # Once a length failed, what comes next does not depend on the capacity, which only the ranks know.
            if (found.failed or found.longest >= limit) and found.next_length() is None:
                break
            try:
                ranks.launch(workers.climb, world_size, sizes, mode, str(path), probes)
            except RankFailure:
                if len(path.read_text().splitlines()) == len(probes) or not _ended_by_memory(path):
                    raise
    fitted = {str(probe["seq_len"]): probe for probe in probes if probe["peak_bytes"] is not None}
    if not fitted:
        raise RankFailure(f"not even {found.failed} tokens fit")
    return {"longest": found.longest, "failed": found.failed, "probes": fitted}


def _ended_by_memory(path):
    return json.loads(path.read_text().splitlines()[-1])["peak_bytes"] is None


def run_longest(ranks: Ranks, sizes: Sizes) -> dict:
    two = "two ranks, ulysses"
    with ThreadPoolExecutor(1) as pool:
        searches = {
            ONE: pool.submit(_search, ranks, sizes, 1, None),
            two: pool.submit(_search, ranks, sizes, 2, "ulysses"),
        }
    runs, failed = _results(searches)
    ratio = None if failed else runs[two]["longest"] / runs[ONE]["longest"]
    model = f"{_model(sizes.longest)}, table of {sizes.longest.max_positions} rows, ZeRO 1, AdamW"
    return {"model": model, "runs": runs, "ratio": ratio, "failed": failed}


def run_masks(ranks: Ranks, sizes: Sizes) -> dict:
    (rows,) = ranks.launch(masks, 1, sizes, first=1)
    return {"model": _model(sizes.masks), "threshold": sizes.mask_threshold, "rows": rows}


PARTS = {
    "equality": run_equality,
    "curves": run_curves,
    "table": run_table,
    "longest": run_longest,
    "masks": run_masks,
}
