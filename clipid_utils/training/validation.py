"""How well a model finds the validation pictures: recall, and a picture of the search results for some queries."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from clipid_utils import metrics
from clipid_utils.data.batches.loader import PicturePairs
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.embed import embed_pictures, embed_texts
from clipid_utils.model.processor import CLIPProcessor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

def validation_recall(
    model: HybridCLIP, processor: CLIPProcessor, pairs: PicturePairs,
    image_embeds: Float[np.ndarray, "N E"] | None = None,
) -> dict[str, float]:
    """Recall@1, 5 and 10 by the pictures' names, text to picture and back; concepts with the same name count as right.

    `image_embeds` are the pictures' vectors, if the caller has them.
    """
    if image_embeds is None:
        image_embeds = embed_pictures(model, processor, pairs.images, progress=False)[0]
    unique, first = np.unique(pairs.concepts, return_index=True)
    text_embeds = embed_texts(model, processor, [pairs.names[i] for i in first])
    similarity, right = text_embeds @ image_embeds.T, unique[:, None] == pairs.concepts[None, :]
    found = {"text_to_picture": metrics.recall_at_k(similarity, right),
             "picture_to_text": metrics.recall_at_k(similarity.T, right.T)}
    return {f"{way}_R@{k}": value for way, recall in found.items() for k, value in recall.items()}


def retrieval_grid(
    similarity: Float[np.ndarray, "Q N"], pairs: PicturePairs, queries: Sequence[str], k: int = 5
) -> "Figure":
    """The k best pictures of each query, one row a query; pictures with the query's name are framed as right."""
    from clipid_utils.plots import search_grid

    k = min(k, len(pairs))
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    right = [pairs.names[i].lower() == query.lower() for query, row in zip(queries, best, strict=True) for i in row]
    scores = np.take_along_axis(similarity, best, axis=1).ravel()
    names = [pairs.names[i] for i in best.ravel()]
    figure = search_grid("", list(pairs.images[best.ravel()]), scores, names, right, columns=k)
    for row, query in enumerate(queries):
        figure.axes[row * k].set_ylabel(textwrap.fill(query, 18), fontsize=9)
    return figure
