# SPDX-License-Identifier: Apache-2.0
"""What sequences split over two GPUs are: the training of one, with half of the table on each, twice as long.

    python -m tests.benchmarks.two_gpus --json OUT.json --plot OUT.png            # two GPUs, NCCL; about 4 minutes
    python -m tests.benchmarks.two_gpus --tiny --json OUT.json --plot OUT.png     # two CPU ranks, gloo; a rehearsal
    python -m tests.benchmarks.two_gpus --redraw OUT.json --plot OUT.png          # the tables and the plot again

Runs from the root of a checkout and starts its ranks itself, with the environment as it is. Needs deepspeed,
transformers and matplotlib; on a machine without a package registry `python -m tests.benchmarks.prepare_peers`
brings them. This package may be installed or not: its hooks are imported by name. OUT.json is written anew after each
part, so that a run that is cut off leaves the parts before; a part that fails is recorded with its error, and the
exit code is 1.

| part | what it shows |
|---|---|
| equality | fp32: loss, every gradient and one SGD step against one rank, relative to the tensor's largest value |
| curves | bf16: the losses of 100 steps, two ranks (ulysses, ring) against one, with one rank in fp32 as a yardstick |
| table | fp32: bytes of the learned position table per rank: weight, gradient, optimizer state |
| longest | bf16: the longest sequence that trains, one rank and two, to 10 % |
| masks | bf16, one rank: training with an explicit mask that is built on the device or in CPU memory |
"""
