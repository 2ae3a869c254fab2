"""For experiments with several seeds: each run's recall by name, and differences between runs query by query."""

import numpy as np
from datasets import Dataset

from clipid_utils import metrics
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.embed import embed_images, embed_texts
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.pictures import to_rgb

KS = (1, 5, 10)
Ranks = list[np.ndarray]  # for each seed, the rank of each query


def text_ranks(model: HybridCLIP, processor: CLIPProcessor, rows: Dataset) -> np.ndarray:
    """The rank of the first right picture for each distinct name, as `evaluate` measures it."""
    concepts, names = list(rows["concept"]), [name.casefold() for name in rows["name_id"]]
    asked = list(dict.fromkeys(zip(concepts, names, strict=True)))
    images = embed_images(model, processor, [to_rgb(image) for image in rows["image"]], progress=False)
    similarity = embed_texts(model, processor, [name for _, name in asked]) @ images.T
    right = metrics.same_key([concept for concept, _ in asked], concepts, ([name for _, name in asked], names))
    return metrics.ranks(similarity, right)


def recalls(ranks: Ranks) -> dict:
    """Recall@K, a query's hits averaged over the seeds, with a bootstrap interval over the queries."""
    hits = {k: _hits(ranks, k) for k in KS}
    return {f"R@{k}": metrics.with_interval(hit.mean(axis=0)) | {"seeds": list(hit.mean(axis=1))}
            for k, hit in hits.items()}


def difference(first: Ranks, second: Ranks) -> dict:
    """The recall of `first` minus that of `second`, query by query, with its interval."""
    return {f"R@{k}": metrics.with_interval((_hits(first, k) - _hits(second, k)).mean(axis=0)) for k in KS}


def _hits(ranks: Ranks, k: int) -> np.ndarray:
    return np.stack([metrics.hits_at_k(rank, k) for rank in ranks])  # [seeds, queries]


def line(figures: dict) -> str:
    """Figures for people: "R@1 0.203 [0.187, 0.219]  …"."""
    return "  ".join(f"{k} {cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]" for k, cell in figures.items())
