# SPDX-License-Identifier: Apache-2.0
"""How long a sequence trains, option by option: complete steps, optimizer included, on one GPU (or two).

    python -m tests.benchmarks.longest_sequence --json out.json --plot out.png --budget-seconds 500
    python -m tests.benchmarks.longest_sequence --rungs host-optimizer --lengths 327680
    python -m tests.benchmarks.longest_sequence --rungs host-optimizer --lengths 524288 --compute-layers 8
    python -m tests.benchmarks.longest_sequence --redraw a.json,b.json --plot ladder.png
    python -m tests.benchmarks.longest_sequence --tiny

Each rung is one DeepSpeed JSON (`--show` prints them) in processes of its own. The most valuable rungs come first, and
the record is written after each, so a run that is cut off has them. The model is our 2.5B decoder (hidden 3840, 28
layers, 32 heads); DeepSpeed's own path runs on a Llama of the same size. Host memory is the largest drop of what the
machine has available, so nothing else should run there; with `--beside-others` it is the process's own.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.climb import Climb
from tests.benchmarks.long_sequence import report
from tests.benchmarks.long_sequence.launch import START_SECONDS, longest_repeated, run_cases
from tests.benchmarks.long_sequence.models import counted_config, job_of
from tests.benchmarks.long_sequence.rungs import ATTENTION, RUNGS, Rung, chosen_rungs, with_attention
from tests.benchmarks.record import machine_line

MODULE = "tests.benchmarks.longest_sequence"


class Prober:
    """Trains a rung at given lengths or those of a search, and remembers every case."""

    def __init__(self, rung: Rung, options: argparse.Namespace, deadline: float):
        self.rung, self.options, self.deadline = rung, options, deadline
        self.cases: dict[int, dict] = {}
        self.ended: str | None = None
        """Of a search, why it ended: "resolution" (of the lengths), "limit", "start" (its processes died before they
        tried a length), "failed" (not for want of memory or time) or "budget"."""

    @property
    def longest(self) -> int:
        """0 while nothing has worked."""
        return max((length for length, case in self.cases.items() if case["status"] == "ok"), default=0)

    @property
    def failed(self) -> int | None:
        """The shortest that did not work."""
        return min((length for length, case in self.cases.items() if case["status"] != "ok"), default=None)

    def search(self) -> None:
        """Until the longest is known to the resolution, the limit works, or there is no time.

        Each process climbs until it fails; the next goes on between.
        """
        while self.ended is None:
            climb = self.climb()
            if climb.next_length() is None:
                self.ended = "resolution" if climb.failed else "limit"
                return
            before = len(self.cases)
            fields = dataclasses.asdict(climb)
            del fields["capacity"]  # which its processes know
            self.run([], climb=fields | {"peaks": list(climb.peaks.items())})
            if any(case["status"] == "failed" for case in self.cases.values()):
                self.ended = self.ended or "failed"
            elif len(self.cases) == before:
                self.ended = self.ended or "budget"

    def climb(self) -> Climb:
        """The search as far as it has come."""
        return Climb(
            start=min(self.start, self.limit),
            multiple=self.options.multiple,
            limit=self.limit,
            capacity=0,
            peaks={n: int(case["device_gib"] * 2**30) for n, case in self.cases.items() if case["status"] == "ok"},
            failed=self.failed,
            precision=1 + self.options.resolution,
        )

    @property
    def start(self) -> int:
        return self.options.guess or self.rung.guess

    @property
    def limit(self) -> int:
        """A learned position table has a row for each token of the longest sequence, all there from the start."""
        if self.rung.positions == "learned":
            return min(self.options.limit, 2 * max(self.start, self.rung.guess))
        return self.options.limit

    def run(self, lengths: list[int], climb: dict | None = None) -> None:
        left = self.deadline - time.monotonic()
        if left < 1:
            return
        options = self.options
        job = job_of(
            self.rung,
            [(1, length) for length in lengths],
            tiny=options.tiny,
            compute_layers=options.compute_layers,
            steps=options.steps,
            repeat_under=options.repeat_under,
            beside_others=options.beside_others,
            device_gib=options.device_gib,
            climb=climb,
        )
        trying = ", ".join(f"{length:,}" for length in lengths)
        if climb:
            between = f" and below {climb['failed']:,}" if climb["failed"] else ""
            trying = f"above {self.longest:,}{between}" if self.cases else f"{climb['start']:,} and on"
        print(f"{self.rung.name}: trying {trying}", flush=True)
        found = run_cases(
            job,
            ranks=self.rung.gpus,
            seconds=left if climb else min(left, START_SECONDS + options.probe_seconds * len(lengths)),
            tiny=options.tiny,
            case_seconds=options.probe_seconds,
        )
        for case in found:
            if case["status"] == "time" and time.monotonic() >= self.deadline:
                continue  # the budget's end says nothing about this length
            case.pop("event")
            if climb and case.get("starting"):
                # Those of the next process would die as well, whatever length they are to try.
                self.ended = "start"
                if self.cases:  # others have started: nothing is known about this length
                    print(f"  the processes did not start: {describe(case)}", flush=True)
                    continue
            if self.cases.get(case["length"], case)["status"] != "ok" or case["status"] == "ok":
                self.cases[case["length"]] = case
            print("  " + describe(case), flush=True)


def describe(case: dict) -> str:
    text = f"{case['length']:,} tokens: {case['status']}"
    if case["status"] == "ok":
        steps = ", ".join(f"{seconds:.3g}" for seconds in case["step_seconds"])
        text += f", steps of {steps} s, {case['device_gib']:.1f} GiB on device, {case['host_gib']:.1f} on host"
    return text + (f"\n{case['failure']}" if "failure" in case else "")


def measure_rung(rung: Rung, options: argparse.Namespace, deadline: float, peak: float) -> dict:
    """A rung's entry of the record."""
    prober = Prober(rung, options, deadline)
    if options.lengths:
        prober.run(options.lengths)
    else:
        prober.search()
    good, bad = prober.longest, prober.failed
    config = counted_config(rung, options.tiny, options.compute_layers)
    return {
        "name": rung.name,
        "ladder": rung.ladder,
        "says": rung.says,
        "gpus": rung.gpus,
        "computed_layers": options.compute_layers,
        "longest": good,
        "failed": bad,
        "because": prober.cases[bad]["status"] if bad else None,
        "resolved": prober.climb().resolved,
        "ended": prober.ended,
        "ds_config": rung.ds_config(options.tiny),
        "cases": [report.with_rates(case, config, rung.gpus, peak) for _, case in sorted(prober.cases.items())],
    }


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rungs", default="all", help=f"all, ladders (mask, flash, alst) or names: {', '.join(RUNGS)}")
    add("--lengths", help="tokens, ascending, separated by commas: these alone, no search")
    add("--guess", type=int, help="tokens to start every search from, in place of the rungs' own")
    add(
        "--compute-layers", type=int, help="compute so many layers; the others' weights, states, checkpoints are there"
    )
    add("--attention", choices=ATTENTION, help='in place of "fastest"')
    add("--budget-seconds", type=float, default=3600, help="for the whole run; it then writes what it has")
    add("--probe-seconds", type=float, default=300, help="for one length; longer counts as failed, because of time")
    add("--resolution", type=float, default=0.1, help="gap at which a search ends, relative to the longest that works")
    add("--multiple", type=int, default=1024, help="lengths are multiples of this")
    add("--limit", type=int, default=2**23, help="no longer length is tried")
    add("--steps", type=int, default=2, help="per length; the last is timed")
    add("--repeat-under", type=float, help="a step of more seconds is timed as it is; default: by --probe-seconds")
    add("--beside-others", action="store_true", help="count the process's resident memory: other programs run here")
    add("--device-gib", type=float, help="use no more of each GPU, as if it were a smaller one, such as 79.2")
    add("--json", type=Path, help="where the record goes")
    add("--plot", type=Path, help="where the picture goes")
    add("--redraw", help="records, separated by commas: their rungs as one plot, nothing is run")
    add("--show", action="store_true", help="print the rungs' DeepSpeed configs and stop")
    add("--tiny", action="store_true", help="rehearsal on CPU ranks with a model of 200,000 parameters")
    options = parser.parse_args(argv)
    if options.redraw:
        if not options.plot:
            parser.error("--redraw needs --plot")
        return options
    if options.tiny:
        options.multiple = 32
        options.limit = min(options.limit, 256)
        options.guess = options.guess or 64
    if options.repeat_under is None:
        options.repeat_under = longest_repeated(options.probe_seconds, options.steps)
    options.lengths = [int(length) for length in options.lengths.split(",")] if options.lengths else None
    gpus = 2 if options.tiny else torch.cuda.device_count()
    if not gpus:
        parser.error("no GPU was found; --tiny rehearses on CPU ranks")
    try:
        options.rungs = chosen_rungs(options.rungs, gpus)
        if options.beside_others and any(rung.gpus > 1 for rung in options.rungs):
            raise ValueError("--beside-others counts one process; the rungs have some on several GPUs")
        if options.compute_layers is not None:
            for rung in options.rungs:
                job_of(rung, [(1, 1024)], tiny=options.tiny, compute_layers=options.compute_layers)
        if options.attention:
            options.rungs = [with_attention(rung, options.attention) for rung in options.rungs]
    except (ValueError, NotImplementedError) as error:
        parser.error(str(error))
    return options


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse_arguments(argv)
    if options.redraw:
        records = [json.loads(Path(path).read_text()) for path in options.redraw.split(",")]
        report.draw_ladder(report.together(records), options.plot)
        return 0
    if options.show:
        print(json.dumps({rung.name: rung.ds_config(options.tiny) for rung in options.rungs}, indent=1))
        return 0
    deadline = time.monotonic() + options.budget_seconds
    record = {"machine": report.about(MODULE, argv), "tiny": options.tiny, "rungs": [], "not_reached": []}
    for rung in options.rungs:
        if time.monotonic() > deadline - 1:
            record["not_reached"].append(rung.name)
            continue
        record["rungs"].append(measure_rung(rung, options, deadline, record["machine"]["peak_flops"]))
        if options.json:
            report.write(options.json, record)
    print(f"\n{machine_line(record['machine'])}\n{report.ladder_table(record)}")
    if record["not_reached"]:
        print(f"no time was left for: {', '.join(record['not_reached'])}")
    if options.json:
        report.write(options.json, record)
    if options.plot and record["rungs"]:
        report.draw_ladder(record, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
