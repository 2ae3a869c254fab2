"""Batches for training: from pictures in memory, from captions records and from streams, in an order of the seed's.

A batch holds `images` uint8 [b, H, W, 3], `input_ids` and `attention_mask` int32 [b, L], `concepts` int32 [b] (equal
numbers: one concept), `may_flip` bool [b] and `truncated` bool [b] (captions that were cut).
"""

import functools
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import datasets
import grain
import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from clipid_utils.data.batches.prefetch import Ahead, Steps
from clipid_utils.data.batches.streams import EndlessRows, picture_and_captions
from clipid_utils.data.captions import flip_allowed, sample_caption
from clipid_utils.files import decode_square, usable_threads
from clipid_utils.wording import group_phrase

MOST_UNREADABLE = 1000  # in a row: no few broken pictures any more but a folder that is not there


@dataclass(frozen=True)
class PicturePairs:
    """Pictures of one size with what their captions are drawn from; row i of each field is picture i."""

    images: UInt8[np.ndarray, "N H W 3"]
    concepts: Int[np.ndarray, " N"]  # equal numbers: one concept, or two of the same name
    names: list[str]
    keywords: list[list[str]]
    groups: list[str]
    may_flip: Bool[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows) -> "PicturePairs":
        """The given rows, in the given order."""
        rows = np.arange(len(self))[rows]
        return PicturePairs(self.images[rows], self.concepts[rows], [self.names[i] for i in rows],
                            [self.keywords[i] for i in rows], [self.groups[i] for i in rows], self.may_flip[rows])


def load_pairs(dataset: Dataset, size: int) -> PicturePairs:
    """The rows of a picture dictionary split as arrays, pictures at `size` pixels, resized as the processor does it.

    The Indonesian name of a picture's group is one of its keywords: people search for "hewan" too.
    """
    names = dataset["name_id"][:]
    number = {name: i for i, name in enumerate(sorted({name.lower() for name in names}))}
    images = np.empty((len(names), size, size, 3), np.uint8)
    for row, image in enumerate(dataset["image"]):
        images[row] = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    keywords = [list(dict.fromkeys([*words, group_phrase(group)]))
                for words, group in zip(dataset["keywords_id"], dataset["group_id"], strict=True)]
    letters = dataset["has_text"][:]
    may_flip = [flip_allowed(*row) for row in zip(names, keywords, letters, strict=True)]
    concepts = np.array([number[name.lower()] for name in names], np.int32)
    return PicturePairs(images, concepts, list(names), keywords, list(dataset["group"]), np.array(may_flip))


@dataclass(frozen=True)
class Feed:
    """This process's share of the batches of a whole run, endless, in an order fixed by the seed.

    `iter(feed.dataset)` has `get_state` and `set_state`: a new iterator with the state of an old one, which fits into
    JSON, gives exactly the batches that would have followed.
    """

    dataset: grain.IterDataset
    batch_size: int  # of all processes together
    steps_per_epoch: int | None  # None for a stream


def dictionary_feed(
    pairs: PicturePairs, tokenize: Callable, batch_size: int, *, seed: int, length: int, group_concepts: bool = False,
    process_index: int = 0, process_count: int = 1,
) -> Feed:
    """Batches of pictures in memory; each picture at most once an epoch, its caption drawn anew.

    `tokenize(texts, length, mark_truncated=True)` is the processor's. With `group_concepts` it is the concepts that are
    shuffled, and the pictures of each stand next to each other. Process p of P gets the p-th share of every batch. The
    rest of an epoch that fills no batch is left out. Raises ValueError where `batch_size` is more than there is or does
    not divide.
    """
    share = _share(batch_size, process_index, process_count)
    make, steps = _dictionary_batches(pairs, tokenize, batch_size, seed, length, group_concepts, share)
    return Feed(Steps(make), batch_size, steps)


def batches(
    pairs: PicturePairs, tokenize: Callable, batch_size: int, *, seed: int, epoch: int, length: int,
    group_concepts: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """One epoch of `dictionary_feed`, as a single process has it."""
    share = _share(batch_size, 0, 1)
    make, steps = _dictionary_batches(pairs, tokenize, batch_size, seed, length, group_concepts, share)
    yield from map(make, range(epoch * steps, (epoch + 1) * steps))


def _share(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide among {process_count} processes: choose a multiple")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index is {process_index}: of {process_count} processes the last is number "
                         f"{process_count - 1}")
    part = batch_size // process_count
    return slice(process_index * part, (process_index + 1) * part)


def _dictionary_batches(pairs, tokenize, batch_size, seed, length, group_concepts, share) -> tuple[Callable, int]:
    """The function from a step's number to its batch, and the steps of an epoch."""
    if batch_size > len(pairs):
        raise ValueError(f"batch_size {batch_size} is more than the {len(pairs)} pictures: choose a smaller one")
    steps = len(pairs) // batch_size

    @functools.lru_cache(2)  # made ahead, a batch may be of the next epoch already
    def order_of(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(pairs))
        if group_concepts:
            place = rng.permutation(pairs.concepts.max() + 1)
            order = order[np.argsort(place[pairs.concepts[order]], kind="stable")]
        return order

    def make(step: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(step, steps)
        rows = order_of(epoch)[place * batch_size : (place + 1) * batch_size][share]
        captions = [sample_caption(pairs.names[row], pairs.keywords[row], _rng(seed, epoch, row), pairs.groups[row])
                    for row in rows]
        return {"images": pairs.images[rows], "concepts": pairs.concepts[rows], "may_flip": pairs.may_flip[rows],
                **tokenize(captions, length, mark_truncated=True)}

    return make, steps


def _rng(seed: int, epoch: int, row: int | np.integer) -> np.random.Generator:
    """A generator of a row's own, so that what is drawn for it does not depend on who draws for the others."""
    return np.random.default_rng([seed, epoch, 1 + int(row)])  # a last 0 would be the same as none


def records_feed(
    records: Dataset, tokenize: Callable, image_size: int, batch_size: int, *, seed: int, length: int,
    workers: int = 0, process_index: int = 0, process_count: int = 1,
) -> Feed:
    """Batches of captions records: shuffled anew each epoch, one caption drawn for each, pictures decoded and resized.

    Pictures are made by `decode_square`, in `workers` processes or, where 0, in threads; the batches are the same. In a
    script, workers need the guard `if __name__ == "__main__":`. `concepts` holds the numbers of the records. A picture
    that cannot be read warns and gives its place to the next record that can; a thousand of them in a row raise
    ValueError. For the rest see `dictionary_feed`.
    """
    share = _share(batch_size, process_index, process_count)
    make, steps = _record_batches(records, tokenize, image_size, batch_size, seed, length, share)
    unreadable = _Unreadable()

    def finish(batch: dict) -> dict:
        unreadable.report(batch.pop("unreadable"))
        return batch

    return Feed(Steps(make, workers=workers, threads=usable_threads(), finish=finish), batch_size, steps)


def load_records(records: Dataset, size: int, most: int) -> PicturePairs:
    """The first `most` captions records as pictures in memory, to measure on; the first caption is the name.

    Pictures that cannot be read are left out with a warning; ValueError where none can.
    """
    kind = "image" if "image" in records.column_names else "image_path"
    records = records.with_format(None).select_columns([kind, "captions"]).select(range(min(most, len(records))))
    if kind == "image":
        records = records.cast_column(kind, datasets.Image(decode=False))
    images, captions, unreadable = [], [], _Unreadable()
    for picture, texts in zip(records[kind], records["captions"], strict=True):
        pixels = _decoded(picture, size, texts)
        if isinstance(pixels, Exception):
            unreadable.report([_trouble(picture, pixels)])
        else:
            images.append(pixels)
            captions.append(texts)
    if not images:
        raise ValueError(f"none of the {len(records)} pictures can be read: are their folders where they were?")
    names = [texts[0] for texts in captions]
    number = {name: i for i, name in enumerate(sorted({name.lower() for name in names}))}
    return PicturePairs(
        np.stack(images), np.array([number[name.lower()] for name in names], np.int32), names,
        [texts[1:] for texts in captions], [""] * len(names),
        np.array([flip_allowed(name, [], False) for name in names]),
    )


def _record_batches(records, tokenize, size, batch_size, seed, length, share) -> tuple[Callable, int]:
    """As `_dictionary_batches`; a batch also holds `unreadable`, what to say of the pictures that were."""
    if batch_size > len(records):
        raise ValueError(f"batch_size {batch_size} is more than the {len(records)} records: choose a smaller one")
    kind = "image" if "image" in records.column_names else "image_path"
    records = records.with_format(None).select_columns([kind, "captions"])
    if kind == "image":
        records = records.cast_column(kind, datasets.Image(decode=False))
    # No closure: worker processes get it by its name
    make = functools.partial(_record_batch, records=records, tokenize=tokenize, size=size, batch_size=batch_size,
                             seed=seed, length=length, share=share)
    return make, len(records) // batch_size


def _record_batch(
    step: int, *, records: Dataset, tokenize: Callable, size: int, batch_size: int, seed: int, length: int, share: slice
) -> dict:
    epoch, start = divmod(step, len(records) // batch_size)
    rows = _order(len(records), seed, epoch)[start * batch_size : (start + 1) * batch_size][share].copy()
    draws = np.random.default_rng([seed, step, 1]).random(batch_size)[share]  # a generator for each takes far longer
    images, captions, unreadable = np.empty((len(rows), size, size, 3), np.uint8), [], []
    for place, (picture, texts) in enumerate(zip(*records[rows].values(), strict=True)):
        tries = 1
        while isinstance(pixels := _decoded(picture, size, texts), Exception):
            unreadable.append(_trouble(picture, pixels))
            if tries == min(len(records), MOST_UNREADABLE):
                raise ValueError(f"none of {tries} pictures in a row can be read, the last of them "
                                 f"{_name(picture)}: are their folders where they were?") from pixels
            tries += 1
            rows[place] = (rows[place] + 1) % len(records)
            picture, texts = records[int(rows[place])].values()
        images[place] = pixels
        captions.append(texts[int(draws[place] * len(texts))])
    return {"images": images, "concepts": rows, "unreadable": unreadable, **_texts(captions, tokenize, length)}


@functools.lru_cache(2)  # made ahead, a batch may be of the next epoch already
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch; Grain's shuffle needs no memory, but far more time a row."""
    order = np.arange(count, dtype=np.int32)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


def stream_feed(
    stream: datasets.IterableDataset, tokenize: Callable, image_size: int, batch_size: int, *, seed: int, length: int,
    columns: tuple[str, str] | None = None, shuffle_window: int = 1000, process_index: int = 0, process_count: int = 1,
) -> Feed:
    """Batches of a stream, such as `load_dataset("webdataset", data_files=…, split="train", streaming=True)`.

    `columns` names the picture's column and the captions', where `picture_and_captions` does not find them. Each
    process reads files of its own where they divide evenly, else rows of its own. The files are shuffled each epoch,
    their rows in windows of `shuffle_window`, held undecoded and read again on resuming. `concepts` are checksums of
    the pictures. What cannot be read warns and gives its place to the next of its batch; a thousand in a row raise
    ValueError.
    """
    share = _share(batch_size, process_index, process_count)
    pool, unreadable, dark = ThreadPoolExecutor(usable_threads()), _Unreadable(), 0

    def make(rows: list[tuple[int, dict]]) -> dict[str, np.ndarray] | None:
        nonlocal dark
        pictures, texts = zip(*(picture_and_captions(row, columns) for _, row in rows), strict=True)
        pixels = list(pool.map(_decoded, pictures, [image_size] * len(rows), texts))
        good = [place for place, value in enumerate(pixels) if not isinstance(value, Exception)]
        unreadable.report([_trouble(pictures[place], pixels[place]) for place in range(len(rows)) if place not in good])
        dark = 0 if good else dark + len(rows)
        if dark >= MOST_UNREADABLE:
            raise ValueError(f"none of {dark} rows in a row can be read, the last of them {_name(pictures[-1])}: does "
                             "the stream hold pictures and captions?") from pixels[-1]
        if not good:
            return None
        places = [good[np.searchsorted(good, place) % len(good)] for place in range(len(rows))]
        sums = np.array([_checksum(pictures[place]) for place in places], np.uint32)
        captions = [texts[place][_rng(seed, rows[place][0], number).integers(len(texts[place]))]
                    for place, number in zip(places, sums, strict=True)]
        return {"images": np.stack([pixels[place] for place in places]), "concepts": sums.view(np.int32),
                **_texts(captions, tokenize, length)}

    rows = grain.experimental.WindowShuffleIterDataset(
        EndlessRows(stream, seed, process_index, process_count), window_size=shuffle_window, seed=_shuffle_seed(seed))
    made = rows.batch(share.stop - share.start, batch_fn=list).map(make).filter(lambda batch: batch is not None)
    return Feed(Ahead(made), batch_size, None)


def _texts(captions: list[str], tokenize: Callable, length: int) -> dict[str, np.ndarray]:
    may_flip = np.array([flip_allowed(caption, [], False) for caption in captions])
    return {"may_flip": may_flip, **tokenize(captions, length, mark_truncated=True)}


def _decoded(picture: str | bytes | dict | None, size: int, captions: list[str]) -> np.ndarray | Exception:
    """The pixels of a picture, or why there are none, or nothing to say of them."""
    try:
        if not captions:
            raise ValueError("it has no caption")
        if isinstance(picture, dict):
            picture = picture["bytes"] or picture["path"]
        return decode_square(picture, size)
    except Exception as error:  # a broken file can raise anything
        return error


def _name(picture: str | bytes | dict | None) -> str:
    picture = picture.get("path") if isinstance(picture, dict) else picture
    return picture if isinstance(picture, str) else "a picture without a name"


def _trouble(picture: str | bytes | dict | None, error: Exception) -> str:
    return f"{_name(picture)} cannot be read ({type(error).__name__})"  # its text may name a place in memory


def _checksum(picture: str | bytes | dict) -> int:
    picture = (picture["bytes"] or picture["path"]) if isinstance(picture, dict) else picture
    return zlib.crc32(picture.encode() if isinstance(picture, str) else picture)


class _Unreadable:
    """Warns of pictures that cannot be read, with their number: of the first, the second, the fourth, the eighth, …"""

    def __init__(self):
        self.seen = set()

    def report(self, messages: list[str]) -> None:
        for message in set(messages) - self.seen:
            self.seen.add(message)
            count = len(self.seen)
            if count & (count - 1) == 0:
                warnings.warn(f"{message}: another takes its place ({count} of them so far)", stacklevel=2)


def _shuffle_seed(seed: int) -> int:
    """Grain adds the epoch to its seed: neighbouring seeds would see each other's epochs."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
