# SPDX-License-Identifier: Apache-2.0
"""A lock that a killed compilation left in the folder of just-in-time builds is named before anybody waits for it."""

import logging
import os
import time

import pytest

from deepspeed_ds4sci._build_locks import warn_of_old_lock
from tests.helpers.processes import run_python


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "some_op" / "lock"
    path.parent.mkdir()
    return path


def test_an_old_lock_is_named(lock, caplog):
    lock.touch()
    before = time.time() - 86400
    os.utime(lock, (before, before))
    with caplog.at_level(logging.WARNING, logger="deepspeed_ds4sci._build_locks"):
        warn_of_old_lock("some_op")
    (record,) = caplog.records
    assert str(lock) in record.getMessage() and "86400 s ago" in record.getMessage()
    assert lock.exists()


@pytest.mark.parametrize("locked", [True, False])
def test_a_sibling_that_compiles_and_a_free_folder_are_not(lock, caplog, locked):
    if locked:
        lock.touch()
    warn_of_old_lock("some_op")
    assert not caplog.records


def test_deepspeeds_builders_ask_before_they_build(tmp_path):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    code = """
    import deepspeed_ds4sci
    import torch.utils.cpp_extension

    torch.utils.cpp_extension.load = lambda **settings: "built"
    from deepspeed.ops.op_builder.builder import OpBuilder
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    print(builder.load(verbose=False))
    """
    printed = run_python(code, TORCH_EXTENSIONS_DIR=tmp_path, DS_ACCELERATOR="cpu")
    assert f"waits for the lock {lock}" in printed and "built" in printed
