"""Whole collections through the model: in batches, compiled once, with progress; pictures also with a cache."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Shaped
from PIL import Image
from tqdm.auto import tqdm

from clipid_utils.files import file_identity, usable_threads, whole_file
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import EfficientNetConfig
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.pictures import PictureError, picture_source

RULES = 2  # part of each fingerprint: raise it when the same weights and pictures start to give different vectors
CHUNK = 256  # pictures between two writes to a cache: an interruption loses at most so many
HEAD = 2**14  # bytes of a picture file that its identity reads
WHOLE = 2**30  # rows of a batch that are computed together: all of them
MOST_NAMED = 5  # unreadable pictures that the one line about them names

Batches = Iterator[tuple[np.ndarray, np.ndarray]]  # vectors [B, D] and, for each row, whether it has one


@functools.cache
def _compiled(method: str, group: int) -> Callable:
    def run(model: nnx.Module, *batch: jax.Array) -> jax.Array:
        function, rows = getattr(model, method), len(batch[0])
        if rows <= group or rows % group:
            return function(*batch)
        parts = tuple(array.reshape(-1, group, *array.shape[1:]) for array in batch)
        vectors = jax.lax.map(lambda part: function(*part), parts)
        return vectors.reshape(rows, *vectors.shape[2:])

    return jax.jit(run)


def encoder(model: nnx.Module, method: str) -> Callable[..., np.ndarray]:
    """A method of a model or tower, such as "encode_image", compiled; each call takes the weights of that moment.

    This is not `nnx.jit`, which takes the model apart for every batch and copies each of its weights.
    """
    function = _compiled(method, _group(model, method))
    return lambda *batch: np.asarray(function(model, *batch))


def _group(model: nnx.Module, method: str) -> int:
    """Rows of a batch that are computed together.

    On a CPU the activations of a small group of pictures stay in its cache: EfficientNet is a quarter faster with two
    at once, SigLIP 2 B/16 a tenth with eight. Texts and pictures of few patches gain nothing.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "vision", config)
    if jax.default_backend() != "cpu" or method == "encode_text" or not hasattr(config, "grid"):
        return WHOLE
    return 2 if isinstance(config, EfficientNetConfig) else 8 if config.grid**2 > 100 else WHOLE


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
    """Fills the last batch with copies of its first row, so that every batch has the one compiled shape."""
    return np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)]) if len(array) < rows else array


def _in_batches(model: HybridCLIP, method: str, batches: Iterable[tuple[np.ndarray, ...]], size: int) -> np.ndarray:
    """The method's output for batches of at most `size` rows, one after the other."""
    encode = encoder(model, method)
    rows = [encode(*(_pad(array, size) for array in batch))[: len(batch[0])] for batch in batches]
    return np.concatenate(rows) if rows else np.zeros((0, model.config.embed_dim), np.float32)


def _slices(size: int, *arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    return (tuple(array[start : start + size] for array in arrays) for start in range(0, len(arrays[0]), size))


def embed_images(
    model: HybridCLIP, processor: CLIPProcessor, images: Iterable[Image.Image], batch_size: int = 64,
    progress: bool = True,
) -> Float[np.ndarray, "N E"]:
    """Unit vectors of open pictures, in their order. Raises an error at the first picture that cannot be read."""
    shown = iter(tqdm(images, "pictures", unit=" pictures", disable=not progress))
    chunks = iter(lambda: list(islice(shown, batch_size)), [])
    pixels = ((processor(images=chunk)["pixel_values"],) for chunk in chunks)
    return _in_batches(model, "encode_image", pixels, batch_size)


def embed_pixels(
    model: HybridCLIP, pixel_values: Float[np.ndarray, "N H W 3"], batch_size: int = 64
) -> Float[np.ndarray, "N E"]:
    """Unit vectors of pictures that are normalised pixels already."""
    return _in_batches(model, "encode_image", _slices(batch_size, pixel_values), batch_size)


def embed_texts(
    model: HybridCLIP, processor: CLIPProcessor, texts: Sequence[str], batch_size: int = 256
) -> Float[np.ndarray, "N E"]:
    """Unit vectors of texts, in their order. Raises ValueError for an empty text."""
    if not len(texts):
        return _in_batches(model, "encode_text", (), batch_size)
    tokens = processor.tokenize(list(texts), multiple=8)  # few widths, so few compilations
    batch_size = min(batch_size, 1 << (len(texts) - 1).bit_length())
    batches = _slices(batch_size, tokens["input_ids"], tokens["attention_mask"])
    return _in_batches(model, "encode_text", batches, batch_size)


def fingerprint(model: nnx.Module, processor: CLIPProcessor, *, without: str | None = None) -> str:
    """16 hexadecimal digits that change with any weight, setting or dtype and with how the processor prepares pictures.

    `model` may be one tower; its part named `without`, such as "projection", is left out.
    """
    parts = [getattr(model, name, None) for name in ("vision", "text")]
    dtypes = [str(getattr(part, "dtype", None)) for part in (model, *parts)]
    digest = hashlib.sha256(f"{RULES} {getattr(model, 'config', '')}{_later_settings(model)} {dtypes}".encode())
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[0] != without:
            digest.update(f"{path} {leaf[...].dtype} {leaf[...].shape}".encode())
            digest.update(np.ascontiguousarray(leaf[...]).reshape(-1).view(np.uint8))  # without a copy
    probe = Image.fromarray(np.arange(40 * 30 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 30, 3))
    digest.update(processor.normalize(processor.decoder(probe)[None]).tobytes())
    return digest.hexdigest()[:16]


def text_fingerprint(processor: CLIPProcessor) -> str:
    """16 hexadecimal digits that change with anything in how the processor prepares texts."""
    tokenizer = processor.tokenizer and processor.tokenizer.to_str()
    rest = [getattr(processor, name, None) for name in
            ("max_length", "fixed_length", "padding_side", "truncation_side", "pad_id")]
    return hashlib.sha256(f"{tokenizer} {rest}".encode()).hexdigest()[:16]


def _later_settings(model: nnx.Module) -> str:
    """The settings of the towers that their repr leaves out, where they are not the defaults."""
    config = getattr(model, "config", None)
    towers = [getattr(config, side) for side in ("text", "vision") if hasattr(config, side)] or [config]
    towers = [tower for tower in towers if dataclasses.is_dataclass(tower)]
    fields = [(tower, field) for tower in towers for field in dataclasses.fields(tower)]
    return "".join(f" {field.name}={getattr(tower, field.name)}" for tower, field in fields
                   if not field.repr and getattr(tower, field.name) != field.default)


def picture_identity(picture: object) -> str:
    """20 hexadecimal digits that change with a picture: with the bytes of it, or with its file's path, size, time and
    first bytes.

    `picture` is a path, the bytes of a file, {"bytes", "path"} or an array.
    """
    picture = picture_source(picture)
    if isinstance(picture, str | os.PathLike):
        path, content = os.path.realpath(picture), ""
        with contextlib.suppress(OSError):  # a file that cannot be read is known by its path; opening it says why
            content = file_identity(path, HEAD)
        picture = f"{path}|{content}".encode()
    return hashlib.blake2b(picture, digest_size=10).hexdigest()


class Embedded(NamedTuple):
    """Vectors of pictures; NaN where a picture cannot be read, and the reason in `skipped` by its row."""

    vectors: Float[np.ndarray, "N D"]
    skipped: dict[int, str]


def embed_pictures(
    model: HybridCLIP, processor: CLIPProcessor, pictures: Sequence | np.ndarray, *,
    cache: str | os.PathLike | None = None, identities: Shaped[np.ndarray, " N"] | None = None,
    out: np.ndarray | None = None, projected: bool = True, batch_size: int = 64, chunk: int = CHUNK,
    progress: bool = True,
) -> Embedded:
    """Vectors of pictures in any form that `processor.decoder` takes, or of uint8 arrays of the model's size.

    Threads decode the pictures; only two batches are in memory. With `cache`, a folder, the vectors are kept there in
    files of `chunk` pictures, so that a second or interrupted call embeds only the new ones. One folder is for one
    model (see `fingerprint`), and a picture is known by its place in `identities` (see `picture_identity`).

    The vectors have unit length, or are the image tower's output before its projection where `projected` is False.
    `out` is an array to fill, for example a memory map; it decides the dtype. One line on stderr says how many pictures
    cannot be read, and why. Raises ValueError if a vector is not finite.
    """
    encode = encoder(model, "encode_image") if projected else encoder(model.vision, "pooled")
    if out is None:
        width = model.config.embed_dim if projected else model.config.vision.width
        out = np.empty((len(pictures), width), np.float32)
    identities = np.arange(len(pictures)) if identities is None else np.asarray(identities)
    reasons: dict[int, str] = {}

    def batches(rows: np.ndarray) -> Batches:
        blank = np.zeros((model.config.vision.image_size,) * 2 + (3,), np.uint8)
        parts = [rows[start : start + batch_size].tolist() for start in range(0, len(rows), batch_size)]
        pool = ThreadPoolExecutor(usable_threads())
        try:
            coming = ([pool.submit(_decode, processor.decoder, pictures, row) for row in part] for part in parts)
            later = next(coming, [])
            for part in parts:
                futures, later = later, next(coming, [])  # the next batch is decoded while this one is encoded
                found = [future.result() for future in futures]
                bad = {row: made for row, made in zip(part, found, strict=True) if isinstance(made, str)}
                reasons.update(bad)
                pixels = np.stack([blank if isinstance(made, str) else made for made in found])
                vectors = encode(processor.normalize(_pad(pixels, batch_size)))[: len(part)]
                yield vectors, np.array([row not in bad for row in part])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    same = embed_resumably(out, identities, batches, cache, chunk=chunk, unit="pictures", progress=progress)
    skipped = {int(row): reasons[int(same[row])] for row in np.flatnonzero(np.isin(same, list(reasons)))}
    if skipped:
        named = [f"{_name(pictures, row)} ({why})" for row, why in islice(skipped.items(), MOST_NAMED)]
        more = ", …" if len(skipped) > MOST_NAMED else ""
        count = f"{len(skipped)} of {len(pictures)} pictures could not be read"
        print(f"{count}: {', '.join(named)}{more}", file=sys.stderr)
    return Embedded(out, skipped)


def _name(pictures, row: int) -> str:
    """The name of the picture's file, or its row."""
    try:
        picture = pictures[row]
        return Path(picture["path"] if isinstance(picture, dict) else picture).name
    except Exception:  # no path, or a picture that its data set cannot open
        return f"row {row}"


def _decode(decode: Callable, pictures, row: int) -> np.ndarray | str:
    """A picture's pixels, or the reason why there are none."""
    picture = None
    try:
        picture = pictures[row]
        return picture if isinstance(picture, np.ndarray) else decode(picture)
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, …
        reason = str(error).removeprefix(f"{picture}: ")
        plain = isinstance(error, PictureError | FileNotFoundError)
        return reason if plain else f"{type(error).__name__}: {reason}"


def embed_resumably(
    out: Float[np.ndarray, "N D"], identities: Shaped[np.ndarray, " N"], batches: Callable[[np.ndarray], Batches],
    cache: str | os.PathLike | None = None, *, chunk: int = CHUNK, unit: str = "pictures", progress: bool = True,
) -> np.ndarray:
    """Fills `out`, one row for each identity, from the chunk files in `cache` and for the rest from `batches`.

    `batches(rows)` gives the vectors of these rows, in their order, and says which rows have one; the others become
    NaN. Equal identities are embedded once: the answer is, for each row, the first one with its identity.
    """
    known, first, place = np.unique(identities, return_index=True, return_inverse=True)
    missing, cache = np.ones(len(known), bool), None if cache is None else Path(cache)
    for stored, vectors in () if cache is None else _chunks(cache):
        at = np.searchsorted(known, stored).clip(max=len(known) - 1)
        wanted = known[at] == stored
        out[first[at[wanted]]] = vectors[wanted]
        missing[at[wanted]] = False
    rows, pending, start = np.sort(first[missing]), [], 0
    done = len(known) - len(rows)
    with tqdm(total=len(known), initial=done, desc=unit, unit=f" {unit}", disable=not progress) as bar:
        for vectors, there in batches(rows):
            with np.errstate(over="ignore"):
                vectors = vectors.astype(out.dtype)
            if not np.isfinite(vectors[there]).all():
                raise ValueError(f"a vector of {unit} {start} to {start + len(vectors)} is not finite in {out.dtype}: "
                                 "use float32 if it is a narrower dtype, or look for a NaN in the model's weights")
            vectors[~there] = np.nan
            part = rows[start : start + len(vectors)]
            out[part] = vectors
            pending.append(part[there])
            start += len(vectors)
            bar.update(len(vectors))
            if cache is not None and (sum(map(len, pending)) >= chunk or start == len(rows)):
                _write_chunk(cache, identities, np.concatenate(pending), out)
                pending.clear()
    same = first[place.reshape(-1)]
    for row in np.flatnonzero(same != np.arange(len(same))):
        out[row] = out[same[row]]
    return same


def _write_chunk(cache: Path, identities: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    if len(rows):
        name = hashlib.sha256(np.ascontiguousarray(identities[rows]).tobytes()).hexdigest()[:16]
        with whole_file(cache / f"chunk-{name}.npz") as file:
            np.savez(file, identities=identities[rows], vectors=out[rows])


def _chunks(cache: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Identities and vectors of each chunk file. A damaged file warns and is deleted."""
    for path in sorted(cache.glob("chunk-*.npz")):
        try:
            with np.load(path, allow_pickle=False) as chunk:
                found = chunk["identities"], chunk["vectors"]
        except Exception as error:
            warnings.warn(f"{path.name} cannot be read ({error}): its pictures are embedded again", stacklevel=4)
            path.unlink()
            continue
        yield found
