"""Joins sets of captions records into training and validation, by picture, without leaks.

    report = Report()
    rows = join(["cc3m.jsonl", "coco.jsonl", "wit.jsonl"], "train.jsonl", "validation.jsonl", report, work="work",
                weights={"wit": 2, "cc3m": 0.5}, held_out=["xflickrco.jsonl", "xm3600.jsonl"])

Which side a picture is on follows from its bytes (SHA-256) and from whether there is a near copy of it, so that it is
the same whatever set the picture came in, whatever the order, and whatever the captions. One more set, to be trained on
or held out, may bring a picture from validation to training, by bringing a near copy of it, but never the other way.
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
from clipid_utils.data.cleaning.copy_search import CopySearch, sign_all
from clipid_utils.data.report import Report

UNREADABLE, HELD_OUT, TRAIN, VALIDATION = range(4)  # what becomes of a row
REASONS = {UNREADABLE: "picture cannot be read", HELD_OUT: "copy of a picture that is held out"}


def join(
    files: Sequence[str | os.PathLike], train: str | os.PathLike, validation: str | os.PathLike, report: Report, *,
    work: str | os.PathLike, validation_share: float = 0.05, weights: dict[str, int | float] | None = None,
    held_out: Sequence[str | os.PathLike] = (), seed: int = 0, progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, Counter]:
    """Writes the records of the files to `train` and `validation` (.jsonl, or .parquet), and counts each by source.

    Of the pictures about `validation_share` are drawn for validation, of which those with a near copy (near_copies.py),
    also one in the mirror, go to training. Pictures in `held_out`, files of records too, and near copies of them are in
    neither, nor are pictures that cannot be decoded. Each training row comes as often as the weight of its source says:
    2 is twice, 0.5 every other picture, drawn by `seed`. The folder `work` keeps what was found of each picture (3 KB),
    by which an interrupted call goes on and a later one with more sets is faster. Raises ValueError for bad records,
    for a split other than train or validation, and for a weight of a source that there is not.
    """
    sets = [_read(path) for path in files]
    named = "image" if "image" in sets[0].column_names else "image_path"
    for path, records in zip(files, sets, strict=True):
        if named not in records.column_names:
            raise ValueError(f"{path}: no column {named!r}, which {files[0]} has: join those with pictures inside "
                             "(into .parquet) and those with paths apart")
    others = [_read(path, held_out=True) for path in held_out]
    Path(work).mkdir(parents=True, exist_ok=True)
    signed = [_signed(path, records, Path(work), progress)
              for path, records in zip([*files, *held_out], [*sets, *others], strict=True)]
    keys = np.concatenate([key for key, _ in signed])
    held = np.arange(len(keys)) >= sum(map(len, sets))
    side = sides(keys, _Rows([thumbnails for _, thumbnails in signed]), held, validation_share)
    times = _times(sets, keys, weights or {}, seed)
    _count(files, sets, side, times, report)
    counts = {}
    for name, path, wanted in (("train", train, TRAIN), ("validation", validation, VALIDATION)):
        counts[name] = Counter()
        write_captions(_chosen(sets, side, wanted, times if wanted == TRAIN else None, name, counts[name]), path)
    return counts


def _read(path: str | os.PathLike, held_out: bool = False) -> Dataset:
    records = read_captions(path)
    if "image" in records.column_names:
        records = records.cast_column("image", datasets.Image(decode=False))
    known = set() if held_out else set(records.unique("split")) - {None, "train", "validation"}
    if known:
        raise ValueError(f"{path}: rows of split {', '.join(sorted(known))}: name the file under held_out=, or write "
                         "train, validation or null")
    return records


def _signed(path, records: Dataset, work: Path, progress: Callable) -> tuple[np.ndarray, np.ndarray]:
    """The keys and thumbnails of a set's pictures, under a name that changes with the file."""
    def pictures(start: int) -> Iterator[str | bytes]:
        for row in _rows(records.select(range(start, len(records)))):
            picture = row.get("image") or row["image_path"]
            yield picture["bytes"] or picture["path"] if isinstance(picture, dict) else picture

    stat = os.stat(path)
    version = repr((str(Path(path).absolute()), stat.st_size, stat.st_mtime_ns))
    name = f"{Path(path).stem}-{hashlib.sha256(version.encode()).hexdigest()[:12]}"
    return sign_all(pictures, len(records), work / name, progress)


def _rows(records: Dataset) -> Iterator[dict]:
    for chunk in records.iter(100):
        yield from (dict(zip(chunk, values, strict=True)) for values in zip(*chunk.values(), strict=True))


class _Rows:
    """Any rows of arrays one after the other, which together may be larger than memory."""

    def __init__(self, arrays: list[np.ndarray]):
        self.arrays, self.ends = arrays, np.cumsum([len(array) for array in arrays])

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        which = np.searchsorted(self.ends, rows, "right")
        for number in np.unique(which):
            here = which == number
            found[here] = self.arrays[number][rows[here] - self.ends[number] + len(self.arrays[number])]
        return found


def sides(
    keys: np.ndarray, thumbnails: Callable[[np.ndarray], np.ndarray], held: Bool[np.ndarray, " N"],
    validation_share: float,
) -> Int[np.ndarray, " N"]:
    """UNREADABLE, HELD_OUT, TRAIN or VALIDATION for each row of `keys` (KEYS); `held` rows are held out themselves."""
    content = np.ascontiguousarray(keys["sha256"])
    _, first, picture = np.unique(content.view("V32")[:, 0], return_index=True, return_inverse=True)
    keys, readable = keys[first], content[first].any(axis=1)
    drawn = content[first, :8].copy().view(">u8")[:, 0] / 2**64 < validation_share

    search = CopySearch(keys, lambda rows: thumbnails(first[rows]), np.flatnonzero(readable))
    out, copied = np.zeros(len(first), bool), np.zeros(len(first), bool)
    out[picture[held]] = True
    named = np.flatnonzero(out & readable)
    for mirrored in (False, True):
        for _, found in search.copies(named, mirrored):
            out[found] = True
    # Copies that are held out count here too: or else to hold more out would bring pictures back to validation
    for mirrored in (False, True):
        for row, _ in search.copies(np.flatnonzero(drawn & readable & ~out & ~copied), mirrored, one_is_enough=True):
            copied[row] = True
    side = np.select([~readable, out, drawn & ~copied], [UNREADABLE, HELD_OUT, VALIDATION], TRAIN)
    return side[picture]


def _times(sets: list[Dataset], keys: np.ndarray, weights: dict[str, int | float], seed: int) -> Int[np.ndarray, " N"]:
    """How often each row of the sets comes in training: its weight, the fraction drawn by seed and picture."""
    times, known = np.ones(sum(map(len, sets)), np.int64), set()
    sources = (row["source"] for records in sets for row in _rows(records.select_columns("source")))
    for row, source in enumerate(sources):
        known.add(source)
        if source in weights:
            digest = hashlib.sha256(b"%d " % seed + keys["sha256"][row].tobytes()).digest()
            times[row] = weights[source] + int.from_bytes(digest[:8], "big") / 2**64  # rounded down
    if strange := set(weights) - known:
        raise ValueError(f"weights: no rows of source {', '.join(sorted(strange))}: the sources are "
                         f"{', '.join(sorted(map(str, known)))}")
    return times


def _count(
    files: Sequence[str | os.PathLike], sets: list[Dataset], side: np.ndarray, times: np.ndarray, report: Report
) -> None:
    row = 0
    for path, records in zip(files, sets, strict=True):
        names = records.select_columns("image_path" if "image_path" in records.column_names else "source")
        for number, record in enumerate(_rows(names), 1):
            reason = REASONS.get(side[row])
            if side[row] == TRAIN and not times[row]:
                reason = "the weight of its source"
            if reason:
                report.drop(reason, f"{Path(path).name}, record {number}: {record.get('image_path', '')!r}")
            else:
                report.keep()
            row += 1


def _chosen(
    sets: list[Dataset], side: np.ndarray, wanted: int, times: np.ndarray | None, split: str, count: Counter
) -> Iterator[dict]:
    """The rows of one side, `times` each, named by their split, counted by source."""
    row = 0
    for records in sets:
        for record in _rows(records):
            if side[row] == wanted:
                for _ in range(1 if times is None else times[row]):
                    count[record["source"]] += 1
                    yield {**record, "split": split}
            row += 1
