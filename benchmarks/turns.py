"""Two libraries in turns, each in a process of its own, so that their threads and memory do not disturb each other.

A benchmark names its sides, functions that build what is timed and return a function of one run; its script, called
with `--worker SIDE NAME`, becomes the process of one side.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def resident(*_) -> int:
    """The most bytes of the host's memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(run: Callable[[], None], times: int, peak: Callable[[], int] = resident) -> None:
    """Answers each line on standard input with the median seconds of a run, and with the bytes that `peak` finds; the
    first runs are not timed."""
    for _ in range(3):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": statistics.median(seconds), "peak_mib": round(peak() / 2**20)}), flush=True)


def compare(script: str, name: str, examples: int, rounds: int, sides: tuple[str, ...]) -> dict:
    """Runs the sides in turns; examples per second of each round, their medians, and the first's through the last's."""
    # Huge pages for both: without, XLA spends much of a step in page faults (model/ops.py). Nothing that trims, which
    # the Makefile sets for notebooks: torch takes and gives back far more buffers and would be slowed by it.
    # On a GPU JAX would take three quarters of its memory at once, which the other side then lacks.
    environment = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "TOKENIZERS_PARALLELISM": "false",
                   "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    processes = {
        side: subprocess.Popen(
            [sys.executable, script, "--worker", side, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment,
        )
        for side in sides
    }
    result = {side: {"examples_per_second": [], "peak_mib": 0} for side in sides}
    try:
        for side, process in processes.items():
            if process.stdout.readline().strip() != "ready":
                raise SystemExit(f"{script}: the side {side!r} did not start; try --worker {side} {name} to see why")
        for _ in range(rounds):
            for side, process in processes.items():
                process.stdin.write("\n")
                process.stdin.flush()
                answer = process.stdout.readline()
                if not answer:
                    raise SystemExit(f"{script}: the side {side!r} ended; try --worker {side} {name} and press Enter")
                answer = json.loads(answer)
                result[side]["examples_per_second"].append(round(examples / answer["seconds"], 2))
                result[side]["peak_mib"] = answer["peak_mib"]
    finally:
        for process in processes.values():
            process.kill()
    medians = {side: statistics.median(values["examples_per_second"]) for side, values in result.items()}
    return {**result, "ratio": round(medians[sides[0]] / medians[sides[-1]], 3), "median": medians}


def main(
    script: str, doc: str, sizes: dict, build: dict[str, Callable], out: str, *, on_gpu: dict | None = None,
    peak: Callable[[str, str], int] = resident, finish: Callable[[dict], None] = lambda report: None,
) -> dict | None:
    """The command line of a benchmark; `sizes` gives examples a run and timed runs a round, `build` the sides, and
    `peak(side, size)` the bytes of memory that are reported. `on_gpu` are the sizes that `--gpu` has in their place.

    The last side is the one that the others are compared with. `finish` is given `report[size][side]`, what `compare`
    found of that side and the last one, and may add to it before it is written. Returns it; None in a side's process.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "SIZE"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    if on_gpu:
        parser.add_argument("--gpu", action="store_true", help=f"measure {', '.join(on_gpu)}")
    every, (*others, last) = sizes | (on_gpu or {}), build
    parser.add_argument("--sizes", nargs="+", choices=every)
    parser.add_argument("--sides", nargs="+", choices=others, default=others, help=f"beside {last}")
    parser.add_argument("--out", type=Path, default=Path(out))
    options = parser.parse_args()
    if options.worker:
        side, size = options.worker
        return worker(build[side](size), every[size][1], lambda: peak(side, size))
    sizes, report = on_gpu if on_gpu and options.gpu else sizes, {}
    if unknown := set(options.sizes or ()) - set(sizes):
        where = "with" if options.gpu else "without"
        parser.error(f"no size {', '.join(sorted(unknown))} {where} --gpu: there are {', '.join(sizes)}")
    for size in options.sizes or sizes:
        report[size] = {}
        print(f"{size}, {sizes[size][0]} a run")
        for side in options.sides:  # two at a time: more would not fit into the memory of a small machine
            report[size][side] = found = compare(script, size, sizes[size][0], options.rounds, (side, last))
            columns = [f"{name:14} {rate:9.2f}/s {found[name]['peak_mib']:7} MiB"
                       for name, rate in found["median"].items()]
            print("  " + "     ".join(columns) + f"     {found['ratio']:6.2f}", flush=True)
    finish(report)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return report
