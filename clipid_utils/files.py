"""Files: written whole or not at all, JSON lines with their line numbers, inputs by file, folder or glob.

This is the only code of its kind in the library. Everything that writes a result or reads JSON lines goes through here,
so that an interruption or a byte-order mark is handled once.
"""

import codecs
import ctypes
import glob
import gzip
import hashlib
import importlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

PARTIAL = ".partial"  # the ending of a file or folder that is not finished
MAX_LINE = 2**24  # bytes of one line of a text file


# Writing

@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to. It takes the name `path` when the block ends; after an error nothing is left behind.

    The data is on the disk before the rename, so a reader sees the old file or the new one, never a part. If two
    processes write the same file, the last one wins. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder to fill. It takes the name `path`, in place of an older one, when the block ends.

    After an error nothing is left behind, and the older folder stays as it was.
    """
    path = Path(path)
    partial, older = (path.with_name(f"{path.name}.{os.getpid()}{end}") for end in (PARTIAL, f".old{PARTIAL}"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.is_dir():
            os.replace(path, older)  # faster than deleting it: a kill in between would leave half of it
        os.replace(partial, path)
    finally:
        if older.is_dir() and not path.is_dir():  # stopped between the two renames
            os.replace(older, path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)


def write_json(path: str | os.PathLike, value: object, indent: int | None = 2) -> None:
    """Writes a value as JSON in UTF-8, whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode())


def write_json_lines(path: str | os.PathLike, records: Iterable[dict]) -> None:
    """Writes one JSON object a line in UTF-8, whole or not at all."""
    with whole_file(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


# Reading

def read_json(path: str | os.PathLike) -> object:
    """The value of a JSON file; a byte-order mark is accepted. Raises ValueError that names the file and the place."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg}): correct the line") from None


def numbered_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line of a text file, without its line end.

    A byte-order mark, Windows line ends and gzip (by the ending .gz) are accepted. Raises ValueError, with the line,
    for UTF-16, for a line of over 16 MiB (a small .gz can unpack to many GB), and for a .gz that is cut off or broken.
    """
    number, path = 0, Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), 1):
                if number == 1:
                    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise ValueError(f"{path}:1: this is UTF-16: save the file as UTF-8")
                    line = line.removeprefix(codecs.BOM_UTF8)
                if len(line) > MAX_LINE:
                    raise ValueError(f"{path}:{number}: the line is longer than {MAX_LINE:,} bytes: this is not a text "
                                     "file of lines; fetch it again")
                yield number, line.rstrip(b"\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{number + 1}: not gzip, or cut off ({error}): fetch the file again") from None


def json_lines(path: str | os.PathLike) -> Iterator[tuple[int, dict | None, str | None]]:
    """For each line that is not blank: its number from 1, its JSON object, and a problem with its remedy.

    One of the last two is None. What `numbered_lines` would raise for the file is the last problem.
    """
    number = 0
    try:
        for number, line in numbered_lines(path):
            if line := line.strip():
                yield number, *parse_line(line)
    except ValueError as error:  # the file's, which also ends it
        yield number + 1, None, str(error).removeprefix(f"{path}:{number + 1}: ")


def parse_line(line: bytes) -> tuple[dict | None, str | None]:
    """The JSON object of one line and None, or None and a problem with its remedy."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return None, f"byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8"
    except json.JSONDecodeError as error:
        return None, f"not valid JSON ({error.msg} at character {error.pos + 1}): write one record a line"
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        return None, f"JSON that cannot be read ({error}): write one record a line"
    if not isinstance(record, dict):
        return None, f"{str(record)[:40]!r} is not a record: write an object, {{\"key\": value, …}}"
    return record, None


def input_files(given: str | os.PathLike, suffixes: tuple[str, ...] = (".jsonl", ".parquet")) -> list[Path]:
    """The files that a command's input names: one file, the part files of a folder, or a glob; `~` is expanded.

    A folder gives its files that end in `suffixes`, sorted by name; hidden and unfinished ones are left out. Raises
    ValueError, with a remedy, if there is no such file.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        files = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        found = sorted(file for file in files if file.name.endswith(suffixes))
        if not found:
            raise ValueError(f"{given}: no file here ends in {' or '.join(suffixes)}: name a file, a folder or a glob")
        return found
    if path.is_file():
        return [path]
    found = sorted(file for file in map(Path, glob.glob(str(path), recursive=True))
                   if file.is_file() and file.suffix != PARTIAL)
    if not found:
        raise ValueError(f"{given}: no such file or folder, and no file matches it as a glob: correct the path")
    return found


HEAD = 2**20  # bytes that file_identity reads from the start of a file


def file_identity(path: str | os.PathLike, head: int = HEAD) -> str:
    """16 hexadecimal digits of a file: a hash of its size, its time and its first `head` bytes."""
    path = Path(path)
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} ".encode() + file.read(head))
    return digest.hexdigest()[:16]


def model_identity(folder: str | os.PathLike) -> str:
    """16 hexadecimal digits that change when a file of a model's folder changes, wherever the folder is.

    metrics.json and README.md, which describe the model, do not count, nor do hidden files.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name not in ("metrics.json", "README.md"):
            with open(path, "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def need(module: str, extra: str) -> ModuleType:
    """The module of an optional dependency. Raises ImportError, with the command that installs it, if it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {module}, from an extra that is not installed: {install_line(extra)}") from error


def install_line(extra: str) -> str:
    """The command that installs an extra of this package."""
    try:
        address = next(url for url in metadata.metadata("clip-indonesian").get_all("Project-URL") or ())
        return f'pip install "clip-indonesian[{extra}] @ git+{address.split(", ")[1]}"'
    except (metadata.PackageNotFoundError, StopIteration):  # used from a clone without an installation
        return f'pip install -e ".[{extra}]" in the clone'


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def import_transformers() -> ModuleType:
    """transformers, without its advice that PyTorch is missing, which this project does not use."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    return importlib.import_module("transformers")


def usable_threads() -> int:
    """A thread for each core, up to 8: more would wait for Python's lock, and each keeps a batch in memory."""
    return min(8, usable_cores())


def use_one_arena() -> None:
    """Tells glibc to keep one heap for all threads and to give freed memory back.

    With a heap for each thread, which is the default, a long run of decoding and encoding keeps gigabytes that nothing
    uses. On systems other than Linux with glibc this does nothing.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # not glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-8, 1)  # M_ARENA_MAX
            mallopt(-1, 131_072)  # M_TRIM_THRESHOLD
