"""Rows from any source, and Parquet shards of them: part-00000.parquet, part-00001.parquet, …

A shard gets its name only when it is whole and on the disk, so a run that was killed at any moment resumes after the
last shard. Each shard notes, in its metadata, the settings that it was made with.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from clipid_utils.files import PARTIAL, input_files, json_lines, numbered_lines, whole_file

METADATA = b"clipid_utils"  # the key of the settings in a shard's metadata; "rows" among them is a hash of its rows
MOST_BYTES = 2**28  # of the pictures in the rows of one shard
Source = str | os.PathLike | Iterable[dict]


def source_files(source: Source) -> list[Path]:
    """The files of a source: one file, the part files of a folder, or those of a glob; none if it is records."""
    paths = isinstance(source, str | os.PathLike)
    return input_files(source, (".jsonl", ".jsonl.gz", ".parquet")) if paths else []


def count_rows(source: Source) -> int | None:
    """How many rows a source has. None for records whose number is unknown."""
    if files := source_files(source):
        return sum(map(file_rows, files))
    return len(source) if hasattr(source, "__len__") else None


def file_rows(file: Path) -> int:
    """How many rows a .parquet file has, or how many lines, not counting blank ones, a text file has."""
    if file.suffix == ".parquet":
        return pq.read_metadata(file).num_rows
    return sum(1 for _, line in numbered_lines(file) if line.strip())


def numbered_rows(file: Path) -> Iterator[tuple[int, dict | None, str | None]]:
    """Number from 1, row and problem of each line of JSON that is not blank, or of each row of a .parquet file."""
    if file.suffix != ".parquet":
        return json_lines(file)
    parquet = pq.ParquetFile(file)
    size = 64 if "image" in parquet.schema_arrow.names else 1000  # pictures in the rows are large
    rows = (row for batch in parquet.iter_batches(size) for row in batch.to_pylist())
    return ((number, row, None) for number, row in enumerate(rows, 1))


def read_rows(source: Source, out: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a source, each after its place ("file:line"). A relative `image_path` of a file then starts at `out`.

    `source` is a .jsonl or .parquet file, a folder or a glob of such files, or the records themselves. Raises
    ValueError, with the place, for a line that is not JSON.
    """
    for file in source_files(source) or [None]:
        numbered = numbered_rows(file) if file else ((number, row, None) for number, row in enumerate(source, 1))
        name = file.name if file else "records"
        # Resolved, since ".." after a link leads to the parent of the link's target
        way = os.path.relpath(file.parent.resolve(), out.resolve()) if file else ""
        for number, row, problem in numbered:
            if problem:
                raise ValueError(f"{name}:{number}: {problem}")
            if file and isinstance(row.get("image_path"), str):
                row = {**row, "image_path": os.path.normpath(os.path.join(way, row["image_path"]))}
            yield f"{name}:{number}", row


def next_rows(rows: Iterator[tuple[str, dict]], most: int) -> list[tuple[str, dict]]:
    """The next rows of a stream: at most so many, and fewer if the pictures in them have 256 MiB."""
    taken, size = [], 0
    for place, row in rows:
        taken.append((place, row))
        picture = row.get("image")
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        size += len(content) if isinstance(content, bytes) else 0
        if len(taken) == most or size >= MOST_BYTES:
            break
    return taken


def check_apart(files: Iterable[Path], out: Path) -> None:
    """Raises ValueError if a Parquet file is to be read in the folder that shards are written to."""
    for file in files:
        if file.suffix == ".parquet" and file.parent.resolve() == out.resolve():
            raise ValueError(f"{file} is in the folder of the result, where shards with such names are written: name a "
                             "different folder for the result")


def parquet_schema(source: Source) -> pa.Schema | None:
    """The types of the first file of a source, if it is a Parquet file."""
    files = source_files(source)
    return pq.read_schema(files[0]) if files and files[0].suffix == ".parquet" else None


def as_table(rows: list[tuple[str, dict]], schema: pa.Schema | None = None) -> pa.Table:
    """The rows as a table, by default with the types that they have; a key that is null in all becomes a string.

    Raises ValueError for a row that does not fit the others, and for a string in place of a list.
    """
    values = [row for _, row in rows]
    try:
        if schema is None:
            columns = {key: pa.array([row.get(key) for row in values]).type for key in dict.fromkeys(chain(*values))}
            schema = pa.schema([(key, pa.string() if kind == pa.null() else kind) for key, kind in columns.items()])
        lists = {field.name for field in schema if pa.types.is_list(field.type)} | {"captions"}
        for place, row in rows:
            if strange := sorted(row.keys() - set(schema.names)):
                raise ValueError(f"{place}: {strange[0]!r} is not a key of the first rows: all rows need the same keys")
            if strange := [key for key in lists if isinstance(row.get(key), str)]:  # Arrow would take its letters
                raise ValueError(f"{place}: {strange[0]} is {row[strange[0]]!r}: give a list with at least one text")
        return pa.Table.from_pylist(values, schema=schema)
    except (pa.ArrowException, UnicodeError, OverflowError) as error:
        raise ValueError(f"{rows[0][0]} to {rows[-1][0]}: {error}: all rows need the same keys with the same types"
                         ) from error


def rows_hash(rows: list[tuple[str, dict]]) -> str:
    """16 hexadecimal digits that change when a key or a value of the rows changes."""
    def plain(value: object) -> str:
        return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)

    lines = json.dumps([{key: value for key, value in row.items() if value is not None} for _, row in rows],
                       default=plain, sort_keys=True)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from writing to it. Raises OSError if one does already."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise OSError(f"another process is writing to {out}: wait for it, or name a different folder") from error


def write_table(table: pa.Table, path: Path, settings: dict) -> None:
    """Writes a shard with the settings that it was made with, whole or not at all."""
    noted = {**(table.schema.metadata or {}), METADATA: json.dumps(settings).encode()}
    with whole_file(path) as file:
        pq.write_table(table.replace_schema_metadata(noted), file)


def finished_shards(out: Path, settings: dict) -> dict[Path, dict]:
    """The shards of an earlier run, in their order, each with its settings; unfinished files are deleted.

    Raises ValueError if a shard is missing or damaged, or was made with different settings.
    """
    for partial in out.glob(f"part-*{PARTIAL}"):
        partial.unlink()
    shards = sorted(out.glob("part-*.parquet"))
    for number, shard in enumerate(shards):
        if shard.name != f"part-{number:05}.parquet":
            raise ValueError(f"{out} has {shard.name} and no part-{number:05}.parquet: delete the later shards, which "
                             "are then made again, or name a different folder")
    return {shard: check_settings(shard, settings) for shard in shards}


def with_content(name: object, content: str) -> str:
    """A setting that is a file or a model: it is the same if its content is the same, whatever its name."""
    return f"{name} (content {content})"


def check_settings(shard: Path, settings: dict) -> dict:
    """The settings that a shard was made with. Raises ValueError if they are different, or the shard is damaged."""
    try:
        noted = json.loads(pq.read_schema(shard).metadata[METADATA])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{shard} is damaged, or a different program wrote it: delete it and the shards after it, "
                         "which are then made again, or name a different folder") from error
    for key in sorted((noted.keys() | settings) - {"rows"}):
        then, now = noted.get(key), settings.get(key)
        if str(then).rpartition(" (content ")[2] != str(now).rpartition(" (content ")[2]:
            raise ValueError(f"{shard} was made with {key} {then!r}, and now it is {now!r}: restore the former, delete "
                             "the shards, or name a different folder")
    return noted
