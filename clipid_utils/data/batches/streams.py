"""Rows of WebDataset tars and other `datasets` streams without end, from a position that a checkpoint can save."""

import json
import os
from collections.abc import Iterator, Sequence

import datasets
import grain
import numpy as np
from datasets.distributed import split_dataset_by_node

from clipid_utils.data.tars import tar_samples
from clipid_utils.pictures import PICTURE_SUFFIXES

# Names or endings of the columns that have the picture and the captions, the best first
PICTURE_COLUMNS = ("image", "image_path", "jpg", "jpeg", "png", *sorted(suffix[1:] for suffix in PICTURE_SUFFIXES))
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "json")


def tar_stream(files: Sequence[str | os.PathLike]) -> datasets.IterableDataset:
    """The samples of WebDataset tars as a stream for `stream_feed`; the columns are the endings of their files.

    For the samples see `tar_samples`; they may differ in their endings.
    """
    return datasets.IterableDataset.from_generator(_tar_rows, gen_kwargs={"files": [os.fspath(file) for file in files]})


def _tar_rows(files: list[str]) -> Iterator[dict]:
    for file in files:
        for name, sample in tar_samples(file):
            yield {"__key__": f"{file}/{name}", **sample}


def picture_and_captions(row: dict, columns: Sequence[str | None] = (None, None)) -> tuple[object, list[str]]:
    """The picture and the captions of a row, from the two `columns`; the lists above find a column that is None.

    A column fits if its name, or the part after its last dot, is in the list. The picture is a path, bytes, {"bytes",
    "path"} or None. The captions are a list without blank ones and nulls: each line of a text file in a tar, or of a
    JSON file its "captions", "caption" or "text".
    """
    pictures, captions = ([name] if name else known for name, known in zip(
        columns, (PICTURE_COLUMNS, CAPTION_COLUMNS), strict=True))
    name = next((name for name in _fitting(row, pictures) if row[name]), None)
    picture = row.get(name)
    if not isinstance(picture, dict) and "__key__" in row:  # a file in a tar
        picture = {"bytes": picture or b"", "path": row["__key__"] if name is None else f"{row['__key__']}.{name}"}
    texts = (clean_captions(_parsed(name, row[name])) for name in _fitting(row, captions))
    return picture, next(filter(None, texts), [])


def _fitting(row: dict, wanted: Sequence[str]) -> list[str]:
    names = {name.lower(): name for name in row}
    exact = [names[name.lower()] for name in wanted if name.lower() in names]
    return exact + [name for end in wanted for low, name in names.items() if low.endswith(f".{end.lower()}")]


def _parsed(name: str, value: object) -> object:
    """The captions of a column; bytes are a file in a tar."""
    if isinstance(value, bytes):
        try:
            text = value.decode("utf-8-sig")
            value = json.loads(text) if name.lower().rpartition(".")[2] == "json" else text.splitlines()
        except (ValueError, RecursionError):  # neither UTF-8 nor JSON
            return None
    if isinstance(value, dict):
        value = next(filter(None, map(value.get, ("captions", "caption", "text"))), None)
    return value


def clean_captions(texts: object) -> list[str]:
    """One text or a list of texts as a list without blank ones and nulls."""
    texts = [texts] if isinstance(texts, str) else texts if isinstance(texts, list) else []
    return [text for text in texts if isinstance(text, str) and text.strip()]


class EndlessRows(grain.IterDataset):
    """This process's share of a stream's rows, undecoded, as (epoch, row), one epoch after the other.

    The files come in a different order each epoch (with `datasets` 4, which shuffles only by a buffer that it cannot
    restore, in the same order). The state is that of the stream after the last row. Raises ValueError for a stream, or
    a process's share of one, without rows.
    """

    def __init__(self, stream: datasets.IterableDataset, seed: int, process_index: int = 0, process_count: int = 1):
        super().__init__()
        self.stream, self.seed, self.process_index, self.process_count = stream, seed, process_index, process_count

    def __iter__(self) -> "_RowsIterator":
        return _RowsIterator(self)

    def epoch(self, number: int, state: dict | None) -> datasets.IterableDataset:
        """The stream of an epoch, to be read from `state` on."""
        # A new object each time: a stream remembers its last state, and would continue from there
        stream = split_dataset_by_node(self.stream, self.process_index, self.process_count)
        # Not the epoch alone, which shuffles alike for every seed, and not 0, which does not shuffle
        stream.set_epoch(1 + int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0]))
        if state is not None:
            stream.load_state_dict(state)
        return stream


class _RowsIterator(grain.DatasetIterator):
    def __init__(self, rows: EndlessRows):
        super().__init__()
        self.rows = rows
        self.set_state({"epoch": 0, "stream": None})

    def __next__(self) -> tuple[int, dict]:
        if self.reader is None:
            self.stream = self.rows.epoch(self.number, self.state)
            self.reader = iter(self.stream)
        row = next(self.reader, None)
        if row is None:
            if self.state is None:
                raise ValueError(f"the stream has no rows for process {self.rows.process_index} of "
                                 f"{self.rows.process_count}: check its files")
            self.set_state({"epoch": self.number + 1, "stream": None})
            return next(self)
        self.state = self.stream.state_dict()
        return self.number, row

    def get_state(self) -> dict:
        return {"epoch": self.number, "stream": self.state}

    def set_state(self, state: dict) -> None:
        self.number, self.state, self.stream, self.reader = state["epoch"], state["stream"], None, None

    def close(self) -> None:
        self.stream = self.reader = None  # closes the file
        super().close()
