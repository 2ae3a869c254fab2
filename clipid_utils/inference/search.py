"""Picture search in Indonesian: by text, by picture, or by both, over an index that `build_index` made.

    index = build_index(model, processor, "foto/", cache=CACHE / "search")   # or a datasets.Dataset
    scores, rows = search(index, query_embeds(model, processor, text="kucing tidur"), k=10)

The vectors are one matrix, and a query is one product with it. NumPy's exact `top_k` is faster than faiss' flat index
at the sizes of this course (`benchmarks/bench_search.py`); notebook 07 has faiss' approximate search beside it.
"""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from PIL import Image

from clipid_utils.inference.index import SHOWN_SIDE, PictureIndex
from clipid_utils.model.embed import embed_pixels, embed_texts
from clipid_utils.pictures import open_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRIVATE = "\ue000"  # a letter without a meaning, which no vocabulary has
BLOCK = 65536  # pictures that are compared at once: a million then need no more memory
Find = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]  # queries [Q, E], k -> scores and rows [Q, k]
Found = tuple[Float[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]  # similarities, best first, and rows of the index


def query_embeds(
    model: nnx.Module, processor: object, text: str | None = None, image: Image.Image | str | Path | None = None,
    text_weight: float | int = 0.5,
) -> Float[np.ndarray, "1 E"]:
    """A query by text, by picture, or by both ("seperti ini, tapi merah"): a unit vector, as a matrix of one row.

    A query by both is unit(text_weight * text + (1 - text_weight) * picture) of the two unit vectors: 1 is the text
    alone and 0 the picture alone. Pictures are closer to each other than to texts (the modality gap, Liang et al.
    2022), so the picture mostly wins at 0.5; 0.6 to 0.8 gives the words more influence. Warns if the tokenizer knows no
    part of the text. Raises ValueError if both are missing, the text is empty or no Unicode, or the weight is not
    between 0 and 1.
    """
    if text is None and image is None:
        raise ValueError("a query needs a text, an image, or both")
    if text is not None and not text.strip():
        raise ValueError('the query is empty: write what the picture shows, for example "kucing tidur"')
    if text is not None and any("\ud800" <= letter <= "\udfff" for letter in text):  # Python's sign of a wrong byte
        raise ValueError(f"the query {text!r} is not valid Unicode: write it in UTF-8")
    if not 0 <= text_weight <= 1:
        raise ValueError(f"text_weight must be between 0 (the picture alone) and 1 (the text alone), not {text_weight}")
    total = np.zeros((1, model.config.embed_dim), np.float32)
    if text is not None:
        total += (text_weight if image is not None else 1) * embed_texts(model, processor, [text])
        if _is_unknown(processor, text):
            warnings.warn(f"the model knows no part of {text!r}, so that all such queries find the same pictures: "
                          "write it in other words", stacklevel=2)
    if image is not None:
        pixels = processor.normalize(processor.decoder(image)[None])
        total += (1 - text_weight if text is not None else 1) * embed_pixels(model, pixels, 1)
    return total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)


def _is_unknown(processor: object, text: str) -> bool:
    """Whether the tokenizer knows no part of a text; a prefix and marks of a space (▁ and Ġ) count as no part."""
    tokenizer = processor.tokenizer
    encoding = tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.encode(PRIVATE, add_special_tokens=False).ids  # of a prefix and of the unknown token
    start = len(os.path.commonprefix([encoding.ids, unknown]))
    parts = {i for i, token in zip(encoding.ids[start:], encoding.tokens[start:], strict=True) if token.strip("▁Ġ")}
    return parts <= {tokenizer.token_to_id(processor.special_tokens.get("unk_token", ""))}


def search(index: PictureIndex, queries: Float[np.ndarray, "Q E"], k: int = 10, find: Find | None = None) -> Found:
    """The k most similar pictures of each query: cosine similarities, best first, and rows of the index.

    `find` replaces the exact search, for example by the search of a faiss index. k is at most the size of the index.
    Raises ValueError if `find` finds fewer than k.
    """
    if find is None:
        return top_k(index.embeds, queries, k)
    scores, rows = find(queries, min(k, len(index)))
    if (rows < 0).any():  # faiss says so that it found no more
        raise ValueError(f"the finder found fewer than {k} pictures for a query: give it more effort, or a smaller k")
    return scores, rows


def top_k(embeds: Float[np.ndarray, "N E"], queries: Float[np.ndarray, "Q E"], k: int = 10) -> Found:
    """Exact search by inner product: the k largest of `queries @ embeds.T`, best first; equal scores by row number.

    If more pictures have the k-th score than there is room for, any of them may be returned. Raises ValueError for a
    NaN, and for k below 1.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, not {k}")
    k = min(k, len(embeds))
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start in range(0, len(embeds), BLOCK):
        part_scores, part_rows = _largest(queries @ embeds[start : start + BLOCK].T, k)
        scores, rows = np.hstack([scores, part_scores]), np.hstack([rows, part_rows + start])
    if np.isnan(scores).any():  # for np.max and np.argpartition a NaN is the largest, so that none is hidden
        raise ValueError("a similarity is NaN; look for a NaN in the query or in the embeddings of the index")
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _largest(scores: np.ndarray, k: int, groups: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """The k largest of each row, unsorted. np.argpartition on whole rows takes longer than the product that made them.

    So the columns are dealt into `groups` like cards. The k largest are all in the k groups with the largest maxima
    (for any other group, k groups have a larger score), and maxima are cheap: np.max over rows uses SIMD.
    """
    count, size = scores.shape
    columns = np.broadcast_to(np.arange(size), scores.shape)
    if k < groups // 4 and size > 4 * groups:
        deals, rest = divmod(size, groups)
        maxima = scores[:, : deals * groups].reshape(count, deals, groups).max(axis=1)  # [Q, groups]
        np.maximum(maxima[:, :rest], scores[:, deals * groups :], out=maxima[:, :rest])
        best = np.argpartition(maxima, groups - k, axis=1)[:, groups - k :]  # [Q, k]
        columns = (best[:, :, None] + groups * np.arange(deals + 1)).reshape(count, -1)
        past_end = columns >= size
        scores = np.take_along_axis(scores, np.where(past_end, 0, columns), axis=1)
        scores[past_end] = -np.inf
    if k >= scores.shape[1]:
        return scores, columns
    keep = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k :]
    return np.take_along_axis(scores, keep, axis=1), np.take_along_axis(columns, keep, axis=1)


def search_figure(
    index: PictureIndex, model: nnx.Module, processor: object, text: str | None = None,
    image: Image.Image | str | Path | None = None, text_weight: float | int = 0.5, k: int = 10, columns: int = 5,
) -> "Figure":
    """A figure of one query (see `query_embeds`) and its k best pictures with their labels and similarities."""
    (scores,), (rows,) = search(index, query_embeds(model, processor, text, image, text_weight), k)
    return found_figure(index, scores, rows, text, image, columns)


def found_figure(
    index: PictureIndex, scores: Float[np.ndarray, " k"], rows: Int[np.ndarray, " k"], text: str | None = None,
    image: Image.Image | str | Path | None = None, columns: int = 5,
) -> "Figure":
    """A figure of a query and the pictures that it found: rows of the index, with their similarities."""
    from clipid_utils.plots import search_grid

    def plain(words: str) -> str:  # matplotlib reads words between two $ as a formula
        return words.replace("$", r"\$")

    pictures, labels = [index.picture(i) for i in rows], [plain(index.labels[i]) for i in rows]
    example, text = None if image is None else open_picture(image, short_side=SHOWN_SIDE), text and plain(text)
    query = text if example is None else example if text is None else (text, example)
    return search_grid(query, pictures, scores, labels, columns=columns)


def search_widget(
    index: PictureIndex, model: nnx.Module, processor: object, query: str = "kucing", k: int = 10, columns: int = 5
) -> "Figure | None":
    """A search box over a grid of results; with a file, it searches by picture, or by picture and words together.

    In a notebook it displays itself and returns None. A page that cannot show widgets (GitHub, a printed notebook)
    shows the first query's figure instead; outside a notebook the answer is that Figure.
    """
    import ipywidgets
    from IPython import display, get_ipython

    def draw(text: str, image: Image.Image | None = None, text_weight: float | int = 0.5) -> "Figure":
        text = text.strip() or (query if image is None else None)
        return search_figure(index, model, processor, text, image, text_weight, k, columns)

    figure = draw(query)
    if getattr(get_ipython(), "kernel", None) is None:  # a plain terminal: no front end that could show a widget
        return figure
    first = _png(figure)
    view = {"model_id": _controls(ipywidgets, draw, query, first).model_id, "version_major": 2, "version_minor": 0}
    bundle = {"application/vnd.jupyter.widget-view+json": view, "image/png": first, "text/plain": repr(figure)}
    display.display(bundle, raw=True)
    return None


def _controls(ipywidgets, draw: Callable, query: str, first: bytes):
    """Text box, picture upload, slider and the grid of results, wired together; labels in Indonesian."""
    text = ipywidgets.Text(value=query, description="Cari:", placeholder="kucing tidur", continuous_update=False)
    upload = ipywidgets.FileUpload(accept="image/*", multiple=False, description="Seperti ini…")
    weight = ipywidgets.FloatSlider(value=0.7, max=1, step=0.1, description="Bobot kata:", continuous_update=False)
    results = ipywidgets.Image(value=first, format="png")
    note = ipywidgets.Label()

    def refresh(_):
        try:
            note.value = "Mencari…"
            with warnings.catch_warnings(record=True, action="always") as caught:
                results.value = _png(draw(text.value, _uploaded(upload.value), weight.value))
            note.value = " ".join(str(found.message) for found in caught if found.category is UserWarning)
        except Exception as error:  # shown beside the box, because nobody sees an exception inside a callback
            note.value = f"Gagal: {error}"

    for control in (text, upload, weight):
        control.observe(refresh, names="value")
    return ipywidgets.VBox([ipywidgets.HBox([text, upload, weight, note]), results])


def _uploaded(value) -> Image.Image | None:
    """The uploaded picture: ipywidgets 8 gives a tuple of files, ipywidgets 7 (Colab) a dict of them by name."""
    files = list(value.values()) if isinstance(value, dict) else list(value)
    return Image.open(io.BytesIO(bytes(files[-1]["content"]))) if files else None


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()
