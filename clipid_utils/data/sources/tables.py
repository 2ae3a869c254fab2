"""Published caption files as they are: tables, JSON lines and large JSON, read piece by piece.

Memory does not grow with the file. A report counts the captions: each is kept, or dropped for a reason. duckdb reads
such tables too, but it knows only the line of a rejected row, joins rows at a stray quote, and stops at a quote that
never closes without naming its line.
"""

import codecs
import csv
import html
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import ijson

from clipid_utils.data.report import Report, example
from clipid_utils.data.sources.disk_table import gathered
from clipid_utils.files import MAX_LINE, numbered_lines, parse_line, read_json

ENTITY = re.compile(r"&(?:#\d+|#[xX][\da-fA-F]+|\w+);")  # without the bare &not that html.unescape finds in &note
QUOTED = re.compile(r'"(?:[^"]|"")*"')
PathLike = str | os.PathLike
Paths = PathLike | Iterable  # one path or several
SURROGATE = re.compile("[\ud800-\udfff]")  # a byte that is not UTF-8, after surrogateescape, or half of a character
# These patterns find the other column of a caption table that has no header
LOOKS = {"url": re.compile(r"https?://", re.IGNORECASE), "image_name": re.compile(r"\S+\.(jpe?g|png)$", re.IGNORECASE)}
COCO_2014 = re.compile(r"^COCO_\w+2014_")  # COCO 2017 has the same pictures under the bare number
SVG = re.compile(r"[^?#]*\.svgz?(?:[?#]|$)", re.IGNORECASE)
MAX_CAPTION_LINES = 20  # a quoted caption may have as many
NOT_UTF8 = "not UTF-8"
END = "\ud800"  # the line after the last, which no file can contain: csv itself closes an open quote silently


def clean_caption(text: object) -> str:
    """A caption on one line: a tab or line break becomes a space, HTML's `&amp;` an &. "" for anything but a string."""
    if not isinstance(text, str):
        return ""
    if "&" in text:
        text = ENTITY.sub(lambda found: html.unescape(found[0]), text)
    return " ".join((text if text.isascii() else SURROGATE.sub("", text)).split())


def as_paths(paths: Paths) -> list[Path]:
    """The paths of one path or of several."""
    return [Path(path) for path in ([paths] if isinstance(paths, PathLike) else paths)]


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number, from 1, and text of each line. Bytes that are not UTF-8 become SURROGATE characters.

    Reads files and raises ValueError as `files.numbered_lines` does.
    """
    for number, line in numbered_lines(path):
        yield number, line.decode("utf-8", "surrogateescape")


def json_records(path: Path, report: Report) -> Iterator[tuple[int, dict]]:
    """Number and JSON object of each line. Other lines are dropped. Raises ValueError for a .gz that is cut off."""
    for number, line in numbered_lines(path):
        record, problem = parse_line(line) if line.strip() else (None, None)
        if problem:
            report.drop(NOT_UTF8 if "UTF-8" in problem else "not a JSON object", path, number, problem)
        elif record is not None:
            yield number, record


def json_items(path: Path, prefix: str, remedy: str, *, pairs: bool = False) -> Iterator:
    """The values at ijson's `prefix` of a JSON file, one after the other, or its keys and values with `pairs`.

    "annotations.item" is each entry of the list under that key. Half of a character becomes "?". Raises ValueError,
    with the line and `remedy`, for a file that is not JSON.
    """
    with open(path, "rb") as file:
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        try:
            yield from (ijson.kvitems if pairs else ijson.items)(file, prefix, use_float=True)
        except ijson.JSONError as error:
            try:
                read_json(path)  # its error names the line; it accepts only NaN, which ijson does not
            except ValueError as found:
                raise ValueError(f"{found}, or {remedy}") from None
            raise ValueError(f"{path}: not valid JSON ({str(error).splitlines()[0]}): {remedy}") from None


def picked_captions(
    path: Path, entries: Iterable[tuple[int | str, object]], pick: Callable[[object], tuple[str, list] | str],
    report: Report, remedy: str, misfit: str = "different format",
) -> Iterator[tuple[str, str, str]]:
    """(picture's name, place, caption) of each caption in the (place, entry) pairs of a file.

    `pick(entry)` returns the picture's name and the list of its captions, or the reason to drop the entry. A misfit is
    an entry where these have different types, or where `pick` finds no such key. Empty captions are dropped. Raises
    ValueError with `remedy` if the first entry is a misfit, or if there is no entry.
    """
    place = None
    for count, (place, entry) in enumerate(entries):
        try:
            picked = pick(entry)
            fits = isinstance(picked, str) or isinstance(picked[0], str) and isinstance(picked[1], list)
        except (KeyError, TypeError):
            fits = False
        if not fits and count == 0:
            raise ValueError(f"{path}: {example(path, place, entry)}: {misfit}: {remedy}")
        if not fits or isinstance(picked, str):
            report.drop(picked if fits else misfit, path, place, entry)
            continue
        name, captions = picked
        if not captions:
            report.drop("picture without captions", path, place, name)
        for caption in captions:
            if clean := clean_caption(caption):
                yield name, example(path, place), clean
            else:
                report.drop("empty caption", path, place, name)
    if place is None:
        raise ValueError(f"{path}: no captions here: {remedy}")


def caption_table(path: Path, key: str, report: Report) -> Iterator[tuple[int, int, str, str]]:
    """(row from 0, line, the value of `key`, caption) of a TSV of a caption and a `key` ("url" or "image_name").

    The columns may be in either order, with a header or without: LOOKS tells which is which. Further tabs belong to
    the caption. A quote is an ordinary character, except around a caption as `csv` writes it: it begins and ends with
    a quote, doubles those inside, and may have several lines. Blank lines are not rows, as in pandas. Raises ValueError
    if the first line is not of such a table.
    """
    lines = ((number, line) for number, line in text_lines(path) if line.strip(" "))
    number, first = next(lines, (1, ""))
    names, is_header = _columns(path, number, first.split("\t"), key)
    if not is_header:
        lines = itertools.chain([(number, first)], lines)
    at, key_at, width = names.index("caption"), names.index(key), len(names)
    for row, (number, line) in enumerate(_joined_lines(lines, width) if at == 0 else lines):
        fields = line.split("\t")
        surplus = len(fields) - width
        if surplus > 0:
            fields[at : at + surplus + 1] = ["\t".join(fields[at : at + surplus + 1])]
        if surplus < 0:
            reason = "a column is missing"
        elif not line.isascii() and SURROGATE.search(line):
            reason = NOT_UTF8
        elif not (caption := clean_caption(_unquoted(fields[at]))):
            reason = "empty caption"
        elif value := _unquoted(fields[key_at]).strip():
            yield row, number, value, caption
            continue
        else:
            reason = f"empty {key}"
        report.drop(reason, path, number, line)


def _columns(path: Path, number: int, fields: list[str], key: str) -> tuple[list[str], bool]:
    """The names of a caption table's columns, and whether its first line is a header."""
    names = [_unquoted(field).strip().lower() for field in fields]
    if "caption" in names and key in names:
        return names, True
    found = [column for column, field in enumerate(fields) if LOOKS[key].match(_unquoted(field).strip())]
    if len(fields) < 2 or len(found) != 1 or found[0] not in (0, len(fields) - 1):
        raise ValueError(f"{path}:{number}: {' | '.join(fields)[:80]!r} is not the header caption<TAB>{key}, and not a "
                         f"row with a caption and one {key}: take the published table, with tabs between its columns")
    return ["caption", key] if found[0] else [key, "caption"], False


def _unquoted(field: str) -> str:
    """A field as `csv` reads it, if `csv` would have quoted it."""
    if field[:1] == '"' == field[-1:] and QUOTED.fullmatch(field) and any(mark in field[1:-1] for mark in '"\t\n\r'):
        return field[1:-1].replace('""', '"')
    return field


def _joined_lines(lines: Iterator[tuple[int, str]], width: int) -> Iterator[tuple[int, str]]:
    """The lines of a table whose first field may be quoted and have several lines; these are joined."""
    for found in lines:
        waiting = deque([found])
        while waiting:
            number, line = waiting.popleft()
            if line[:1] == '"' and line.count("\t") < width - 1 and line.count('"') % 2:
                waiting.extend(itertools.islice(lines, MAX_CAPTION_LINES - len(waiting)))
                quotes = itertools.accumulate((text.count('"') for _, text in waiting), initial=line.count('"'))
                more = next((count for count, total in enumerate(quotes) if total % 2 == 0), 0)
                if more and "\t" in waiting[more - 1][1]:
                    line = "\n".join([line, *(waiting.popleft()[1] for _ in range(more))])
            yield number, line


def quoted_table(
    paths: Iterable[Path], columns: Sequence[str], report: Report
) -> Iterator[tuple[int, Path, int, list[str]]]:
    """(row from 0 over all files, file, line, the values of `columns`) of TSVs with headers, quoted as `csv` does.

    A row with too many or too few columns, or with a wanted value that is not UTF-8, is dropped. Raises ValueError if a
    column is missing from a header, if a quote does not close, and for a field of over 16 MiB.
    """
    rows = itertools.count()
    for path in paths:
        table = _csv_rows(path)
        _, header = next(table, (1, []))
        missing = [name for name in columns if name not in header]
        if missing:
            raise ValueError(f"{path}:1: the header lacks {', '.join(missing)}; it is {' | '.join(header)[:200]!r}: "
                             "take the published file, and its first part if it comes in parts")
        places = [header.index(name) for name in columns]
        for (number, fields), row in zip(table, rows, strict=False):  # zip asks `rows` last, so none is skipped
            if len(fields) != len(header):
                report.drop(f"{len(fields)} columns where the header has {len(header)}", path, number)
                continue
            values = [fields[place] for place in places]
            if any(not value.isascii() and SURROGATE.search(value) for value in values):
                report.drop(NOT_UTF8, path, number)
            else:
                yield row, path, number, values


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line, and the fields, of each row of a TSV that is not blank."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))  # of this process; sections of Wikipedia pass 2**17
    lines = (line.replace("\r", " ") + "\n" for _, line in text_lines(path))  # csv refuses a \r within a line
    table, number = csv.reader(itertools.chain(lines, [END]), delimiter="\t"), 1
    try:
        for fields in table:
            if fields and fields[-1].endswith(END):
                if fields != [END]:
                    raise csv.Error("the file ends within it")
            elif fields:
                yield number, fields
            number = table.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{number}: not a table row ({error}): a quote that opens here does not close; fetch "
                         "the file again, or correct the line") from None


def refused(url: str, mime_type: str = "") -> str | None:
    """The reason not to request an address, or None."""
    if not LOOKS["url"].match(url):
        return "not an http(s) address"
    return "SVG" if "svg" in mime_type or SVG.match(url) else None


def local_records(
    captions: Iterable[tuple[str, str, str]], folders: Paths, report: Report, source: str, split: str | None = None
) -> Iterator[dict]:
    """Captions records, one for each picture, of (file name, place in the file that lists it, caption) rows.

    A picture that is in none of the folders is dropped, and a caption that its picture has already. Raises ValueError
    for a folder that does not exist.
    """
    folders = [folder.absolute() for folder in as_paths(folders)]
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder: unpack the pictures there, or name the folder that has them")
    for name, place, texts in gathered(captions):
        path = find_picture(name, folders)
        captions = unique_captions(texts, report, f"{place}: {name!r}", None if path else "picture not found")
        if path:
            yield {"image_path": path, "captions": captions, "source": source, "split": split}


def unique_captions(texts: Sequence[str], report: Report, place: str, problem: str | None = None) -> list[str]:
    """The captions of a picture, each once. The report counts them; all are dropped if the picture has a problem."""
    unique = list(dict.fromkeys(texts))
    again = ["the picture has this caption already"] * (len(texts) - len(unique))
    for reason in (*again, *[problem] * len(unique)):
        report.count(reason, place)
    return unique


def find_picture(name: str, folders: Sequence[Path]) -> str | None:
    """The path of a picture in the first folder that has it: by its name, by its bare file name, or by COCO 2017's."""
    bare = os.path.basename(name)
    for folder, candidate in itertools.product(folders, dict.fromkeys([name, bare, COCO_2014.sub("", bare)])):
        if os.path.isfile(path := os.path.join(folder, candidate)):
            return path
    return None
