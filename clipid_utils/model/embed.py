"""Whole collections through a tower: batched, compiled once, with progress."""

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from PIL import Image
from tqdm.auto import tqdm

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.processor import CLIPProcessor


@functools.lru_cache(maxsize=16)
def _compiled(graph: nnx.GraphDef, method: str) -> Callable:
    return jax.jit(lambda params, *batch: getattr(nnx.merge(graph, params), method)(*batch))


def encoder(model: HybridCLIP, method: str) -> Callable[..., np.ndarray]:
    """One of the model's methods, "encode_image" or another, compiled, with the weights that the model has now.

    Not `nnx.jit`: it would take the model apart for every batch and return, so copy, every one of its weights.
    """
    graph, params = nnx.split(model)
    function = _compiled(graph, method)
    return lambda *batch: np.asarray(function(params, *batch))


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
    """The last batch filled up with copies of its first row, so that every batch has the one compiled shape."""
    return np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)]) if len(array) < rows else array


def embed_images(
    model: HybridCLIP, processor: CLIPProcessor, images: Iterable[Image.Image], batch_size: int = 64,
    progress: bool = True,
) -> Float[np.ndarray, "N E"]:
    """Unit vectors of pictures, in their order."""
    total = len(images) if hasattr(images, "__len__") else None
    rows, source, encode = [], iter(images), encoder(model, "encode_image")
    with tqdm(total=total, desc="pictures", unit=" pictures", disable=not progress) as bar:
        while chunk := list(islice(source, batch_size)):
            pixels = processor(images=chunk)["pixel_values"]
            rows.append(encode(_pad(pixels, batch_size))[: len(chunk)])
            bar.update(len(chunk))
    return np.concatenate(rows) if rows else np.zeros((0, model.config.embed_dim), np.float32)


def embed_pixels(model: HybridCLIP, pixel_values: Float[np.ndarray, "N H W 3"], batch_size: int = 64):
    """Unit vectors [N, E] of pictures that the processor has already made into pixel values."""
    encode = encoder(model, "encode_image")
    rows = [
        encode(_pad(part, batch_size))[: len(part)]
        for part in (pixel_values[start : start + batch_size] for start in range(0, len(pixel_values), batch_size))
    ]
    return np.concatenate(rows) if rows else np.zeros((0, model.config.embed_dim), np.float32)


def embed_texts(
    model: HybridCLIP, processor: CLIPProcessor, texts: Sequence[str], batch_size: int = 256, progress: bool = False,
) -> Float[np.ndarray, "N E"]:
    """Unit vectors of texts, in their order; an empty text raises ValueError."""
    if not len(texts):
        return np.zeros((0, model.config.embed_dim), np.float32)
    tokens = processor.tokenize(list(texts), multiple=8)  # few widths, so few compilations
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    batch_size = min(batch_size, 1 << max(0, len(texts) - 1).bit_length())
    rows, encode = [], encoder(model, "encode_text")
    for start in tqdm(range(0, len(texts), batch_size), desc="texts", disable=not progress):
        part = slice(start, start + batch_size)
        rows.append(encode(_pad(ids[part], batch_size), _pad(mask[part], batch_size))[: len(ids[part])])
    return np.concatenate(rows)
