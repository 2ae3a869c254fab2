"""Caption and picture filters: rows a second, and the memory for the rows that they remember, for few and many rows.

    python benchmarks/bench_filters.py [--captions 10000 1000000] [--pictures 1000 4000] [--out FILE]

Each filter alone, in a process of its own that keeps no row. Captions are sentences of ten words, made up; pictures are
Open Clip Art's, as `load_openclipart` prepares them. Seconds are processor seconds of that process, which a busy
machine changes little; memory is the growth of the peak after the imports and, for pictures, after the first hundred.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

CAPTION_FILTERS = {
    "length": "length()", "language": "language()", "proper nouns": "proper_nouns(load_tagger())",
    "repeated": "repeated_captions()", "near copies": "near_captions()",
}
PICTURE_FILTERS = {"size": "size()", "one colour": "flat()", "repeated": "repeated_pictures()",
                   "near copies": "near_pictures()"}
WORKER = """
import json, sys, time
from itertools import islice
from pathlib import Path
import numpy as np
from clipid_utils.data.cleaning.filters import *
from clipid_utils.data.dictionary.openclipart import load_openclipart
from clipid_utils.data.cleaning.proper_nouns import load_tagger
from clipid_utils.data.report import Report
kind, made, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
words = "seekor sebuah seorang kucing anjing kuda merah biru besar kecil duduk tidur di atas meja dekat jendela".split()
words += [word + "nya" for word in words] + [word + "-" + word for word in words]
def captions():
    rng = np.random.default_rng(0)
    for start in range(0, count, 10_000):
        for row in rng.integers(0, len(words), (min(10_000, count - start), 10)):
            yield {"captions": [" ".join(words[i] for i in row)]}
def pictures():
    yield from islice(({"image": image} for image in load_openclipart()[0]["image"]), count)
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
rows, run = (captions(), filter_captions) if kind == "captions" else (pictures(), filter_pictures)
check, report = eval(made), Report()
for _ in run(islice(rows, 100), Report(), eval(made)):  # what it loads at its first row
    pass
before, start = peak(), time.process_time()
for _ in run(rows, report, check):
    pass
print(json.dumps({"seconds": time.process_time() - start, "beyond_mib": peak() - before, "read": report.read,
                  "kept": report.kept}))
"""


def measure(kind: str, made: str, count: int) -> dict:
    done = subprocess.run([sys.executable, "-c", WORKER, kind, made, str(count)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, nargs="*", default=[10_000, 1_000_000])
    parser.add_argument("--pictures", type=int, nargs="*", default=[1000, 4000])
    parser.add_argument("--out", type=Path, default=Path("build/bench/filters.json"))
    options = parser.parse_args()
    report: dict = {}
    print(f"{'filter':24}{'rows':>11}{'rows/s':>11}{'MiB more':>10}{'kept':>11}")
    for kind, filters, counts in (("captions", CAPTION_FILTERS, options.captions),
                                  ("pictures", PICTURE_FILTERS, options.pictures)):
        for name, made in filters.items():
            for count in counts:
                report[f"{kind}, {name}, {count}"] = found = measure(kind, made, count)
                print(f"{kind + ': ' + name:24}{found['read']:11,}{found['read'] / found['seconds']:11,.0f}"
                      f"{found['beyond_mib']:10.1f}{found['kept']:11,}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
