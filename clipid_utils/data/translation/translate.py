"""English captions into Indonesian on CTranslate2: every core busy, resumable, and nothing lost where a model fails.

    translator = Translator()                          # the small model of data/translator
    translator = Translator("Helsinki-NLP/opus-mt-en-id")
    translator(["a red car"])                          # [Translation(text='mobil merah', mark='')]
    translate_rows("captions.jsonl", "translated", translator)
"""

import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import ctranslate2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece
from tqdm.auto import tqdm

from clipid_utils.data.report import Report
from clipid_utils.data.shards import (
    Source,
    count_rows,
    finished_shards,
    is_path,
    move_paths,
    only_writer,
    read_tables,
    write_table,
)
from clipid_utils.data.translation.marian import PIECES, converted_folder
from clipid_utils.paths import DATA

OURS = DATA / "translator"
LONGEST, MOST = 200, 256  # pieces of a sentence and of a translation; opus-mt translates nothing longer well
REMEMBERED = 200_000  # texts whose translation is kept for their next occurrence
ROWS_A_CORE = 4096  # of a shard, which a kill costs: as many a core, so that it costs as long on any number of them
# A word, or two to four of them, at least three times in a row; two to eight letters at least five times.
_RUN = re.compile(r"(?<!\S)(\S+(?:\s+\S+){0,3}?)(?:[\s,]+\1){2,}(?!\S)|(\S{2,8}?)\2{4,}")


class Translation(NamedTuple):
    """A text in the other language, or the text as it was and why: mark is "" or "empty", "too long", "loops" or
    "failed"."""

    text: str
    mark: str = ""


def loops(text: str, source: str = "") -> bool:
    """Whether a translation says one thing over and over, which its source does not: a model's way to get stuck.

    A word or up to four words three times in a row, or a few letters five times ("kukukukuku").
    """
    return bool(_RUN.search(text.lower())) and not _RUN.search(source.lower())


class Translator:
    """A Marian model on CTranslate2: a list of texts in, a list of as many Translations out, in their order.

    `model` is a folder or an id on the hub, as `converted_folder` takes them. On a CPU it computes in int8, with
    `threads` sentences' batches side by side, one core each: cores that share a batch wait for each other several times
    a layer. On a GPU, taken where there is one unless `device` says "cpu", in float16. `batch_tokens` bounds a batch:
    sentences times the longest's pieces. Raises what `converted_folder` raises, ValueError for a device that is not
    there.
    """

    def __init__(
        self, model: str | os.PathLike = OURS, *, beam: int = 4, device: str = "auto", threads: int | None = None,
        batch_tokens: int | None = None,
    ):
        gpus = ctranslate2.get_cuda_device_count() if device != "cpu" else 0
        if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not gpus):
            raise ValueError(f"device {device!r}: this machine has {gpus} GPUs for CTranslate2; give 'cpu' or 'auto'")
        self.name, self.beam = os.fspath(model), beam
        self.workers = gpus or threads or usable_cores()
        self.batch_tokens = batch_tokens or (16_384 if gpus else 200)  # few on a CPU, for its caches
        folder = converted_folder(model, "float16" if gpus else "int8")
        self._source, self._target = (
            sentencepiece.SentencePieceProcessor(model_file=str(folder / name)) for name in PIECES
        )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._end = [] if config.get("add_source_eos") else [config.get("eos_token", "</s>")]
        self.engine = ctranslate2.Translator(
            str(folder), device="cuda" if gpus else "cpu", device_index=list(range(gpus)) or 0,
            compute_type="float16" if gpus else "int8", inter_threads=1 if gpus else self.workers, intra_threads=1,
            max_queued_batches=-1,
        )
        self._known: dict[str, Translation] = {}

    def __call__(self, texts: list[str], tick: Callable[[int], object] | None = None) -> list[Translation]:
        """The texts' translations; each different text is translated once, also over several calls.

        `tick` is called with the number of texts that are done anew. A text that is blank, longer than LONGEST pieces,
        loops in the translation, ends in nothing, or on which the engine fails comes back as it was, with its mark.
        """
        times, tick = Counter(texts), tick or (lambda count: None)
        found = {text: self._known[text] for text in times if text in self._known}
        tick(sum(times[text] for text in found))
        for text, translation in self._translate([text for text in times if text not in found]):
            found[text] = self._known[text] = translation
            tick(times[text])
        while len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        return [found[text] for text in texts]

    def _translate(self, texts: list[str]) -> Iterator[tuple[str, Translation]]:
        pieces = self._source.encode(texts, out_type=str)
        waiting: deque = deque()
        for text, words in zip(texts, pieces, strict=True):
            if not 0 < len(words) <= LONGEST:
                yield text, Translation(text, "too long" if words else "empty")
        fit = {text: words for text, words in zip(texts, pieces, strict=True) if 0 < len(words) <= LONGEST}
        texts, pieces = list(fit), list(fit.values())
        for batch in batches_by_length([len(words) for words in pieces], self.batch_tokens):
            waiting.append((batch, self._submit([pieces[i] for i in batch])))
            # Enough that no core waits for the next batch, and so few that an interrupt does not wait for them
            if len(waiting) > 2 * self.workers:
                yield from self._collect(texts, pieces, *waiting.popleft())
        while waiting:
            yield from self._collect(texts, pieces, *waiting.popleft())

    def _submit(self, batch: list[list[str]]) -> list:
        return self.engine.translate_batch(
            [words + self._end for words in batch], asynchronous=True, beam_size=self.beam, disable_unk=True,
            max_input_length=0, max_decoding_length=max(map(_limit, batch)),
        )

    def _collect(self, texts, pieces, batch, futures) -> Iterator[tuple[str, Translation]]:
        for i, future in zip(batch, futures, strict=True):
            words = _result(future)
            if words is None:  # a batch fails as a whole, most of its sentences alone do not
                words = _result(self._submit([pieces[i]])[0])
            yield texts[i], self._checked(texts[i], words, _limit(pieces[i]))

    def _checked(self, source: str, words: list[str] | None, limit: int) -> Translation:
        if words is None:
            return Translation(source, "failed")
        text = self._target.decode(words).replace("▁", " ").strip()  # in pieces that only the source's model has
        if len(words) >= limit or loops(text, source):
            return Translation(source, "loops")
        return Translation(text) if text else Translation(source, "empty")


def _result(future) -> list[str] | None:
    try:
        return future.result().hypotheses[0]
    except (RuntimeError, MemoryError):
        return None


def _limit(pieces: list[str]) -> int:
    """Pieces after which the translation of so many counts as one that does not end."""
    return min(MOST, 2 * len(pieces) + 16)


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batches_by_length(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Places in `lengths`, the longest first, in batches of at most `tokens`: members times the longest of them.

    So padding is small, and the largest batch comes first: where memory does not suffice, that shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        count = max(1, tokens // max(1, lengths[order[0]]))
        yield order[:count]
        order = order[count:]


# --- Tables and files -------------------------------------------------------------------------------------------------


def translate_table(
    table: pa.Table, column: str, translator: Translator, tick: Callable[[int], object] | None = None
) -> pa.Table:
    """The table with the column, texts or lists of texts, in Indonesian, and two more columns after it.

    `<column>_en` holds the English, `<column>_mark` the Translations' marks; a null becomes an empty text. Raises
    ValueError where there is no such column.
    """
    if column not in table.column_names:
        raise ValueError(f"the rows have the columns {', '.join(table.column_names)} and no {column!r}: name the "
                         "English's with column=…")
    place, english = table.column_names.index(column), table[column].combine_chunks()
    translations = translator(column_texts(english), tick)
    texts = pa.array([translation.text for translation in translations], pa.string())
    marks = pa.array([translation.mark for translation in translations], pa.string())
    table = table.set_column(place, column, _like(english, texts))
    return table.add_column(place + 1, f"{column}_en", english).add_column(place + 2, f"{column}_mark",
                                                                          _like(english, marks))


def column_texts(column: pa.Array | pa.ChunkedArray) -> list[str]:
    """The texts of a column of texts or of lists, one after the other; a null is an empty one."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return (column.flatten() if pa.types.is_nested(column.type) else column).fill_null("").to_pylist()


def _like(column: pa.Array, texts: pa.Array) -> pa.Array:
    """The texts in the lists that a column has."""
    if not pa.types.is_nested(column.type):
        return texts
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), texts)


def translate_rows(
    source: Source, out: str | os.PathLike, translator: Translator, *, column: str = "captions",
    shard_rows: int | None = None, progress: bool = True,
) -> Report:
    """Translates a column of a .jsonl or .parquet file, or of records, into Parquet shards, `out/part-00000.parquet` …

    The column becomes what `translate_table` makes of it; all else stays, but a relative `image_path` of a file, which
    then starts at `out`. Rows keep their order. Killed at any moment and called again, it goes on after the last whole
    shard (records must come in the same order again) and neither loses nor repeats a row.

    The Report counts texts, those of earlier runs too: kept is what was translated, dropped what stayed English. Raises
    ValueError for rows or a folder that do not fit, and RuntimeError where another process writes to `out`.
    """
    out, report, done = Path(out), Report(), 0
    path = Path(source).absolute() if is_path(source) else None
    settings = {"model": translator.name, "beam": translator.beam, "source": path and path.name, "column": column}
    with only_writer(out):
        shards = finished_shards(out, settings)
        for shard in shards:
            done += _count(report, pq.read_table(shard, columns=[f"{column}_en", f"{column}_mark"]), column)
        schema = pq.read_schema(shards[0]) if shards else None
        for name in (f"{column}_en", f"{column}_mark") if schema else ():
            schema = schema.remove(schema.get_field_index(name))
        number, total = len(shards), count_rows(source)
        with tqdm(initial=report.read, unit=" captions", desc="translating", disable=not progress) as bar:
            for table in read_tables(source, shard_rows or ROWS_A_CORE * translator.workers, done, schema):
                if total and column in table.column_names:  # of captions, were there as many a row in all of it
                    bar.total = round(total * len(column_texts(table[column])) / table.num_rows)
                table = translate_table(table, column, translator, bar.update)
                table = move_paths(table, path.parent, out) if path else table
                write_table(table, out / f"part-{number:05}.parquet", settings)
                number += 1
                _count(report, table, column)
    return report


def _count(report: Report, table: pa.Table, column: str) -> int:
    """Counts a table's texts into the report and returns the number of its rows."""
    for english, mark in zip(column_texts(table[f"{column}_en"]), column_texts(table[f"{column}_mark"]), strict=True):
        report.drop(mark, english) if mark else report.keep()
    return table.num_rows

