"""Retrieval and classification figures with intervals: arrays in, numbers out. NumPy only.

The file is based on one idea: the rank of the best positive. A query is a row of similarities to N candidates; its rank
is the number of wrong candidates that score at least as high as its best right one, so rank 0 is a hit at 1. Recall@K
and MRR@K are then one line each. Both accept several right answers for one query (two pictures of one concept, five
captions of one picture), because a person who searches needs one right answer among the first K.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

CHUNK_BYTES = 64 * 2**20  # of similarities that are compared together: more would only need more memory


def ranks(similarity: Num[np.ndarray, "Q N"], positives: Bool[np.ndarray, "Q N"]) -> Int[np.ndarray, " Q"]:
    """Rank (0 = first) of each query's best positive; a wrong candidate with the same similarity counts as before it.

    Ties count against the model, because one that gives everything the same similarity must not score 1. Raises
    ValueError for a NaN, for shapes that differ and for a query without a positive. It takes some rows at a time, so
    `similarity` and `positives` may be memory maps.
    """
    similarity, positives = np.asarray(similarity), np.asarray(positives)
    if similarity.ndim != 2 or similarity.shape != positives.shape:
        raise ValueError("similarity and positives must be two matrices [queries, candidates] of one shape, "
                         f"not {similarity.shape} and {positives.shape}; transpose both for the other direction")
    if not similarity.size:
        raise ValueError(f"nothing to rank: similarity has shape {similarity.shape}")
    if positives.dtype != np.bool_:
        raise TypeError(f"positives must be boolean (True where the candidate is right), not {positives.dtype}")
    queries, candidates = similarity.shape
    rows = max(1, CHUNK_BYTES // (candidates * max(similarity.itemsize, 4)))
    found = np.empty(queries, np.int64)
    for start in range(0, queries, rows):
        scores, right = similarity[start : start + rows], positives[start : start + rows]
        if not right.any(axis=1).all():
            query = start + int(np.argmin(right.any(axis=1)))
            raise ValueError(f"query {query} has no positive among {candidates} candidates; leave it out or add one")
        scores = scores if np.issubdtype(scores.dtype, np.inexact) else scores.astype(np.float64)
        if np.isnan(scores).any():
            query = start + int(np.argmax(np.isnan(scores).any(axis=1)))
            raise ValueError(f"query {query} has a NaN similarity; look for a NaN in the embeddings or the parameters")
        best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
        found[start : start + rows] = ((scores >= best) & ~right).sum(axis=1)
    return found


def recall_at_k(
    similarity: Num[np.ndarray, "Q N"], positives: Bool[np.ndarray, "Q N"], ks: Sequence[int] = (1, 5, 10)
) -> dict[int, float]:
    """Share of the queries with a positive among the first K candidates, for each K: `{1: 0.41, 5: …}`.

    For text to picture the rows are texts; for picture to text pass `similarity.T, positives.T`. Raises the errors of
    `ranks`.
    """
    return {k: float(np.mean(hits_at_k(ranks(similarity, positives), k))) for k in ks}


def hits_at_k(rank: Int[np.ndarray, " Q"], k: int) -> Float[np.ndarray, " Q"]:
    """1.0 where the rank (0 = first) is below K, else 0.0; the mean of these is Recall@K or top-k accuracy."""
    return (np.asarray(rank) < k).astype(np.float64)


def reciprocal_at_k(rank: Int[np.ndarray, " Q"], k: int) -> Float[np.ndarray, " Q"]:
    """1 / (rank + 1) where the rank (0 = first) is below K, else 0.0; the mean of these is MRR@K.

    clip-italian reports it for MSCOCO-IT (Bianchi et al. 2021, arXiv 2108.08688). MRR@1 equals Recall@1.
    """
    return hits_at_k(rank, k) / (np.asarray(rank) + 1.0)


def label_ranks(scores: Num[np.ndarray, "N C"], labels: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """Rank (0 = first) of each item's own class. Raises ValueError for a label without a column, a NaN, or no items."""
    return ranks(scores, np.asarray(labels)[:, None] == np.arange(np.shape(scores)[1]))


def bootstrap_interval(
    per_item: Shaped[np.ndarray, "Q ..."], statistic: Callable[[np.ndarray], float] = np.mean, samples: int = 2000,
    seed: int = 0, clusters: Sequence[object] | None = None,
) -> tuple[float, float]:
    """95% percentile bootstrap interval (Efron 1979) of a statistic: items are drawn with replacement, `samples` times.

    `per_item` has one row for each query (for Recall@K: 0 or 1, see `hits_at_k`). To compare two models on the same
    queries, resample the differences. Queries that are not independent, such as pictures of one concept, get the same
    key in `clusters`: whole clusters are then drawn (Davison and Hinkley 1997, 3.8). The same seed gives the same
    interval. Raises ValueError for no items, a NaN, or a number of clusters that is not the number of items.
    """
    per_item = np.asarray(per_item)
    if not len(per_item):
        raise ValueError("no items to resample")
    if np.issubdtype(per_item.dtype, np.inexact) and np.isnan(per_item).any():
        raise ValueError("per_item has a NaN: leave the item out, or find out where the NaN comes from")
    if statistic is np.mean and per_item.ndim == 1:
        ((low, high),) = _mean_intervals(per_item[:, None].astype(np.float64), samples, seed, clusters)
        return float(low), float(high)
    numbers = _clusters(len(per_item), clusters)
    items, sizes = np.argsort(numbers, kind="stable"), np.bincount(numbers)  # the items, cluster by cluster
    starts, rng = np.cumsum(sizes) - sizes, np.random.default_rng(seed)

    def draw() -> np.ndarray:
        chosen = rng.integers(len(sizes), size=len(sizes))
        within = np.arange(sizes[chosen].sum()) - np.repeat(np.cumsum(sizes[chosen]) - sizes[chosen], sizes[chosen])
        return items[np.repeat(starts[chosen], sizes[chosen]) + within]

    drawn = [statistic(per_item[draw()]) for _ in range(samples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _clusters(count: int, clusters: Sequence[object] | None) -> Int[np.ndarray, " Q"]:
    """The number of each item's cluster. Raises ValueError for a number of clusters that is not `count`."""
    numbers = np.arange(count) if clusters is None else _numbered(clusters, {})
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} clusters for {count} items: give each item the key of its own")
    return numbers


def _mean_intervals(
    per_item: Float[np.ndarray, "Q M"], samples: int, seed: int, clusters: Sequence[object] | None
) -> Float[np.ndarray, "M 2"]:
    """`bootstrap_interval` of the mean of each column, from the same draws: a sample needs only its clusters' sums."""
    numbers = _clusters(len(per_item), clusters)
    sizes = np.bincount(numbers)
    totals = np.stack([*(np.bincount(numbers, column) for column in per_item.T), sizes], axis=1)  # [C, M + 1]
    rng, drawn = np.random.default_rng(seed), np.empty((samples, totals.shape[1]))
    for sample in drawn:
        chosen = rng.integers(len(sizes), size=len(sizes))
        sample[:] = np.bincount(chosen, minlength=len(sizes)) @ totals
    return np.quantile(drawn[:, :-1] / drawn[:, -1:], [0.025, 0.975], axis=0).T


def with_intervals(
    per_item: dict[str, Shaped[np.ndarray, " Q"]], seed: int = 0, clusters: Sequence[object] | None = None
) -> dict[str, dict[str, float]]:
    """The mean of each array and its 95% bootstrap interval: `{"R@1": {"value", "low", "high"}, …}`."""
    for name, values in per_item.items():
        if not len(values) or np.isnan(np.asarray(values, np.float64)).any():
            raise ValueError(f"{name} has no items, or a NaN: leave the item out, or find out where the NaN comes from")
    columns = np.stack([np.asarray(values, np.float64) for values in per_item.values()], axis=1)
    bounds = _mean_intervals(columns, 2000, seed, clusters)
    return {name: {"value": float(column.mean()), "low": float(low), "high": float(high)}
            for name, column, (low, high) in zip(per_item, columns.T, bounds, strict=True)}


def with_interval(
    per_item: Float[np.ndarray, " Q"], seed: int = 0, clusters: Sequence[object] | None = None
) -> dict[str, float]:
    """Mean and 95% bootstrap interval, as in `metrics.json`: `{"value", "low", "high"}`."""
    return with_intervals({"per_item": per_item}, seed, clusters)["per_item"]


def rank_figures(rank: Int[np.ndarray, " Q"]) -> dict[str, Float[np.ndarray, " Q"]]:
    """The figures of each query, whose means are Recall@1, 5 and 10 and MRR@10."""
    return {**{f"R@{k}": hits_at_k(rank, k) for k in (1, 5, 10)}, "MRR@10": reciprocal_at_k(rank, 10)}


def retrieval_summary(
    similarity: Num[np.ndarray, "Q N"], positives: Bool[np.ndarray, "Q N"], seed: int = 0,
    clusters: Sequence[object] | None = None,
) -> dict[str, dict[str, float] | int]:
    """One direction in full: `{"R@1": {"value", "low", "high"}, "R@5", "R@10", "MRR@10", "queries", "candidates"}`.

    `clusters` are the queries' (see `bootstrap_interval`).
    """
    summary: dict = with_intervals(rank_figures(ranks(similarity, positives)), seed, clusters)
    return summary | {"queries": int(similarity.shape[0]), "candidates": int(similarity.shape[1])}


def same_key(
    queries: Sequence[object], candidates: Sequence[object], *more: tuple[Sequence[object], Sequence[object]]
) -> Bool[np.ndarray, "Q N"]:
    """The positives matrix: True where query and candidate share their key (concept), or a key in `more` (name).

    With `same_key(concepts, concepts, (names, names))` two pictures of one concept, or of one name, are right for each
    other. Raises ValueError if the numbers of keys differ.
    """
    matches = np.zeros((len(queries), len(candidates)), np.bool_)
    for left, right in ((queries, candidates), *more):
        if (len(left), len(right)) != matches.shape:
            raise ValueError(f"keys of {len(left)} queries and {len(right)} candidates; expected {matches.shape}")
        numbers: dict[object, int] = {}
        matches |= _numbered(left, numbers)[:, None] == _numbered(right, numbers)
    return matches


def _numbered(keys: Sequence[object], numbers: dict[object, int]) -> Int[np.ndarray, " N"]:
    """A number for each key, in the order of their first occurrence; equal keys get equal numbers, also in
    `numbers`."""
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
