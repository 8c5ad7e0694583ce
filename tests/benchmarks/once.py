# SPDX-License-Identifier: Apache-2.0
"""Runs one implementation on one shape a few times and stops: the program to put under a profiler.

ncu --clock-control none -k regex:evoformer --launch-skip 5 python -m tests.benchmarks.once triangle-512
"""

import argparse

import torch

from tests.benchmarks.__main__ import chosen_shapes
from tests.benchmarks.case import DTYPES, Case, make_inputs, with_samples_as_rows
from tests.benchmarks.measure import PASSES
from tests.benchmarks.peers import PEERS, Ours
from tests.benchmarks.verify import run_once


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help="name in tests/helpers/shapes.py")
    parser.add_argument("--impl", default=None, help="implementation of ours (default: the one picked by itself)")
    parser.add_argument("--peer", choices=PEERS, help="run this peer in place of ours")
    parser.add_argument("--pass", dest="which", choices=PASSES, default="fwd+bwd")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--mask", choices=("random", "none"), default="random")
    parser.add_argument("--runs", type=int, default=2, help="the first warms up")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    case = Case.of(chosen_shapes(options.shape)[0], options.dtype, options.mask, pair_grad=True)
    peer = PEERS[options.peer] if options.peer else Ours(options.impl)
    inputs = make_inputs(case, torch.device(options.device))
    call = peer.bind(*((case, inputs) if peer.shares_pair_bias else with_samples_as_rows(case, inputs)))
    for _ in range(options.runs):
        run_once(call, options.which == "fwd+bwd")
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"{peer.name} ran {options.which} on {case.name} {options.runs} times")


if __name__ == "__main__":
    main()
