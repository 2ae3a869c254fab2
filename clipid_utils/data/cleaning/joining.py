"""Joins sets of captions records into training and validation, by picture, without leaks.

    report = Report()
    rows = join(["cc3m.jsonl", "coco.jsonl", "wit.jsonl"], "train.jsonl", "validation.jsonl", report, work="work",
                weights={"wit": 2, "cc3m": 0.5}, held_out=["xflickrco.jsonl", "xm3600.jsonl"])

The side of a picture depends only on its bytes (SHA-256) and on whether it has a near copy. So a picture is on the same
side in every set, for every order of the sets and for all its captions. A new set, to train on or to hold out, can move
a picture from validation to training, if the set has a near copy of it. A new set never moves a picture back.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Int

from clipid_utils.data.captions import read_captions, write_captions
from clipid_utils.data.cleaning.near_copies import CHUNK, NearIndex, Signatures, sign_all
from clipid_utils.data.report import Report
from clipid_utils.files import file_identity
from clipid_utils.pictures import picture_source

UNREADABLE, HELD_OUT, TRAIN, VALIDATION = range(4)  # the side of a row
REASONS = {UNREADABLE: "picture cannot be read", HELD_OUT: "copy of a picture that is held out"}


def join(
    files: Sequence[str | os.PathLike], train: str | os.PathLike, validation: str | os.PathLike, report: Report, *,
    work: str | os.PathLike, validation_share: float = 0.05, weights: dict[str, int | float] | None = None,
    held_out: Sequence[str | os.PathLike] = (), seed: int = 0,
) -> dict[str, Counter]:
    """Writes the records of the files to `train` and `validation` (.jsonl or .parquet). Returns their counts by source.

    About `validation_share` of the pictures are drawn for validation; those with a near copy (near_copies.py), also in
    the mirror, go to training. Pictures of the `held_out` files and their near copies are on neither side, nor are
    pictures that cannot be read. A training row comes as often as the weight of its source says: 2 is twice, 0.5 is
    every other picture, drawn by `seed`. The folder `work` keeps the signatures (3 KB a picture): an interrupted call
    continues from there, and a later call with more sets is faster. Raises ValueError for bad records, for a split
    other than train or validation, and for a weight of a source that does not exist.
    """
    sets = [_read(path) for path in files]
    named = "image" if "image" in sets[0].column_names else "image_path"
    for path, records in zip(files, sets, strict=True):
        if named not in records.column_names:
            raise ValueError(f"{path}: no column {named!r}, which {files[0]} has: join files with pictures inside "
                             "(into .parquet) apart from files with paths")
    others = [_read(path, held_out=True) for path in held_out]
    Path(work).mkdir(parents=True, exist_ok=True)
    signed = [_signed(path, part, Path(work)) for path, part in zip([*files, *held_out], sets + others, strict=True)]
    keys, records = np.concatenate([key for key, _ in signed]), datasets.concatenate_datasets(sets)
    held = np.arange(len(keys)) >= len(records)
    ends = np.cumsum([len(key) for key, _ in signed])

    def thumbnails(rows: np.ndarray) -> np.ndarray:  # of all sets, which together may be larger than memory
        places = zip(np.searchsorted(ends, rows, "right"), rows, strict=True)
        return np.stack([signed[part][1][row - ends[part]] for part, row in places])

    side = sides(keys, thumbnails, held, validation_share)[: len(records)]
    times = np.where(side == TRAIN, _times(records["source"], keys, weights or {}, seed), side == VALIDATION)
    names = (f"{Path(path).name}, record {row}" for path, part in zip(files, sets, strict=True)
             for row in range(1, len(part) + 1))
    shown = _rows(records.select_columns(named if named == "image_path" else "source"))
    for name, row, kind, count in zip(names, shown, side, times, strict=True):
        reason = None if count else REASONS.get(kind, "the weight of its source")
        report.count(reason, f"{name}: {row.get('image_path', '')!r}")
    counts = {}
    for split, path, wanted in (("train", train, TRAIN), ("validation", validation, VALIDATION)):
        counts[split] = Counter()
        write_captions(_chosen(records, np.where(side == wanted, times, 0), split, counts[split]), path)
    return counts


def _read(path: str | os.PathLike, held_out: bool = False) -> Dataset:
    records = read_captions(path)
    known = set() if held_out else set(records.unique("split")) - {None, "train", "validation"}
    if known:
        raise ValueError(f"{path}: rows of split {', '.join(sorted(known))}: name the file under held_out=, or write "
                         "train, validation or null")
    return records


def _signed(path, records: Dataset, work: Path) -> tuple[np.ndarray, np.ndarray]:
    """The keys and thumbnails of a set's pictures, in files whose name changes with the set's file."""
    def pictures(start: int) -> Iterator[str | bytes]:
        for row in _rows(records.select(range(start, len(records)))):
            yield picture_source(row.get("image") or row["image_path"])

    place = hashlib.sha256(str(Path(path).absolute()).encode()).hexdigest()[:8]
    return sign_all(pictures, len(records), work / f"{Path(path).stem}-{place}-{file_identity(path)}")


def _rows(records: Dataset) -> Iterator[dict]:
    for table in records.with_format("arrow").iter(100):  # pictures stay encoded
        yield from table.to_pylist()


def sides(
    keys: np.ndarray, thumbnails: Callable[[np.ndarray], np.ndarray], held: Bool[np.ndarray, " N"],
    validation_share: float,
) -> Int[np.ndarray, " N"]:
    """UNREADABLE, HELD_OUT, TRAIN or VALIDATION for each row of `keys` (KEYS); the rows `held` are held out."""
    content = np.ascontiguousarray(keys["sha256"])
    _, first, picture = np.unique(content.view("V32")[:, 0], return_index=True, return_inverse=True)
    keys, readable = keys[first], content[first].any(axis=1)  # from here on a row is a picture
    drawn = content[first, :8].copy().view(">u8")[:, 0] / 2**64 < validation_share

    among = np.flatnonzero(readable)
    index = NearIndex(lambda numbers: thumbnails(first[among[numbers]]))
    index.add(keys["hash"][among])

    def copies(numbers: np.ndarray, one_is_enough: bool = False) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(numbers), CHUNK):
            own = numbers[start : start + CHUNK]
            seen = thumbnails(first[among[own]])
            for name, shown in (("hash", seen), ("mirrored", seen[:, :, ::-1])):
                for row, found in index.find(Signatures(keys[name][among[own]], shown), own, one_is_enough):
                    yield own[row], found

    held_out, copied = np.zeros(len(first), bool), np.zeros(len(among), bool)
    held_out[picture[held]] = True
    out = held_out[among]
    for _, found in copies(np.flatnonzero(out)):
        out[found] = True
    # Near copies that are held out count too: otherwise holding out more would move pictures back to validation
    for number, _ in copies(np.flatnonzero(drawn[among] & ~out), one_is_enough=True):
        copied[number] = True
    side = np.full(len(first), UNREADABLE)
    side[among] = np.select([out, drawn[among] & ~copied], [HELD_OUT, VALIDATION], TRAIN)
    return side[picture]


def _times(
    sources: Iterable[str | None], keys: np.ndarray, weights: dict[str, int | float], seed: int
) -> Int[np.ndarray, " N"]:
    """How often each row comes in training: its source's weight, the fraction drawn by seed and picture."""
    times, known = [], set()
    for name, content in zip(sources, keys["sha256"], strict=False):  # the rows that are held out come last
        known.add(name)
        digest = hashlib.sha256(b"%d " % seed + content.tobytes()).digest()
        times.append(int(weights.get(name, 1) + int.from_bytes(digest[:8], "big") / 2**64))  # rounded down
    if strange := set(weights) - known:
        raise ValueError(f"weights: no rows of source {', '.join(sorted(strange))}: the sources are "
                         f"{', '.join(sorted(map(str, known)))}")
    return np.array(times, np.int64)


def _chosen(records: Dataset, times: np.ndarray, split: str, count: Counter) -> Iterator[dict]:
    """The rows, each as often as `times` says, with their `split`; counts them by source."""
    for record, often in zip(_rows(records), times.tolist(), strict=True):
        if often:
            count[record["source"]] += often
            yield from [{**record, "split": split}] * often
