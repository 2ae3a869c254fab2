"""What frozen towers make of each picture and caption, computed once and kept on disk.

The cache is a folder: `images.npy` and `texts.npy`, what the towers give before their projections, and `manifest.json`,
which says of what and how many rows are done. The scale and the projections have no part in it: `projections` trains
them on it.
"""

import hashlib
import io
import json
import os
import warnings
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import grain
import jax
import numpy as np
from datasets import Dataset
from filelock import FileLock
from flax import nnx
from jaxtyping import Float, Int
from PIL import Image
from tqdm.auto import tqdm

from clipid_utils.data.batches.loader import PicturePairs
from clipid_utils.data.captions import sample_caption
from clipid_utils.files import usable_threads
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.training.optimizers import dotted

CHUNK = 4096  # rows between two writes: what an interruption costs at most


@dataclass(frozen=True)
class Features:
    """What the towers make of the data, before the projections; `images` and `texts` are mapped from disk."""

    images: Float[np.ndarray, "N D"]  # NaN where the picture could not be read
    texts: Float[np.ndarray, "T W"]  # each different caption once
    captions: Int[np.ndarray, " C"]  # rows of `texts`, picture after picture
    starts: Int[np.ndarray, " N+1"]  # picture i has captions[starts[i] : starts[i + 1]]
    concepts: Int[np.ndarray, " N"]  # equal numbers: one concept

    def __len__(self) -> int:
        return len(self.images)


def cache_features(
    model: HybridCLIP, processor: CLIPProcessor, data: PicturePairs | Dataset, folder: str | os.PathLike, *,
    batch_size: int = 64, captions: int = 16, dtype=np.float16, progress: bool = True,
) -> Features:
    """Sends each picture and each different caption once through its tower, into `folder`, or finds them there.

    `data` is pictures in memory, at the model's size, for each of which `captions` captions are drawn, or captions
    records, whose pictures are opened one batch at a time. What was interrupted goes on at its last 4,096 rows. A
    picture that cannot be read warns, and training leaves it out.

    One process computes all of it, on its first device; where several call it on a shared folder, the others wait for
    the first to be done, and then read.

    Raises ValueError where the folder holds the features of other towers, settings or data, where a picture has no
    caption, and for features that are not finite in `dtype`.
    """
    size = model.config.vision.image_size
    if isinstance(data, PicturePairs) and data.images.shape[1:3] != (size, size):
        raise ValueError(f"the pictures have {data.images.shape[1]} pixels a side and the model takes {size}: "
                         f"load_pairs(…, {size})")
    processor.tokenize(["foto"])  # without a tokenizer it refuses here, not when all pictures are done
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    digest, captions_of, starts, first = _survey(data, captions, progress)
    manifest = {
        "vision": _fingerprint(model.vision), "text": _fingerprint(model.text), "processor": _settings(processor),
        "data": digest, "dtype": np.dtype(dtype).name,
        "images": {"rows": len(starts) - 1, "width": model.config.vision.width, "done": 0},
        "texts": {"rows": len(first), "width": model.config.text.width, "done": 0},
    }
    with FileLock(folder / "writing.lock"):  # a second process waits and finds it done
        manifest = _begin(folder, manifest)
        done = manifest["images"]["done"]
        _fill(folder, manifest, "images", _image_batches(model, processor, data, batch_size, done), progress)
        texts = (text for texts in _captions(data, captions) for text in texts)
        chosen = _at(texts, first[manifest["texts"]["done"]:])
        _fill(folder, manifest, "texts", _text_batches(model, processor, chosen, 4 * batch_size), progress)
    images, texts = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("images", "texts"))
    concepts = data.concepts if isinstance(data, PicturePairs) else np.arange(len(data), dtype=np.int32)
    return Features(images, texts, captions_of, starts, concepts)


def _captions(data: PicturePairs | Dataset, count: int) -> Iterator[list[str]]:
    """The captions of each picture, the same whenever asked."""
    if isinstance(data, PicturePairs):
        for row, words in enumerate(zip(data.names, data.keywords, data.groups, strict=True)):
            name, keywords, group = words
            rng = np.random.default_rng([row])
            yield [sample_caption(name, keywords, rng, group) for _ in range(count)]
    else:
        for part in data.with_format(None).select_columns("captions").iter(1000):
            yield from part["captions"]


def _undecoded(records: Dataset) -> tuple[Dataset, str]:
    """The records' pictures, as paths or as bytes, and the name of their column."""
    kind = "image" if "image" in records.column_names else "image_path"
    records = records.with_format(None).select_columns(kind)
    return (records.cast_column(kind, datasets.Image(decode=False)) if kind == "image" else records), kind


def _identities(data: PicturePairs | Dataset) -> Iterator[bytes]:
    """What makes each picture the same as when its features were computed."""
    if isinstance(data, PicturePairs):
        yield from (image.tobytes() for image in data.images)
        return
    pictures, kind = _undecoded(data)
    for part in pictures.iter(100):
        for picture in part[kind]:
            content = picture["bytes"] if isinstance(picture, dict) else None
            path = picture["path"] if isinstance(picture, dict) else picture
            if content is None and os.path.isfile(path):
                stat = os.stat(path)
                path = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
            yield str(path).encode() if content is None else content


def _survey(data: PicturePairs | Dataset, count: int, progress: bool) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """A checksum of the data, the text of each caption, where each picture's begin, and where each text first stands.

    The captions themselves are not held: 8 bytes of a checksum stand for one (five million have two alike by chance
    with a probability below one in a million).
    """
    if not len(data):
        raise ValueError("there are no pictures to compute features of")
    digest, seen, counts = hashlib.sha256(), array("Q"), array("q")
    pairs = zip(_identities(data), _captions(data, count), strict=True)
    for row, (identity, texts) in enumerate(tqdm(pairs, "looking through", len(data), disable=not progress)):
        if not texts:
            raise ValueError(f"picture {row} has no caption: give it one, or leave it out")
        digest.update(hashlib.sha256(identity).digest())
        counts.append(len(texts))
        for text in texts:
            number = hashlib.blake2b(text.encode(), digest_size=8).digest()
            digest.update(number)
            seen.append(int.from_bytes(number, "little"))
    if isinstance(data, PicturePairs):
        digest.update(data.concepts.tobytes())
    digest.update(counts.tobytes())
    _, first, text_of = np.unique(np.asarray(seen), return_index=True, return_inverse=True)
    place = np.argsort(np.argsort(first))  # texts in the order in which they come up
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # a long long is another type to numpy
    return digest.hexdigest(), place[text_of.reshape(-1)].astype(np.int32), starts, np.sort(first)


def _at(texts: Iterator[str], places: np.ndarray) -> Iterator[str]:
    """The texts at the given places, in rising order."""
    wanted = iter(places.tolist())
    place = next(wanted, None)
    for number, text in enumerate(texts):
        if place is None:
            return
        if number == place:
            yield text
            place = next(wanted, None)


def _fingerprint(tower: nnx.Module) -> str:
    """Changes with any weight or setting of a tower, but not with its projection's."""
    digest = hashlib.sha256(f"{tower.config} {np.dtype(tower.dtype)}".encode())
    for path, leaf in nnx.to_flat_state(nnx.state(tower, nnx.Param)):
        if path[0] != "projection":
            digest.update(f"{dotted(path)} {leaf[...].dtype}".encode())
            digest.update(np.ascontiguousarray(leaf[...]).tobytes())
    return digest.hexdigest()


def _settings(processor: CLIPProcessor) -> str:
    """Changes with anything that decides what the processor makes of a picture or a text."""
    names = ("image_size", "resize", "resample", "image_mean", "image_std", "max_length", "padding_side",
             "truncation_side", "special_tokens")
    settings = repr([getattr(processor, name) for name in names])
    tokenizer = json.loads(processor.tokenizer.to_str())
    tokenizer |= {"truncation": None, "padding": None}  # whatever another of its users has set
    return hashlib.sha256((settings + json.dumps(tokenizer, sort_keys=True)).encode()).hexdigest()


def _begin(folder: Path, manifest: dict) -> dict:
    """The manifest from which to go on; new files where there is none. Raises ValueError where it is another's."""
    path = folder / "manifest.json"
    if not path.is_file():
        for name in ("images", "texts"):
            shape = manifest[name]["rows"], manifest[name]["width"]
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", manifest["dtype"], shape)
        _write_manifest(folder, manifest)
    kept = json.loads(path.read_text(encoding="utf-8"))
    what = {"vision": "another image tower", "text": "another text tower", "processor": "another processor",
            "data": "other pictures or captions", "dtype": f"dtype {kept['dtype']}"}
    other = [words for key, words in what.items() if kept[key] != manifest[key]]
    if other:
        raise ValueError(f"{folder} holds features of {' and '.join(other)}: name another folder, or delete this one")
    return kept


def _write_manifest(folder: Path, manifest: dict) -> None:
    part = folder / "manifest.json.part"
    with open(part, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder / "manifest.json")


def _fill(
    folder: Path, manifest: dict, name: str, batches: Iterator[tuple[np.ndarray, np.ndarray]], progress: bool
) -> None:
    """Writes rows behind those that are done, the manifest after each chunk of them."""
    part, rows = manifest[name], []
    path = folder / f"{name}.npy"
    header = path.stat().st_size - part["rows"] * part["width"] * np.dtype(manifest["dtype"]).itemsize

    def flush() -> None:
        whole = np.concatenate(rows)
        with open(path, "r+b") as file:  # not through the map: on a full disk that would kill the process
            file.seek(header + part["done"] * whole[0].nbytes)
            file.write(whole.tobytes())
            file.flush()
            os.fsync(file.fileno())
        part["done"] += len(whole)
        rows.clear()
        _write_manifest(folder, manifest)

    with tqdm(total=part["rows"], initial=part["done"], desc=name, unit=f" {name}", disable=not progress) as bar:
        for values, there in batches:
            with np.errstate(over="ignore"):
                values = values.astype(manifest["dtype"])
            if not np.isfinite(values[there]).all():
                raise ValueError(f"{name} from row {part['done']}: features are not finite in {manifest['dtype']}: "
                                 "pass dtype=np.float32; if that does not help, look at the tower's weights")
            values[~there] = np.nan
            rows.append(values)
            bar.update(len(values))
            if sum(map(len, rows)) >= CHUNK:
                flush()
        if rows:
            flush()


def _compiled(tower: nnx.Module) -> Callable[..., np.ndarray]:
    """A tower up to its projection, in float32."""
    graph, params = nnx.split(tower)
    pooled = jax.jit(lambda params, *batch: nnx.merge(graph, params).pooled(*batch).astype(np.float32))
    return lambda *batch: np.array(pooled(params, *batch))


def _image_batches(
    model: HybridCLIP, processor: CLIPProcessor, data: PicturePairs | Dataset, batch_size: int, done: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The features of the pictures from row `done` on, and which of them could be read; threads open them ahead."""
    opened, encode = _opener(data, processor), _compiled(model.vision)
    threads, size = usable_threads(), processor.image_size
    made = grain.MapDataset.range(done, len(data), batch_size).map(
        lambda start: [opened(row) for row in range(start, min(start + batch_size, len(data)))])
    for pictures in made.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)):
        there = np.array([not isinstance(picture, str) for picture in pictures])
        for picture in pictures:
            if isinstance(picture, str):
                warnings.warn(f"{picture}: training leaves it out", stacklevel=3)
        if not there.any() and len(pictures) == min(batch_size, len(data)):  # the last batch may be one picture
            raise ValueError(f"none of {len(pictures)} pictures can be read, the last of them {pictures[-1]}: are "
                             "their folders where they were?")
        pixels = np.zeros((batch_size, size, size, 3), np.uint8)  # the last batch is filled up: one compiled shape
        for place in np.flatnonzero(there):
            pixels[place] = pictures[place]
        yield encode(processor.normalize(pixels))[: len(pictures)], there


def _opener(data: PicturePairs | Dataset, processor: CLIPProcessor) -> Callable[[int], np.ndarray | str]:
    """The function from a row to the pixels of its picture, or to what to say where there are none."""
    if isinstance(data, PicturePairs):
        return lambda row: data.images[row]
    records, kind = _undecoded(data)

    def opened(row: int) -> np.ndarray | str:
        picture = records[int(row)][kind]
        content, path = (picture["bytes"], picture["path"]) if isinstance(picture, dict) else (None, picture)
        try:
            with Image.open(path if content is None else io.BytesIO(content)) as image:
                return processor.decoder(image)
        except Exception as error:  # a broken file can raise anything
            return f"{path or f'the picture of row {row}'} cannot be read ({type(error).__name__})"

    return opened


def _text_batches(
    model: HybridCLIP, processor: CLIPProcessor, texts: Iterator[str], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The features of texts; all are there."""
    encode = _compiled(model.text)
    while part := list(islice(texts, batch_size)):
        filled = part + part[:1] * (batch_size - len(part))
        tokens = processor.tokenize(filled, multiple=8)  # few widths, so few compilations
        yield encode(tokens["input_ids"], tokens["attention_mask"])[: len(part)], np.ones(len(part), bool)
