"""Top-10 of 100,000 x 512: exact search, FAISS and Milvus' embedded engine; size, filling, recall and latency.

    python benchmarks/bench_milvus.py [--size 100000] [--width 512] [--rounds 20] [--out build/bench/milvus.json]
    python benchmarks/bench_milvus.py --size 1000000 --width 128 --rounds 5
    python benchmarks/bench_milvus.py --address http://localhost:19530   # a server in place of the embedded engine

The vectors are artificial, but like those of a CLIP's pictures: all share a direction (the cone of Liang et al. 2022),
groups of about 50 share a second one, and the rest is noise; both vary less from axis to axis. Queries are made in the
same way and are not in the index. Recall is the share of the exact 10 that is found. In every round each contender
answers the same single query and the same 64 queries; the table shows medians. Every contender may use all threads of
the machine.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from clipid_utils.inference import milvus, search
from clipid_utils.inference.index import PictureIndex

K, BATCH, NAME = 10, 64, "bench"
SEED = 0


def made(count: int, width: int, groups: int, seed: int) -> np.ndarray:
    """Unit vectors [count, width] like the embeddings of pictures; the groups are the same for every seed."""
    shared, rng = np.random.default_rng(SEED), np.random.default_rng([SEED, seed])
    spread = 1 / np.sqrt(1 + np.arange(width) / 16)  # of each axis: the first ones matter most
    cone, centres = shared.normal(size=width), shared.normal(size=(groups, width))
    vectors = np.empty((count, width), np.float32)
    for start in range(0, count, 65536):
        part = vectors[start : start + 65536]
        part[:] = 0.8 * cone + (centres[rng.integers(0, groups, len(part))] + rng.normal(size=part.shape)) * spread
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def fill_faiss(index: faiss.Index, vectors: np.ndarray) -> faiss.Index:
    if not index.is_trained:
        index.train(vectors[:: max(1, len(vectors) // (64 * index.nlist))])  # FAISS asks for 39 to 256 for each list
    index.add(vectors)
    return index


def faiss_contenders(vectors: np.ndarray) -> dict[str, Callable[[], faiss.Index]]:
    width, lists = vectors.shape[1], max(1, int(4 * len(vectors) ** 0.5))

    def hnsw() -> faiss.Index:
        index = faiss.IndexHNSWFlat(width, 16, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 200, 64
        return index

    def ivf_pq() -> faiss.Index:
        index = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, lists, width // 8, 8, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = 32
        return index

    return {"faiss flat": lambda: faiss.IndexFlatIP(width), "faiss HNSW": hnsw, "faiss IVF-PQ": ivf_pq}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def recall(rows: np.ndarray, exact: np.ndarray) -> float:
    return round(float(np.mean([np.isin(one, other).mean() for one, other in zip(rows, exact, strict=True)])), 4)


def latencies(finders: dict[str, search.Find], queries: np.ndarray, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds for each query, alone and among `BATCH`; each first call is not counted."""
    times = {name: {"alone": [], "batch": []} for name in finders}
    for turn in range(rounds + 1):
        batch = np.roll(queries, -turn, axis=0)[:BATCH]
        for name, find in finders.items():
            for way, asked in (("alone", batch[:1]), ("batch", batch)):
                start = time.perf_counter()
                find(asked, K)
                if turn:
                    times[name][way].append(1000 * (time.perf_counter() - start) / len(asked))
    return {name: {way: round(float(np.median(values)), 3) for way, values in ways.items()}
            for name, ways in times.items()}


def measure(size: int, width: int, rounds: int, address: str | None, folder: Path) -> dict[str, dict]:
    groups = max(1, size // 50)
    vectors, queries = made(size, width, groups, 1), made(200, width, groups, 2)
    keys, labels = [str(row) for row in range(size)], [f"group {row % 100}" for row in range(size)]
    index = PictureIndex(vectors, keys, labels, "made")
    exact = search.top_k(vectors, queries, K)[1]
    finders: dict[str, search.Find] = {"exact (top_k)": lambda asked, k: search.top_k(vectors, asked, k)}
    found = {"exact (top_k)": {"bytes": vectors.nbytes, "fill_seconds": 0.0}}
    for name, make in faiss_contenders(vectors).items():
        start = time.perf_counter()
        filled = fill_faiss(make(), vectors)
        seconds = round(time.perf_counter() - start, 1)
        found[name] = {"fill_seconds": seconds, "bytes": len(faiss.serialize_index(filled))}
        finders[name] = filled.search
    name = "Milvus (server)" if address else "Milvus (embedded)"
    with milvus.Milvus(address or folder / "bench.db") as database:
        start = time.perf_counter()
        database.fill(NAME, index, progress=False)
        found[name] = {"fill_seconds": round(time.perf_counter() - start, 1),
                       "bytes": None if address else folder_bytes(folder)}
        finders[name] = database.finder(NAME, index)
        finders[f"{name}, 1 label of 100"] = database.finder(NAME, index, label="group 7")
        found[f"{name}, 1 label of 100"] = {}
        for which, find in finders.items():
            kept = np.arange(7, size, 100) if "label" in which else np.arange(size)
            truth = exact if len(kept) == size else kept[search.top_k(vectors[kept], queries, K)[1]]
            found[which]["recall"] = recall(find(queries, K)[1], truth)
        for which, milliseconds in latencies(finders, queries, rounds).items():
            found[which]["milliseconds"] = milliseconds
        if address:
            database.client.drop_collection(NAME)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 100_000), ("width", 512), ("rounds", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--address", help="of a Milvus server")
    parser.add_argument("--out", type=Path, default=Path("build/bench/milvus.json"))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-milvus-"))
    try:
        found = measure(options.size, options.width, options.rounds, options.address, folder)
    finally:
        shutil.rmtree(folder)
    print(f"top-{K} of {options.size:,} x {options.width}; milliseconds for each query, alone and among {BATCH}")
    print(f"{'':34}{'MB':>8}{'fill s':>9}{'recall':>9}{'alone':>9}{'batch':>9}")
    for name, row in found.items():
        size = f"{row['bytes'] / 1e6:.0f}" if row.get("bytes") else ""
        times = row["milliseconds"]
        print(f"{name:34}{size:>8}{row.get('fill_seconds', ''):>9}{row['recall']:>9.3f}"
              f"{times['alone']:>9.2f}{times['batch']:>9.2f}")
    report = {"size": options.size, "width": options.width, "k": K, "rounds": options.rounds, "batch": BATCH,
              "cores": os.cpu_count(), "contenders": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
