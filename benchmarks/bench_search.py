"""Exact top-10 of 25,000 x 512 in turns: `clipid_utils.inference.search.top_k` against faiss and other ways.

    python benchmarks/bench_search.py [--size 25000] [--width 512] [--rounds 30] [--out build/bench/search.json]

"In turns" means that every round times each contender once, so that a busy machine slows all of them alike. The table
shows medians. Each contender may use all threads of the machine.
"""

import argparse
import json
import os
import time
from pathlib import Path

import faiss
import jax
import numpy as np

from clipid_utils.inference import search


def argpartition(embeds: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The plain NumPy way: a product, an argpartition, and a sort of k."""
    scores = queries @ embeds.T
    rows = np.argpartition(scores, len(embeds) - k, axis=1)[:, len(embeds) - k :]
    scores = np.take_along_axis(scores, rows, axis=1)
    order = np.argsort(-scores, axis=1)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def contenders(embeds: np.ndarray, k: int) -> dict:
    on_device = jax.device_put(embeds)
    compiled = jax.jit(lambda queries, embeds: jax.lax.top_k(queries @ embeds.T, k))
    flat = faiss.IndexFlatIP(embeds.shape[1])
    flat.add(embeds)
    return {
        "search.top_k": lambda queries: search.top_k(embeds, queries, k),
        "faiss IndexFlatIP": lambda queries: flat.search(queries, k),
        "numpy argpartition": lambda queries: argpartition(embeds, queries, k),
        "jax.lax.top_k": lambda queries: [np.asarray(part) for part in compiled(queries, on_device)],
    }


def measure(functions: dict, queries: np.ndarray, rounds: int) -> dict[str, float]:
    """Median milliseconds of each function over the rounds; its first call is not counted."""
    expected = functions["faiss IndexFlatIP"](queries)[1]
    for name, function in functions.items():
        np.testing.assert_array_equal(function(queries)[1], expected, err_msg=name)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function(queries)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(float(np.median(values)), 2) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 25000), ("width", 512), ("k", 10), ("rounds", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("build/bench/search.json"))
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(options.size, options.width)).astype(np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    functions = contenders(embeds, options.k)
    results = {}
    for count in (1, 64):
        queries = rng.normal(size=(count, options.width)).astype(np.float32)
        results[f"nq={count}"] = measure(functions, queries, options.rounds)
    print(f"top-{options.k} of {options.size:,} x {options.width}, median ms of {options.rounds} rounds")
    print(f"{'':20}" + "".join(f"{count:>10}" for count in results))
    for name in functions:
        print(f"{name:20}" + "".join(f"{times[name]:10.2f}" for times in results.values()))
    report = {
        "size": options.size, "width": options.width, "k": options.k, "rounds": options.rounds,
        "cores": os.cpu_count(), "device": jax.devices()[0].device_kind, "milliseconds": results,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
