# SPDX-License-Identifier: Apache-2.0
"""Models that fit on no single rank are made in parts: the same weights, and the same training."""

import pytest

from tests.distributed import zero_init_worker
from tests.helpers.distributed import run_distributed


@pytest.mark.distributed(2)
def test_a_decoder_made_in_parts_is_the_one_made_whole():
    for difference, deviation, share, whole, parts in run_distributed(zero_init_worker.both, 2):
        assert difference == 0 and deviation > 0.005
        assert share == pytest.approx(0.5, abs=0.02)
        assert parts == pytest.approx(whole, rel=1e-6) and len(set(parts)) == 3
