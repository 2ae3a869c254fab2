"""Whole collections through a tower: batched, compiled once, with progress."""

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from flax import nnx
from jaxtyping import Float
from PIL import Image
from tqdm.auto import tqdm

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.processor import CLIPProcessor


@nnx.jit
def _encode_image(model, pixel_values):
    return model.encode_image(pixel_values)


@nnx.jit
def _encode_text(model, input_ids, attention_mask):
    return model.encode_text(input_ids, attention_mask)


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
    """The last batch filled up with copies of its first row, so that every batch has the one compiled shape."""
    return np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)]) if len(array) < rows else array


def embed_images(
    model: HybridCLIP, processor: CLIPProcessor, images: Iterable[Image.Image], batch_size: int = 64,
    progress: bool = True,
) -> Float[np.ndarray, "N E"]:
    """Unit vectors of pictures, in their order."""
    total = len(images) if hasattr(images, "__len__") else None
    rows, source = [], iter(images)
    with tqdm(total=total, desc="pictures", unit=" pictures", disable=not progress) as bar:
        while chunk := list(islice(source, batch_size)):
            pixels = processor(images=chunk)["pixel_values"]
            rows.append(np.asarray(_encode_image(model, _pad(pixels, batch_size)))[: len(chunk)])
            bar.update(len(chunk))
    return np.concatenate(rows) if rows else np.zeros((0, model.config.embed_dim), np.float32)


def embed_pixels(model: HybridCLIP, pixel_values: Float[np.ndarray, "N H W 3"], batch_size: int = 64):
    """Unit vectors [N, E] of pictures that the processor has already made into pixel values."""
    rows = [
        np.asarray(_encode_image(model, _pad(part, batch_size)))[: len(part)]
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
    rows = []
    for start in tqdm(range(0, len(texts), batch_size), desc="texts", disable=not progress):
        part = slice(start, start + batch_size)
        vectors = _encode_text(model, _pad(ids[part], batch_size), _pad(mask[part], batch_size))
        rows.append(np.asarray(vectors)[: len(ids[part])])
    return np.concatenate(rows)
