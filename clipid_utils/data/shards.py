"""Rows as Arrow tables, and Parquet shards of them written one after the other, `part-00000.parquet` …

A shard has its name only when it is whole and on the disk, so that a run killed at any moment goes on after the last.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

METADATA = b"clipid_utils"  # of a shard: the settings it was made with, in JSON
Source = str | os.PathLike | Iterable[dict]


def is_path(source: Source) -> bool:
    """Whether a source is a file, and not the records themselves."""
    return isinstance(source, str | os.PathLike)


def count_rows(source: Source) -> int | None:
    """How many rows a source has, None for records of which nobody knows; of JSON lines the blank ones count too."""
    if not is_path(source):
        return len(source) if hasattr(source, "__len__") else None
    if Path(source).suffix == ".parquet":
        return pq.read_metadata(source).num_rows
    with open(source, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b""))


def read_tables(source: Source, rows: int, skip: int = 0, schema: pa.Schema | None = None) -> Iterator[pa.Table]:
    """The rows of a .parquet or .jsonl file, or of records, after the first `skip`, in tables of `rows` at most.

    JSON lines and records get `schema`, by default that of the first table. Raises ValueError for a line or a row that
    does not fit, by its number.
    """
    if is_path(source) and Path(source).suffix == ".parquet":
        with pq.ParquetFile(source) as file:
            for batch in file.iter_batches(rows):
                if skip < batch.num_rows:
                    yield pa.Table.from_batches([batch.slice(skip)])
                skip = max(0, skip - batch.num_rows)
        return
    name = Path(source).name if is_path(source) else "records"
    records = islice(_lines(source) if is_path(source) else enumerate(source, 1), skip, None)
    while chunk := list(islice(records, rows)):
        values = [record for _, record in chunk]
        try:
            schema = schema or _schema(values)
            stray = sorted(set().union(*values) - set(schema.names))
            if stray:
                raise pa.ArrowInvalid(f"the key {stray[0]!r}, which the rows before have not")
            for key in (field.name for field in schema if pa.types.is_list(field.type)):
                if any(isinstance(record.get(key), str) for record in values):  # Arrow would take its letters
                    raise pa.ArrowInvalid(f"{key} is a string, and a list in the rows before")
            table = pa.Table.from_pylist(values, schema=schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"{name}: in rows {chunk[0][0]} to {chunk[-1][0]}: {error}. All rows need the same keys "
                             "with the same types") from error
        yield table


def _lines(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{Path(path).name}:{number}: no JSON ({error}): correct the line") from error
                if not isinstance(record, dict):
                    raise ValueError(f"{Path(path).name}:{number}: {line[:40]!r} is no record: write {{\"…\": …}}")
                yield number, record


def _schema(records: list[dict]) -> pa.Schema:
    """The types of the keys; of one that is null so far it is taken to be a string."""
    keys = dict.fromkeys(key for record in records for key in record)
    columns = {key: pa.array([record.get(key) for record in records]).type for key in keys}
    return pa.schema([(key, pa.string() if kind == pa.null() else kind) for key, kind in columns.items()])


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other processes from writing there; raises RuntimeError where one does already."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise RuntimeError(f"another process is writing to {out}: wait for it, or name another folder") from error


def finished_shards(out: Path, settings: dict) -> list[Path]:
    """The shards of an earlier run, all whole, in their order; half-written ones are deleted.

    Raises ValueError where one is missing or damaged, or was made with other settings.
    """
    for partial in out.glob("part-*.partial"):
        partial.unlink()
    shards = sorted(out.glob("part-*.parquet"))
    for number, shard in enumerate(shards):
        if shard.name != f"part-{number:05}.parquet":
            raise ValueError(f"{out} has {shard.name} and no part-{number:05}.parquet: delete the later ones, which "
                             "are then made again, or name another folder")
        noted = noted_settings(shard)
        for key in noted | settings:
            then, now = noted.get(key), settings.get(key)
            if then != now:
                raise ValueError(f"{shard} was made with {key} {then!r}, and now it is {now!r}: name another folder, "
                                 "or delete this one")
    return shards


def noted_settings(shard: Path) -> dict:
    """The settings that a shard was made with; raises ValueError for what is none."""
    try:
        return json.loads(pq.read_schema(shard).metadata[METADATA])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{shard} is damaged, or another program wrote it: delete it and those after it, which are "
                         "then made again, or name another folder") from error


def write_table(table: pa.Table, path: Path, settings: dict) -> None:
    """Writes a shard, whole or not at all; of two processes that write the same one, the last stays."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    noted = {**(table.schema.metadata or {}), METADATA: json.dumps(settings).encode()}
    with open(partial, "wb") as file:
        pq.write_table(table.replace_schema_metadata(noted), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def move_paths(table: pa.Table, source: Path, out: Path) -> pa.Table:
    """The relative picture paths of a file in the folder `source`, made to start at the folder `out`."""
    if "image_path" not in table.column_names:
        return table
    way = os.path.relpath(source.resolve(), out.resolve())  # what ".." after a link leads to is not above the link
    paths = [path if path is None or os.path.isabs(path) else os.path.normpath(os.path.join(way, path))
             for path in table["image_path"].to_pylist()]
    return table.set_column(table.column_names.index("image_path"), "image_path", pa.array(paths, pa.string()))
