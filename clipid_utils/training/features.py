"""Features of each picture and caption, computed once by frozen towers and kept on disk.

The cache is a folder: `images.npy` and `texts.npy` are the towers' outputs before their projections, and
`manifest.json` names the towers, settings and data that they come from. The projections and the scale are not part of
it: `heads` trains them on it.
"""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from filelock import FileLock
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from clipid_utils.data.batches.loader import PicturePairs, undecoded
from clipid_utils.data.captions import caption_ids, sample_caption
from clipid_utils.files import read_json, write_json
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.embed import Batches, embed_pictures, embed_resumably, encoder, fingerprint, picture_identity
from clipid_utils.model.processor import CLIPProcessor

CHUNK = 4096  # rows between two writes: an interruption loses at most so many


@dataclass(frozen=True)
class Features:
    """The towers' outputs before their projections; `images` and `texts` are mapped from disk."""

    images: Float[np.ndarray, "N D"]  # NaN where the picture cannot be read
    texts: Float[np.ndarray, "T W"]  # each different caption once
    captions: Int[np.ndarray, " C"]  # rows of `texts`, picture after picture
    starts: Int[np.ndarray, " N+1"]  # picture i has captions[starts[i] : starts[i + 1]]
    concepts: Int[np.ndarray, " N"]  # equal numbers: one concept, or of records one picture
    caption_ids: Int[np.ndarray, "T 2"]  # of each row of `texts`: equal where two captions are equal, normalised

    def __len__(self) -> int:
        return len(self.images)


def cache_features(
    model: HybridCLIP, processor: CLIPProcessor, data: PicturePairs | Dataset, folder: str | os.PathLike, *,
    batch_size: int = 64, captions: int = 16, dtype=np.float16, progress: bool = True,
) -> Features:
    """Sends each picture and each different caption once through its tower, or reads the features from `folder`.

    `data` is pictures in memory, at the model's size; `captions` captions are drawn for each. Or it is
    captions records, whose pictures are opened one batch at a time. An interrupted call loses at most 4,096 rows. A
    picture that cannot be read is counted in one line on stderr, and training leaves it out.

    One process computes everything, on its first device. If several call it on a shared folder, the others wait for the
    first and then read. While it runs, the folder needs twice the space of the features.

    Raises ValueError if the folder has features of other towers, settings or data, if a picture has no caption, if no
    picture can be read, and for features that are not finite in `dtype`.
    """
    size = model.config.vision.image_size
    if isinstance(data, PicturePairs) and data.images.shape[1:3] != (size, size):
        raise ValueError(f"the pictures have {data.images.shape[1]} pixels a side and the model takes {size}: "
                         f"load_pairs(…, {size})")
    processor.tokenize(["foto"])  # without a tokenizer this raises now, not after all pictures are done
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checksum, different, (numbers, starts, concepts) = _survey(data, captions, progress)
    manifest = {
        "vision": fingerprint(model.vision, processor, without="projection"),
        "text": fingerprint(model.text, processor, without="projection") + _text_settings(processor),
        "data": checksum, "dtype": np.dtype(dtype).name,
    }
    with FileLock(folder / "writing.lock"):  # a second process waits and finds the features
        if not _is_done(folder, manifest):
            images = _reserved(folder / "images.npy", (len(data), model.config.vision.width), dtype)
            texts = _reserved(folder / "texts.npy", (len(different), model.config.text.width), dtype)
            _, skipped = embed_pictures(
                model, processor, _pictures(data), cache=folder / "chunks" / "images", out=images, projected=False,
                batch_size=batch_size, chunk=CHUNK, progress=progress)
            if len(skipped) == len(images):
                raise ValueError(f"none of {len(images)} pictures can be read, the first because of {skipped[0]}: are "
                                 "their folders where they were?")
            embed_resumably(
                texts, np.arange(len(different)),
                lambda rows: text_batches(model, processor, [different[row] for row in rows], 4 * batch_size),
                folder / "chunks" / "texts", chunk=CHUNK, unit="texts", progress=progress)
            images.flush()
            texts.flush()
            write_json(folder / "manifest.json", manifest | {"done": True})
            shutil.rmtree(folder / "chunks")
    images, texts = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "texts"))
    return Features(images, texts, numbers, starts, concepts, caption_ids(different))


def _is_done(folder: Path, manifest: dict) -> bool:
    """Whether the folder has all features. A new folder gets its manifest; a different one raises ValueError."""
    path = folder / "manifest.json"
    if not path.is_file():
        shutil.rmtree(folder / "chunks", ignore_errors=True)
        write_json(path, manifest)
        return False
    kept = read_json(path)
    names = {"vision": "a different image tower or processor", "text": "a different text tower or tokenizer",
             "data": "other pictures or captions", "dtype": f"dtype {kept['dtype']}"}
    different = [words for key, words in names.items() if kept[key] != manifest[key]]
    if different:
        raise ValueError(f"{folder} has features of {' and '.join(different)}: name a different folder, or delete it")
    return kept.get("done", False)


def _reserved(path: Path, shape: tuple[int, int], dtype) -> np.memmap:
    """A memory map of a new file with space reserved on the disk: otherwise a full disk would kill the process."""
    mapped = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped


def _captions(data: PicturePairs | Dataset, count: int) -> Iterator[list[str]]:
    """The captions of each picture."""
    if not isinstance(data, PicturePairs):
        yield from undecoded(data)["captions"]
        return
    for row, words in enumerate(zip(data.names, data.keywords, data.groups, strict=True)):
        name, keywords, group = words
        rng = np.random.default_rng([row])
        yield [sample_caption(name, keywords, rng, group) for _ in range(count)]


def _pictures(data: PicturePairs | Dataset):
    """The pictures as pixels, paths or bytes, to be asked for by row."""
    if isinstance(data, PicturePairs):
        return data.images
    records = undecoded(data)
    return records[records.column_names[0]]


def _survey(data: PicturePairs | Dataset, count: int, progress: bool) -> tuple[str, list[str], tuple[np.ndarray, ...]]:
    """The checksum of the data, its different captions, and `captions`, `starts` and `concepts` of `Features`."""
    if not len(data):
        raise ValueError("there are no pictures to compute features of")
    digest, number, captions, starts = hashlib.sha256(), {}, array("i"), array("q", [0])
    pictures: dict[str, int] = {}  # numbers of the different ones
    concepts, pairs = array("i"), zip(_pictures(data), _captions(data, count), strict=True)
    for row, (picture, texts) in enumerate(tqdm(pairs, "looking through", len(data), disable=not progress)):
        if not texts:
            raise ValueError(f"picture {row} has no caption: give it one, or leave it out")
        identity = picture_identity(picture)
        digest.update(json.dumps([identity, texts]).encode())
        concepts.append(pictures.setdefault(identity, len(pictures)))
        captions.extend(number.setdefault(text, len(number)) for text in texts)
        starts.append(len(captions))
    if isinstance(data, PicturePairs):
        concepts = data.concepts
        digest.update(concepts.tobytes())
    return digest.hexdigest(), list(number), (np.asarray(captions), np.asarray(starts).astype(np.int64),
                                              np.asarray(concepts))


def _text_settings(processor: CLIPProcessor) -> str:
    """Changes with anything that decides how the processor tokenizes."""
    names = ("max_length", "padding_side", "truncation_side", "special_tokens")
    settings = repr([getattr(processor, name) for name in names])
    tokenizer = json.loads(processor.tokenizer.to_str())
    tokenizer |= {"truncation": None, "padding": None}  # a different user of it may have set these
    return hashlib.sha256((settings + json.dumps(tokenizer, sort_keys=True)).encode()).hexdigest()


def text_batches(model: HybridCLIP, processor: CLIPProcessor, texts: list[str], size: int) -> Batches:
    """Outputs of the text tower before its projection, `size` texts at a time."""
    encode = encoder(model.text, "pooled")
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        filled = part + part[:1] * (size - len(part))  # one compiled shape
        tokens = processor.tokenize(filled, multiple=8)  # few widths, so few compilations
        yield encode(tokens["input_ids"], tokens["attention_mask"])[: len(part)], np.ones(len(part), bool)
