"""Retrieval in both directions, scored by the suite's blocks and by rows of the whole matrix: seconds and memory.

    python benchmarks/bench_retrieval.py [--sizes 5000 25000] [--out build/bench/retrieval.json]

The vectors are random, of 512 numbers, with five texts for each picture: 25,000 pictures have 125,000 texts. `blocks`
is `evaluation.scoring.ranks_both_ways`. `rows` is the naive way that still fits into memory: a thousand rows of
similarities at a time, with `metrics.ranks`, first of texts, then of pictures. Each runs in a new process.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

RUN = """
import json, resource, sys, time
import numpy as np
from scipy.sparse import csr_array
from clipid_utils.evaluation.scoring import ranks_both_ways
from clipid_utils.metrics import ranks
way, count = sys.argv[1], int(sys.argv[2])
rng = np.random.default_rng(0)
pictures, texts = (rng.standard_normal((n, 512), np.float32) for n in (count, 5 * count))
texts += np.repeat(pictures, 5, axis=0)
for array in (pictures, texts):
    array /= np.linalg.norm(array, axis=1, keepdims=True)
owners = np.repeat(np.arange(count), 5)
positives = csr_array((np.ones(len(owners), bool), owners, np.arange(len(owners) + 1)), shape=(len(owners), count))
def rows(left, right, positives, size=1000):
    return np.concatenate([ranks(left[start : start + size] @ right.T, positives[start : start + size].toarray())
                           for start in range(0, len(left), size)])
start = time.perf_counter()
if way == "blocks":
    found = ranks_both_ways(texts, pictures, positives)
else:
    found = rows(texts, pictures, positives), rows(pictures, texts, positives.T.tocsr())
hits = [int((rank == 0).sum()) for rank in found]
print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "hits": hits,
                  "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[5_000, 25_000], help="numbers of pictures")
    parser.add_argument("--out", type=Path, default=Path("build/bench/retrieval.json"))
    options, report = parser.parse_args(), {}
    for size in options.sizes:
        found = {way: json.loads(subprocess.run([sys.executable, "-c", RUN, way, str(size)], check=True,
                                                capture_output=True, text=True).stdout) for way in ("blocks", "rows")}
        assert found["blocks"]["hits"] == found["rows"]["hits"], found
        report[size] = found
        print(f"{size:,} pictures, {5 * size:,} texts: " + ", ".join(
            f"{way} {one['seconds']} s, {one['peak_mib']} MiB" for way, one in found.items()), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
