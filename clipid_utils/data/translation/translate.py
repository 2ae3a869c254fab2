"""English captions into Indonesian on CTranslate2: it uses every core, and can be stopped and resumed.

    translator = Translator()                          # the small model of data/translator
    translator = Translator("Helsinki-NLP/opus-mt-en-id")
    translator(["a red car"])                          # [Translation(text='mobil merah', mark='')]
    translate_rows("captions.jsonl", "translated", translator)
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from clipid_utils.data import shards
from clipid_utils.data.report import Report
from clipid_utils.data.translation.checks import loops
from clipid_utils.data.translation.marian import SENTENCE_PIECES, converted_folder, model_folder
from clipid_utils.files import model_identity, need, read_json, usable_cores
from clipid_utils.paths import DATA

ctranslate2, sentencepiece = (need(name, "translate") for name in ("ctranslate2", "sentencepiece"))

SHIPPED = DATA / "translator"
MAX_SOURCE, MAX_TARGET = 200, 256  # pieces of a sentence and of a translation: opus-mt translates nothing longer well
REMEMBERED = 200_000  # texts whose translation is kept in memory, for when they come again
ROWS_A_CORE = 4096  # of a shard: a kill then costs the same time on any number of cores


class Translation(NamedTuple):
    """A text in the other language; or the text as it was, and why: "empty", "too long", "loops" or "failed"."""

    text: str
    mark: str = ""


class Translator:
    """A Marian model on CTranslate2: it takes a list of texts and returns a Translation for each, in their order.

    `model` is a folder or an id on the hub, as in `model_folder`. On a CPU the model computes in int8, in `threads`
    batches at once with a core each, because cores that share a batch wait for each other several times a layer. On a
    GPU it computes in float16; a GPU is used if there is one, unless `device` is "cpu". `batch_tokens` limits a batch:
    its number of sentences times the pieces of the longest. Raises the errors of `model_folder`, and ValueError if
    the device is not there.
    """

    def __init__(
        self, model: str | os.PathLike = SHIPPED, *, beam: int = 4, device: str = "auto", threads: int | None = None,
        batch_tokens: int | None = None,
    ):
        gpus = ctranslate2.get_cuda_device_count() if device != "cpu" else 0
        if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not gpus):
            raise ValueError(f"device {device!r}: this machine has {gpus} GPUs for CTranslate2; give 'cpu' or 'auto'")
        self.name, self.beam = os.fspath(model), beam
        self.workers = gpus or threads or usable_cores()
        self.batch_tokens = batch_tokens or (16_384 if gpus else 200)  # few on a CPU, so that they fit into its caches
        self.folder, kind = model_folder(model), "float16" if gpus else "int8"
        folder = converted_folder(self.folder, kind)
        self._source, self._target = (sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
                                      for name in SENTENCE_PIECES)
        config = read_json(folder / "config.json")
        self._end = [] if config.get("add_source_eos") else [config.get("eos_token", "</s>")]
        try:
            self.engine = ctranslate2.Translator(
                str(folder), device="cuda" if gpus else "cpu", device_index=list(range(gpus)) or 0, compute_type=kind,
                inter_threads=1 if gpus else self.workers, intra_threads=1, max_queued_batches=-1)
        except RuntimeError as error:
            raise ValueError(f"{folder}: CTranslate2 cannot open the model ({error}): convert it again") from error
        self._known: dict[str, Translation] = {}

    def __call__(self, texts: list[str], tick: Callable[[int], object] | None = None) -> list[Translation]:
        """The texts' translations. Each different text is translated once, also over several calls.

        `tick` is called with the number of texts that are newly done. A text comes back as it was, with its mark, if it
        is blank or longer than MAX_SOURCE pieces, if its translation loops or is empty, or if the engine fails on it.
        """
        times, tick = Counter(texts), tick or (lambda count: None)
        found = {text: self._known[text] for text in times if text in self._known}
        tick(sum(times[text] for text in found))
        for text, translation in self._translate([text for text in times if text not in found]):
            found[text] = translation
            if translation.mark != "failed":  # the engine may be able to do it later
                self._known[text] = translation
            tick(times[text])
        while len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        return [found[text] for text in texts]

    def _translate(self, texts: list[str]) -> Iterator[tuple[str, Translation]]:
        fit = {}
        for text, pieces in zip(texts, self._source.encode(texts, out_type=str), strict=True):
            if 0 < len(pieces) <= MAX_SOURCE:
                fit[text] = pieces
            else:
                yield text, Translation(text, "too long" if pieces else "empty")
        texts, pieces, waiting = list(fit), list(fit.values()), deque()
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
            max_input_length=0, max_decoding_length=max(map(_limit, batch)))

    def _collect(self, texts, pieces, batch, futures) -> Iterator[tuple[str, Translation]]:
        for i, future in zip(batch, futures, strict=True):
            words = _result(future)
            if words is None:  # a batch fails as a whole, but most of its sentences do not fail alone
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
    """The number of pieces at which the translation of `pieces` counts as one that does not end."""
    return min(MAX_TARGET, 2 * len(pieces) + 16)


def batches_by_length(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Places in `lengths`, the longest first, in batches of at most `tokens`: the batch's size times its longest.

    So there is little padding, and the largest batch comes first: if the memory is too small, it shows at once.
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
    """The table with a column, of texts or of lists of texts, in Indonesian, and two more columns after it.

    `<column>_en` has the English and `<column>_mark` the marks of the Translations. A null becomes an empty text or
    list. Raises ValueError if there is no such column, if it has no texts, or if the table is translated already.
    """
    _check_column(table, column)
    english, place = table[column], table.column_names.index(column)
    found = translator(column_texts(english), tick)
    lengths = english.combine_chunks().value_lengths() if pa.types.is_nested(english.type) else None
    for name, texts in ((column, [text for text, _ in found]), (f"{column}_mark", [mark for _, mark in found])):
        texts = pa.array(texts, pa.string())
        if lengths is not None:
            ends = np.cumsum(lengths.fill_null(0).to_numpy(zero_copy_only=False))
            texts = pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), texts)
        table = table.set_column(place, name, texts) if name == column else table.add_column(place + 1, name, texts)
    return table.add_column(place + 1, f"{column}_en", english)


def _check_column(table: pa.Table, column: str) -> None:
    if column not in table.column_names:
        problem = f"no {column!r}"
    elif f"{column}_en" in table.column_names:
        problem = f"{column}_en already"
    else:
        kind = table[column].type
        texts = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        if pa.types.is_string(texts) or pa.types.is_large_string(texts) or pa.types.is_null(texts):
            return
        problem = f"{column!r} has {kind}, not texts or lists of texts"
    raise ValueError(f"the rows have the columns {', '.join(table.column_names)} and {problem}: name the column of the "
                     "English (column=… or --column)")


def column_texts(column: pa.ChunkedArray) -> list[str]:
    """The texts of a column of texts or of lists, one after the other. A null becomes an empty text."""
    return (column.combine_chunks().flatten() if pa.types.is_nested(column.type) else column).fill_null("").to_pylist()


def count_texts(report: Report, table: pa.Table, column: str) -> None:
    """Counts the texts of a translated table into the report."""
    for english, mark in zip(column_texts(table[f"{column}_en"]), column_texts(table[f"{column}_mark"]), strict=True):
        report.drop(mark, english) if mark else report.keep()


def translate_rows(
    source: shards.Source, out: str | os.PathLike, translator: Translator, *, column: str = "captions",
    shard_rows: int | None = None, progress: bool = True,
) -> Report:
    """Translates a column of captions into Parquet shards: out/part-00000.parquet, out/part-00001.parquet, …

    `source` is a .jsonl or .parquet file, a folder or a glob of such files, or the records themselves. The column
    becomes what `translate_table` makes of it. Everything else stays; but a relative `image_path` of a file then starts
    at `out`. The rows keep their order.

    A run that was killed at any moment resumes after the last whole shard when it is called again, and does not lose or
    repeat a row. The Report counts the texts, those of earlier runs too: translated texts are kept, texts that stayed
    English are dropped. Raises ValueError for rows that do not fit, or if the model, its settings or rows that are done
    have changed; OSError if a different process writes to `out`.
    """
    out, report, schema, start = Path(out).expanduser(), Report(), shards.parquet_schema(source), 0
    model = shards.with_content(translator.name, model_identity(translator.folder))
    settings = {"model": model, "beam": translator.beam, "column": column}
    size = shard_rows or ROWS_A_CORE * translator.workers
    shards.check_apart(shards.source_files(source), out)
    with shards.only_writer(out):
        done, stream = shards.finished_shards(out, settings), shards.read_rows(source, out)
        for shard, noted in done.items():
            table = pq.read_table(shard, columns=[f"{column}_en", f"{column}_mark"])
            rows = list(islice(stream, table.num_rows))
            if shards.rows_hash(rows) != noted["rows"]:
                name = source if isinstance(source, str | os.PathLike) else "the records"
                raise ValueError(f"{name}: {shard} was made from different rows than those after row {start}: restore "
                                 "them, delete this shard and the later ones, or name a different folder")
            schema, start = schema or shards.as_table(rows).schema, start + len(rows)
            count_texts(report, table, column)
        number, total = len(done), shards.count_rows(source)
        with tqdm(initial=report.read, unit=" captions", desc="translating", disable=not progress) as bar:
            while rows := shards.next_rows(stream, size):
                table = shards.as_table(rows, schema)
                schema = schema or table.schema
                _check_column(table, column)
                if total:  # of captions, if all rows have as many as these
                    bar.total = round(total * len(column_texts(table[column])) / len(rows))
                table = translate_table(table, column, translator, bar.update)
                shard = out / f"part-{number:05}.parquet"
                shards.write_table(table, shard, {**settings, "rows": shards.rows_hash(rows)})
                count_texts(report, table, column)
                number += 1
    return report
