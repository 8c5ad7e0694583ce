# SPDX-License-Identifier: Apache-2.0
"""The implementations that are compared, each on its own best memory layout, one small file per project."""

from tests.benchmarks.peers.base import Call, Peer
from tests.benchmarks.peers.bionemo_ir import BIONEMO_IR
from tests.benchmarks.peers.cuequivariance import CUEQUIVARIANCE
from tests.benchmarks.peers.deepspeed import DEEPSPEED
from tests.benchmarks.peers.eager import COMPILE, EAGER
from tests.benchmarks.peers.flex import FLEX
from tests.benchmarks.peers.ours import Ours
from tests.benchmarks.peers.sdpa import SDPA
from tests.benchmarks.peers.trifast import TRIFAST

PEERS = {peer.name: peer for peer in (FLEX, SDPA, EAGER, COMPILE, TRIFAST, CUEQUIVARIANCE, BIONEMO_IR, DEEPSPEED)}

__all__ = ["PEERS", "Call", "Ours", "Peer"]
