"""The benchmarks, one after the other: `make bench` runs all, `--record` keeps their figures in the repository.

    python benchmarks/run.py                       # all; figures also go to build/bench/*.json
    python benchmarks/run.py translate cache       # some
    python benchmarks/run.py translate --record    # and into data/benchmarks.json, beside the figures of the others
    python benchmarks/run.py translate --rounds 2  # with an option of its own
    python benchmarks/run.py step --gpu --record --name step_h100  # beside the record of a different machine
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
RECORD = HERE.parent / "data" / "benchmarks.json"
LIBRARIES = ("jax", "flax", "numpy", "torch", "transformers", "ctranslate2", "grain", "pillow", "faiss-cpu",
             "milvus-lite")
SCRIPTS = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}


def processor() -> str:
    """The name of the CPU, as the machine reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def gpu() -> str | None:
    """The GPU's name, as its driver reports it, if there is one."""
    try:
        return subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True,
                              text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # no benchmark that ran here needs it
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SCRIPTS)}; all without one")
    parser.add_argument("--record", action="store_true", help=f"keep the figures in {RECORD.name}")
    parser.add_argument("--name", help="of the record; the benchmark's own without it")
    options, more = parser.parse_known_args()  # unknown options go to the benchmark
    if options.name and len(options.names) != 1:
        parser.error("--name is for one benchmark's record")
    if options.record and "--gpu" in more and not options.name:
        parser.error("--gpu --record needs --name, or the record of the processor would be lost")
    if unknown := set(options.names) - set(SCRIPTS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join(SCRIPTS)}")
    for name in options.names or SCRIPTS:
        print(f"\n{SCRIPTS[name].name}", flush=True)
        out, started = Path(f"build/bench/{name}.json"), time.time()
        subprocess.run([sys.executable, str(SCRIPTS[name]), "--out", str(out), *more], check=True)
        if options.record:
            record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
            card = {"gpu": gpu()} if "--gpu" in more else {}
            record[options.name or name] = {
                **card, "processor": processor(), "cores": len(os.sched_getaffinity(0)),
                "python": platform.python_version(), "versions": versions(),
                "minutes": round((time.time() - started) / 60, 1),
                "figures": json.loads(out.read_text(encoding="utf-8")),
            }
            text = json.dumps(dict(sorted(record.items())), indent=1, ensure_ascii=False)
            RECORD.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
