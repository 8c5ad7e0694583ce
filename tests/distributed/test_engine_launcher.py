# SPDX-License-Identifier: Apache-2.0
"""The `deepspeed` launcher and a script without a word about this package: the JSON block is enough."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import clean_environment

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


WITH_TABLE = {
    "sequence_parallel": {"size": 2},
    "position_embedding": {"kind": "learned", "sharded": True},
}


def launch(folder, ranks, features, **variables):
    config = {
        "train_batch_size": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    }
    if features is not None:
        config["ds4sci"] = features
    (folder / "ds.json").write_text(json.dumps(config))
    script = [str(ROOT / "tests/distributed/launched_script.py"), "--deepspeed_config", str(folder / "ds.json")]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--num_gpus",
            str(ranks),
            "--master_port",
            str(free_port()),
            *script,
        ]
        + ["--result", str(folder / "result.json")],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        env=clean_environment(
            **{
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": 1,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                **variables,
            }
        ),
    )
    return done


def check_an_unchanged_script(folder, **variables):
    """One rank without the block against two with it."""
    found = []
    for ranks, features in ((1, None), (2, WITH_TABLE)):
        done = launch(folder, ranks, features, **variables)
        assert done.returncode == 0, done.stdout[-4000:]
        found.append(json.loads((folder / "result.json").read_text()))
    one, two = found
    assert (one["attention"], two["attention"]) == ("sdpa", "ds4sci")
    assert (one["dp"], two["dp"]) == (1, 1)
    assert len(one["losses"]) == 4
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.distributed(2)
def test_an_unchanged_script_trains_like_one_rank(tmp_path):
    check_an_unchanged_script(tmp_path)


@pytest.mark.distributed(2)
def test_a_misspelt_block_ends_the_launch_with_its_path(tmp_path):
    done = launch(tmp_path, 1, {"sequence_parallel": {"sise": 2}})
    assert done.returncode != 0
    assert "ds4sci.sequence_parallel.sise: unknown key; did you mean 'size'?" in done.stdout
