# SPDX-License-Identifier: Apache-2.0
"""The Python face of the compiled library, on one without kernels: which functions run, and what they are told."""

import shutil

import pytest
import torch

from deepspeed_ds4sci.ops._extension import Extension
from tests.helpers.stub_library import Record, build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the stub with")


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    return Extension(build(tmp_path_factory.mktemp("stub")))


def make_tensors(heads=2, q_len=16, k_len=24, head_dim=8):
    q, k, v = (torch.randn(1, 3, n, heads, head_dim, dtype=torch.bfloat16) for n in (q_len, k_len, k_len))
    return q, k, v, torch.randn(1, 3, 1, 1, k_len), torch.randn(1, 1, heads, q_len, k_len, dtype=torch.bfloat16)


@pytest.mark.parametrize("path", ["sm80", "sm90"])
def test_each_path_runs_its_own_kernels(stub, path):
    mine, other = Record(stub, path), Record(stub, "sm90" if path == "sm80" else "sm80")
    (forwards, backwards), before = mine.calls, other.calls
    inputs = make_tensors()
    o, lse = stub.forward(*inputs, 0.5, path=path)
    assert mine.calls == (forwards + 1, backwards)
    assert mine.params.o == o.data_ptr()
    stub.backward(o, *inputs, o, lse, 0.5, (False, False, False, False, True), path=path)
    assert mine.calls == (forwards + 1, backwards + 1)
    assert mine.params.dpair_splits == {"sm80": 1, "sm90": 2}[path]
    assert other.calls == before


def test_a_path_that_was_not_compiled_is_refused(tmp_path):
    portable = Extension(build(tmp_path, with_sm90=False))
    portable.forward(*make_tensors(), 0.5)
    with pytest.raises(RuntimeError, match=r"stub.so was compiled without the sm90 kernels: .*sm90_fwd"):
        portable.forward(*make_tensors(), 0.5, path="sm90")
