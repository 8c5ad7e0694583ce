# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_engine_nvme.py run."""

from pathlib import Path

import torch.distributed as dist

from tests.distributed import tiny_models
from tests.distributed.behaviour_worker import engine_of
from tests.distributed.checkpoint_worker import ADAMW, differences, distance, snapshot, train
from tests.distributed.engine_worker import Case

# DeepSpeed swaps what has 1 MiB or more on a rank; the token embedding of this model has.
VOCAB, HIDDEN = 4096, 128


def after_two_steps(zero, clipping):
    """Weights, and the table with its optimizer state, with these settings of ZeRO stage 3."""
    case = Case("gpt2", stage=3, sharded_table=True, optimizer=ADAMW, clipping=clipping, zero=zero)
    engine = engine_of(model=tiny_models.build("gpt2"), case=case)[0]
    train(engine, 2, 0, 2)
    return snapshot(engine)


def offloaded(folder):
    """{(what is offloaded, clipping): (what differs from offload to CPU memory, distance from none, folders)}."""
    import deepspeed

    deepspeed.init_distributed(dist.get_backend())
    tiny_models.VOCAB, tiny_models.HIDDEN = VOCAB, HIDDEN
    found = {}
    for clipping in (0.0, 0.5):
        without = after_two_steps({}, clipping)
        in_memory = after_two_steps({"offload_optimizer": {"device": "cpu", "pin_memory": False}}, clipping)
        for what in ("optimizer", "optimizer and parameters"):
            disk = Path(folder) / f"{what} {clipping}"
            nvme = {"device": "nvme", "nvme_path": str(disk), "buffer_count": 5}
            zero = {"offload_optimizer": {**nvme, "pin_memory": False}}
            if what != "optimizer":
                zero["offload_param"] = {**nvme, "buffer_size": 2**20, "max_in_cpu": 0}
            weights = after_two_steps(zero, clipping)
            folders = sorted({path.name for path in disk.rglob("*") if path.is_dir() and list(path.rglob("*.swp"))})
            found[what, clipping] = differences(in_memory, weights), distance(without, weights)[0], folders
    return found
