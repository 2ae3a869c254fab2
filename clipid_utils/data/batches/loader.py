"""Batches for training: from pictures in memory, from captions records and from streams, in an order set by the seed.

A batch has `images` uint8 [b, H, W, 3], `input_ids` and `attention_mask` int32 [b, L], `concepts` int32 [b] (equal
numbers: the same concept or picture), `caption_ids` int32 [b, 2] (equal: the same caption), `may_flip` bool [b] and
`truncated` bool [b] (captions that were cut).
"""

import functools
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import datasets
import grain
import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Int, UInt8

from clipid_utils.data.batches.decoding import MOST_UNREADABLE, Skipped, picture_name, trouble, try_decode
from clipid_utils.data.batches.prefetch import Ahead, Steps
from clipid_utils.data.batches.streams import EndlessRows, clean_captions, picture_and_captions
from clipid_utils.data.captions import caption_ids, flip_allowed, sample_caption
from clipid_utils.files import usable_threads
from clipid_utils.pictures import decode_square, picture_source
from clipid_utils.wording import group_phrase


@dataclass(frozen=True)
class PicturePairs:
    """Pictures of one size with the texts that their captions are drawn from; row i of each field is picture i."""

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


def load_pairs(dataset: Dataset, size: int, decode: Callable | None = None) -> PicturePairs:
    """The rows of a picture dictionary split as arrays, with pictures of `size` pixels.

    `decode` turns a path or the bytes of a file into uint8 [size, size, 3]; by default it is `decode_square`. The
    Indonesian name of a picture's group is one of its keywords: people search for "hewan" too.
    """
    decode = decode or functools.partial(decode_square, size=size)
    names = dataset["name_id"][:]
    images = np.empty((len(names), size, size, 3), np.uint8)
    for row, picture in enumerate(dataset.cast_column("image", datasets.Image(decode=False))["image"]):
        images[row] = decode(picture_source(picture))
    keywords = [list(dict.fromkeys([*words, group_phrase(group)]))
                for words, group in zip(dataset["keywords_id"], dataset["group_id"], strict=True)]
    may_flip = [flip_allowed(*row) for row in zip(names, keywords, dataset["has_text"], strict=True)]
    return PicturePairs(images, _numbers(names), list(names), keywords, list(dataset["group"]), np.array(may_flip))


def load_records(records: Dataset, size: int, most: int, decode: Callable | None = None) -> PicturePairs:
    """The first `most` captions records as pictures in memory, to measure on; the first caption is the name.

    Pictures that cannot be read are left out, with a warning that counts them. Raises ValueError if none can be read.
    """
    decode = decode or functools.partial(decode_square, size=size)
    images, captions, skipped, count = [], [], [], min(most, len(records))
    for picture, texts in zip(*undecoded(records)[:count].values(), strict=True):
        pixels = try_decode(decode, picture, texts := clean_captions(texts))
        if isinstance(pixels, Exception):
            skipped.append(trouble(picture, pixels))
        else:
            images.append(pixels)
            captions.append(texts)
    if not images:
        raise ValueError(f"none of the {count} pictures can be read: are they still in their folders?")
    if skipped:
        warnings.warn(f"{len(skipped)} of {count} pictures are left out: {'; '.join(skipped[:3])} …", stacklevel=2)
    names = [texts[0] for texts in captions]
    return PicturePairs(np.stack(images), _numbers(names), names, [texts[1:] for texts in captions], [""] * len(names),
                        np.array([flip_allowed(name, [], False) for name in names]))


def _numbers(names: list[str]) -> Int[np.ndarray, " N"]:
    """The same number for names that differ at most in case."""
    return np.unique([name.lower() for name in names], return_inverse=True)[1].astype(np.int32)


@dataclass(frozen=True)
class Feed:
    """This process's share of the batches of a whole run, endless, in an order set by the seed.

    `iter(feed.dataset)` has `get_state` and `set_state`: a new iterator with the state of an old one, which JSON can
    store, gives exactly the batches that would have followed.
    """

    dataset: grain.IterDataset
    batch_size: int  # of all processes together
    steps_per_epoch: int | None  # None for a stream


def dictionary_feed(
    pairs: PicturePairs, tokenize: Callable, batch_size: int, *, seed: int, length: int, group_concepts: bool = False,
    process_index: int = 0, process_count: int = 1,
) -> Feed:
    """Batches of pictures in memory. Each picture comes at most once an epoch, each time with a newly drawn caption.

    `tokenize(texts, length, mark_truncated=True)` is the processor's. With `group_concepts`, concepts are shuffled, and
    the pictures of each stay together. Process p of P gets the p-th share of every batch. The rest of an epoch that
    does not fill a batch is left out. Raises ValueError if `batch_size` is larger than the data, or cannot be divided
    among the processes.
    """
    share, steps = _share(batch_size, process_index, process_count, len(pairs)), len(pairs) // batch_size

    @functools.lru_cache(2)  # a batch that is made ahead may be of the next epoch already
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
        return {"images": pairs.images[rows], "concepts": pairs.concepts[rows],
                **_texts(captions, tokenize, length, pairs.may_flip[rows])}

    return Feed(Steps(make), batch_size, steps)


def _share(batch_size: int, process_index: int, process_count: int, pictures: float | int = np.inf) -> slice:
    """The places in a batch that belong to a process."""
    if batch_size > pictures:
        raise ValueError(f"batch_size {batch_size} is more than the {pictures} pictures: choose a smaller one")
    if batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} cannot be divided among {process_count} processes: "
                         "choose a multiple")
    part = batch_size // process_count
    return slice(process_index * part, (process_index + 1) * part)


def _rng(seed: int, epoch: int, row: int | np.integer) -> np.random.Generator:
    """A random generator for each row, so that its numbers do not depend on the process that makes the other rows."""
    return np.random.default_rng([seed, epoch, 1 + int(row)])  # a last 0 would be the same as none


def records_feed(
    records: Dataset, tokenize: Callable, image_size: int, batch_size: int, *, seed: int, length: int,
    decode: Callable | None = None, workers: int = 0, process_index: int = 0, process_count: int = 1,
) -> Feed:
    """Batches of captions records: shuffled again each epoch, one caption drawn for each, pictures decoded and resized.

    `decode` turns a path or the bytes of a file into uint8 [H, W, 3]: `CLIPProcessor.decoder`, or by default
    `decode_square` to `image_size`. It runs in `workers` processes or, if 0, in threads; the batches are the same. In a
    script, workers need the guard `if __name__ == "__main__":`. `concepts` are checksums of the pictures' paths or
    bytes: records of one picture are positives of each other. A picture that cannot be read is skipped and counted, and
    the next record takes its place; a thousand of them one after the other raise ValueError. For the other arguments
    see `dictionary_feed`.
    """
    share, steps = _share(batch_size, process_index, process_count, len(records)), len(records) // batch_size
    decode = decode or functools.partial(decode_square, size=image_size)
    make = functools.partial(  # not a closure: worker processes get it by its name
        _record_batch, undecoded(records), decode, tokenize, length, batch_size, seed, share)
    return Feed(Steps(make, workers=workers, threads=usable_threads()), batch_size, steps)


def undecoded(records: Dataset) -> Dataset:
    """The pictures of records, as paths or as bytes, and their captions."""
    kind = "image" if "image" in records.column_names else "image_path"
    records = records.with_format(None).select_columns([kind, "captions"])
    return records.cast_column(kind, datasets.Image(decode=False)) if kind == "image" else records


def _record_batch(records, decode, tokenize, length, batch_size, seed, share, step: int) -> dict:
    """The batch of a step; its `troubles` are one line about each picture that cannot be read."""
    epoch, place = divmod(step, len(records) // batch_size)
    rows = _order(len(records), seed, epoch)[place * batch_size : (place + 1) * batch_size][share].copy()
    draws = np.random.default_rng([seed, step, 1]).random(batch_size)[share]  # a generator for each is much slower
    images, captions, concepts, troubles = [], [], [], []
    for place, (picture, texts) in enumerate(zip(*records[rows].values(), strict=True)):
        tries = 1
        while isinstance(pixels := try_decode(decode, picture, texts := clean_captions(texts)), Exception):
            troubles.append(trouble(picture, pixels))
            if tries == min(len(records), MOST_UNREADABLE):
                raise ValueError(f"none of {tries} pictures one after the other can be read, the last is "
                                 f"{picture_name(picture)}: are they still in their folders?") from pixels
            tries += 1
            rows[place] = (rows[place] + 1) % len(records)
            picture, texts = records[int(rows[place])].values()
        images.append(pixels)
        concepts.append(_checksum(picture))
        captions.append(texts[int(draws[place] * len(texts))])
    texts = _texts(captions, tokenize, length)
    return {"images": np.stack(images), "concepts": np.array(concepts, np.uint32).view(np.int32),
            "troubles": troubles, **texts}


def _checksum(picture: object) -> int:
    return zlib.crc32(os.fsencode(picture_source(picture)))


@functools.lru_cache(2)  # a batch that is made ahead may be of the next epoch already
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch. Grain's shuffle needs no memory, but far more time for each row."""
    order = np.arange(count, dtype=np.int32)
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


def stream_feed(
    stream: datasets.IterableDataset, tokenize: Callable, image_size: int, batch_size: int, *, seed: int, length: int,
    columns: Sequence[str | None] = (None, None), decode: Callable | None = None, shuffle_window: int = 1000,
    process_index: int = 0, process_count: int = 1,
) -> Feed:
    """Batches of a stream: `tar_stream(files)`, or `load_dataset("parquet", …, streaming=True)` and its like.

    `columns` names the picture's column and the captions' column; one that is None is found by its usual names. Each
    process reads its own files if they divide evenly, else its own rows. The files are shuffled each epoch, and their
    rows in windows of `shuffle_window`, which are kept undecoded and read again when a run resumes. `concepts` are
    checksums of the pictures. Rows without a caption or a readable picture are skipped and counted; a thousand of them
    one after the other raise ValueError. For `decode` see `records_feed`.
    """
    share = _share(batch_size, process_index, process_count)
    stream = stream.decode(False) if stream.features else stream
    decode, skipped, bad = decode or functools.partial(decode_square, size=image_size), Skipped(), 0

    def make(rows: list[tuple[int, dict]]) -> dict[str, np.ndarray] | None:
        nonlocal bad
        pictures, texts = zip(*(picture_and_captions(row, columns) for _, row in rows), strict=True)
        with ThreadPoolExecutor(usable_threads()) as pool:
            pixels = list(pool.map(functools.partial(try_decode, decode), pictures, texts))
        good = [place for place, value in enumerate(pixels) if not isinstance(value, Exception)]
        skipped.report([trouble(pictures[place], pixels[place]) for place in range(len(rows)) if place not in good])
        bad = 0 if good else bad + len(rows)
        if bad >= MOST_UNREADABLE:
            raise ValueError(f"none of {bad} rows one after the other has a caption and a readable picture, the last "
                             f"is {picture_name(pictures[-1])} with the columns {', '.join(rows[-1][1])}: check the "
                             "pictures, or name the columns with --image-column and --caption-column") from pixels[-1]
        if not good:
            return None
        sums = np.array([_checksum(pictures[place]) for place in good], np.uint32)
        captions = [texts[place][_rng(seed, rows[place][0], number).integers(len(texts[place]))]
                    for place, number in zip(good, sums, strict=True)]
        return {"images": np.stack([pixels[place] for place in good]), "concepts": sums.view(np.int32),
                **_texts(captions, tokenize, length)}

    count = share.stop - share.start
    rows = grain.experimental.WindowShuffleIterDataset(
        EndlessRows(stream, seed, process_index, process_count), window_size=shuffle_window, seed=_shuffle_seed(seed))
    made = rows.batch(count, batch_fn=list).map(make).filter(lambda batch: batch is not None)
    return Feed(Ahead(grain.experimental.RebatchIterDataset(made, count)), batch_size, None)


def _texts(captions: list[str], tokenize: Callable, length: int, may_flip: np.ndarray | None = None) -> dict:
    if may_flip is None:
        may_flip = np.array([flip_allowed(caption, [], False) for caption in captions])
    tokens = tokenize(captions, length, mark_truncated=True)
    return {"may_flip": may_flip, "caption_ids": caption_ids(captions), **tokens}


def _shuffle_seed(seed: int) -> int:
    """Grain adds the epoch to its seed: neighbouring seeds would see each other's epochs."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
