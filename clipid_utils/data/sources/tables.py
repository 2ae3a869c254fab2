"""Published caption files as they are: tables, JSON lines and JSON read piece by piece, captions gathered by picture.

Memory does not grow with the file. A report counts captions, each of them kept or dropped.
"""

import codecs
import csv
import gzip
import html
import itertools
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import ijson

from clipid_utils.data.report import Report
from clipid_utils.data.sources.disk_table import gathered

ENTITY = re.compile(r"&(?:#\d+|#[xX][\da-fA-F]+|\w+);")  # no bare &not, which html.unescape would find in &note
QUOTED = re.compile(r'"(?:[^"]|"")*"')
NO_TEXT = re.compile("[\ud800-\udfff]")  # what surrogateescape makes of bytes that are no UTF-8, and half an emoji
# What tells the other column of a caption table that has no header
LOOKS = {"url": re.compile(r"https?://", re.IGNORECASE), "image_name": re.compile(r"\S+\.(jpe?g|png)$", re.IGNORECASE)}
COCO_2014 = re.compile(r"^COCO_\w+2014_")  # COCO 2017 has the same pictures under the bare number
SVG = re.compile(r"[^?#]*\.svgz?(?:[?#]|$)", re.IGNORECASE)
MOST_LINES = 20  # that a quoted caption may go over
NOT_UTF8 = "not UTF-8"
END = "\ud800"  # the line after the last, which no file can hold: csv itself takes a quote that stays open for closed


def clean_caption(text) -> str:
    """A caption as one line: tabs and line breaks become spaces, HTML's `&amp;` an &; "" for what is no text."""
    if not isinstance(text, str):
        return ""
    if "&" in text:
        text = ENTITY.sub(lambda found: html.unescape(found[0]), text)
    return " ".join((text if text.isascii() else NO_TEXT.sub("", text)).split())


def each(paths: str | os.PathLike | Iterable) -> list[Path]:
    """The paths of one or of several."""
    return [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]


def example(path: Path, place: int | str, text="") -> str:
    """How a report names a line, or another place in a file."""
    name = f"{path.name}:{place}" if isinstance(place, int) else f"{path.name}, {place}"
    return f"{name}: {str(text)[:80]!r}" if text else name


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number from 1 and text of each line, without its end; a .gz is unpacked on the way.

    A BOM is left out. Bytes that are no UTF-8 come as NO_TEXT. Raises ValueError for a file in UTF-16 and for a .gz
    that is cut off or none.
    """
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise ValueError(f"{path}:1: this is UTF-16: save the file as UTF-8")
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield number, line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{number + 1}: the .gz is cut off or broken here ({error}): fetch it again") from None


def json_lines(path: Path, report: Report) -> Iterator[tuple[int, dict]]:
    """Number and value of each line that is a JSON object; others are dropped, but for the first: ValueError."""
    first = True
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            value = None
        if NO_TEXT.search(line):
            report.drop(NOT_UTF8, example(path, number, line))
        elif isinstance(value, dict):
            yield number, value
        elif first:
            raise ValueError(f"{path}:{number}: {line[:80]!r} is no JSON object: this reads JSON lines, one a picture")
        else:
            report.drop("no JSON object", example(path, number, line))
        first = False


def load_json(path: Path, remedy: str) -> dict | list:
    """The JSON value of a whole file; raises ValueError that names file, line and `remedy`."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8: {remedy}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: no JSON ({error.msg}): {remedy}") from None


def first_mark(path: Path) -> str:
    """The first character of a file that is no space, of its first thousand; "" where there is none."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.read(1000).lstrip()[:1]


def json_items(path: Path, prefix: str, remedy: str, *, pairs: bool = False) -> Iterator:
    """The values at ijson's `prefix` of a JSON file, one after the other, or its keys and values with `pairs`.

    "annotations.item" are the entries of the list under that key. Where there is no such thing, nothing comes. Half an
    emoji comes as "?". Raises ValueError as `load_json` does.
    """
    with open(path, "rb") as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        try:
            yield from (ijson.kvitems if pairs else ijson.items)(file, prefix, use_float=True)
        except ijson.JSONError as error:
            load_json(path, remedy)  # which says in what line; what follows is for NaN, which only that one takes
            raise ValueError(f"{path}: no JSON ({str(error).splitlines()[0]}): {remedy}") from None


def caption_table(path: Path, key: str, report: Report) -> Iterator[tuple[int, int, str, str]]:
    """(row from 0, line, the value of `key`, caption) of a TSV of a caption and a `key` ("url" or "image_name").

    The columns may be in either order, named by a header or not: one of LOOKS tells which is which. Tabs beyond the
    columns belong to the caption. A quote is a quote, but for a caption as `csv` writes it, which begins and ends with
    one and doubles those inside; it may go over several lines. Rows count blank lines no more than pandas does. Raises
    ValueError where the first line is of no such table.
    """
    lines = ((number, line) for number, line in text_lines(path) if line.strip(" "))
    number, first = next(lines, (1, ""))
    names, is_header = _columns(path, number, first.split("\t"), key)
    if not is_header:
        lines = itertools.chain([(number, first)], lines)
    at, key_at, width = names.index("caption"), names.index(key), len(names)
    for row, (number, line) in enumerate(_unbroken(lines, width) if at == 0 else lines):
        fields = line.split("\t")
        if surplus := len(fields) - width:
            if surplus < 0:
                report.drop("a column is missing", example(path, number, line))
                continue
            fields[at : at + surplus + 1] = ["\t".join(fields[at : at + surplus + 1])]
        value, caption = _unquoted(fields[key_at]).strip(), clean_caption(_unquoted(fields[at]))
        if not line.isascii() and NO_TEXT.search(line):
            report.drop(NOT_UTF8, example(path, number, line))
        elif not caption:
            report.drop("empty caption", example(path, number, line))
        elif not value:
            report.drop(f"empty {key}", example(path, number, line))
        else:
            yield row, number, value, caption


def _columns(path: Path, number: int, fields: list[str], key: str) -> tuple[list[str], bool]:
    """The names of a caption table's columns, and whether its first line names them."""
    names = [_unquoted(field).strip().lower() for field in fields]
    if "caption" in names and key in names:
        return names, True
    found = [column for column, field in enumerate(fields) if LOOKS[key].match(_unquoted(field).strip())]
    if len(fields) < 2 or len(found) != 1 or found[0] not in (0, len(fields) - 1):
        raise ValueError(f"{path}:{number}: {' | '.join(fields)[:80]!r} is neither the header caption<TAB>{key} nor a "
                         f"row of a caption and one {key}: is this another file, or not separated by tabs?")
    return ["caption", key] if found[0] else [key, "caption"], False


def _unquoted(field: str) -> str:
    """A field as `csv` would read it, if it is one that `csv` would have quoted."""
    if field[:1] == '"' == field[-1:] and QUOTED.fullmatch(field) and any(mark in field[1:-1] for mark in '"\t\n\r'):
        return field[1:-1].replace('""', '"')
    return field


def _unbroken(lines: Iterator[tuple[int, str]], width: int) -> Iterator[tuple[int, str]]:
    """The lines, those together over which a quoted first field goes."""
    for found in lines:
        if found[1][0] != '"':
            yield found
            continue
        waiting = deque([found])
        while waiting:
            number, line = waiting.popleft()
            if line[0] == '"' and line.count("\t") < width - 1 and line.count('"') % 2:
                waiting.extend(itertools.islice(lines, MOST_LINES - len(waiting)))
                quotes = itertools.accumulate((text.count('"') for _, text in waiting), initial=line.count('"'))
                more = next((count for count, total in enumerate(quotes) if total % 2 == 0), 0)
                if more and "\t" in waiting[more - 1][1]:
                    line = "\n".join([line, *(waiting.popleft()[1] for _ in range(more))])
            yield number, line


def quoted_table(
    paths: Iterable[Path], columns: Sequence[str], report: Report
) -> Iterator[tuple[int, Path, int, list[str]]]:
    """(row from 0 over all files, file, line, the values of `columns`) of TSVs with headers, quoted as `csv` does.

    A column that ends in "?" may be missing; its values are then "". Rows in which a value is not UTF-8, or with a
    column too many or too few, are dropped. Raises ValueError where a column is missing from a header and where a quote
    does not close.
    """
    csv.field_size_limit(max(csv.field_size_limit(), 2**24))  # of this process; sections of Wikipedia pass 2**17
    count = itertools.count()
    for path in paths:
        lines = (line.replace("\r", " ") + "\n" for _, line in text_lines(path))  # csv refuses a \r amid a line
        table = csv.reader(itertools.chain(lines, [END]), delimiter="\t")
        header = [name for name in next(table) if name != END]
        missing = [name for name in columns if not name.endswith("?") and name not in header]
        if missing:
            raise ValueError(f"{path}:1: the header lacks {', '.join(missing)}: it is {' | '.join(header)[:200]!r}; is "
                             "this another file, or its second part without the first line?")
        places = [header.index(name.rstrip("?")) if name.rstrip("?") in header else None for name in columns]
        for (number, fields), row in zip(_numbered(table, path), count, strict=False):  # in this order: see zip
            if len(fields) != len(header):
                report.drop(f"{len(fields)} columns where the header has {len(header)}", example(path, number))
                continue
            values = ["" if place is None else fields[place] for place in places]
            if any(not value.isascii() and NO_TEXT.search(value) for value in values):
                report.drop(NOT_UTF8, example(path, number))
            else:
                yield row, path, number, values


def _numbered(table, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv.reader that are not blank, each with the number of its first line."""
    number = table.line_num + 1
    try:
        for fields in table:
            if fields and fields[-1].endswith(END):
                if fields != [END]:
                    raise csv.Error("the file ends within it")
            elif fields:
                yield number, fields
            number = table.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{number}: no table row ({error}): a quote that opens here does not close; fetch the "
                         "file again, or mend the line") from None


def refused(url: str, mime_type: str = "") -> str | None:
    """Why an address is not worth asking for, or None."""
    if not LOOKS["url"].match(url):
        return "no http(s) address"
    if "svg" in mime_type or SVG.match(url):
        return "SVG"
    return None


def listed_captions(name: str, captions: list, place: str, report: Report) -> Iterator[tuple[str, str, str]]:
    """(name, place, caption) of each caption of a picture; empty ones are dropped, and a picture without any, once."""
    for caption in captions:
        if clean := clean_caption(caption):
            yield name, place, clean
        else:
            report.drop("empty caption", f"{place}: {name!r}")
    if not captions:
        report.drop("picture without captions", f"{place}: {name!r}")


def local_records(
    captions: Iterable[tuple[str, str, str]], folders: str | os.PathLike | Sequence, report: Report, source: str,
    split: str | None,
) -> Iterator[dict]:
    """Captions records, one a picture, of (file name, place in the file that lists it, caption) rows.

    Pictures that are in none of the folders are dropped, and captions that a picture has already. Raises ValueError for
    a folder that is not there.
    """
    folders = [folder.absolute() for folder in each(folders)]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder: unpack the pictures there, or name where they are")
    for name, place, texts in gathered(captions):
        path, unique = find_picture(name, folders), list(dict.fromkeys(texts))
        for _ in range(len(texts) - len(unique)):
            report.drop("the picture has this caption already", f"{place}: {name!r}")
        for _ in unique:
            report.keep() if path else report.drop("picture not found", f"{place}: {name!r}")
        if path:
            yield {"image_path": path, "captions": unique, "source": source, "split": split}


def find_picture(name: str, folders: Sequence[Path]) -> str | None:
    """Where a picture is: under its name, the last part of that, or as COCO 2017 has it, in the first such folder."""
    bare = os.path.basename(name)
    for folder, candidate in itertools.product(folders, dict.fromkeys([name, bare, COCO_2014.sub("", bare)])):
        if os.path.isfile(path := os.path.join(folder, candidate)):
            return path
    return None
