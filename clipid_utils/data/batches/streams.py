"""The rows of a `datasets` stream without end, from a place that a checkpoint can hold."""

import datasets
import grain
import numpy as np
from datasets.distributed import split_dataset_by_node

# Where rows keep their picture and their captions: Parquet's and JSON's columns, then the endings in WebDataset's tars
PICTURE_COLUMNS = ("image", "image_path", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "json")


class EndlessRows(grain.IterDataset):
    """This process's share of a stream's rows, undecoded, as (epoch, row), one epoch after the other.

    The files come in another order each epoch (with `datasets` 4, which shuffles only by a buffer that it cannot
    restore, in the same). The state is that of the stream after the last row. Raises ValueError for a stream, or a
    process's share of one, without rows.
    """

    def __init__(self, stream: datasets.IterableDataset, seed: int, process_index: int = 0, process_count: int = 1):
        super().__init__()
        self.stream = stream.decode(False) if stream.features else stream
        self.seed, self.process_index, self.process_count = seed, process_index, process_count

    def __iter__(self) -> "_RowsIterator":
        return _RowsIterator(self)

    def epoch(self, number: int, state: dict | None) -> datasets.IterableDataset:
        """The stream of an epoch, to be read from `state` on."""
        # Another object each time: a stream remembers its last state, and would go on from there
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
                                 f"{self.rows.process_count}: check its data_files")
            self.set_state({"epoch": self.number + 1, "stream": None})
            return next(self)
        self.state = self.stream.state_dict()
        return self.number, row

    def get_state(self) -> dict:
        return {"epoch": self.number, "stream": self.state}

    def set_state(self, state: dict) -> None:
        self.number, self.state, self.stream, self.reader = state["epoch"], state["stream"], None, None


def picture_and_captions(row: dict, columns: tuple[str, str] | None = None) -> tuple:
    """What a row holds of the two `columns`, by default the first of the lists above that it has.

    The picture is a path, bytes, {"bytes", "path"} or None, the captions are a list without blank ones and nulls. Of a
    dict, such as JSON in a tar, they are its "captions" or "caption". Raises ValueError for rows without such columns.
    """
    pictures, captions = (PICTURE_COLUMNS, CAPTION_COLUMNS) if columns is None else ([columns[0]], [columns[1]])
    found = []
    for names in (pictures, captions):
        if not any(name in row for name in names):
            raise ValueError(f"the stream's rows have the columns {', '.join(row)}, none of {', '.join(names)}: "
                             "name the picture's and the captions' with columns=(…, …)")
        found.append(next((row[name] for name in names if row.get(name) is not None), None))
    picture, texts = found
    if isinstance(texts, dict):
        texts = texts.get("captions") or texts.get("caption")
    texts = [texts] if isinstance(texts, str) else texts or []
    return picture, [text for text in texts if isinstance(text, str) and text.strip()]
