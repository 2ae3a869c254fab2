"""Flickr8k, Flickr30k and xFlickrCO: captions as published, as Kaggle has them, and as translated."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipid_utils.data.report import Report
from clipid_utils.data.sources.coco import named_captions
from clipid_utils.data.sources.tables import (
    NO_TEXT,
    NOT_UTF8,
    clean_caption,
    example,
    first_mark,
    json_items,
    json_lines,
    listed_captions,
    local_records,
    text_lines,
)

TOKEN = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)")  # 1000092795.jpg#0<TAB>Two young guys …
# 1000092795.jpg| 0| Two young guys …; one line, 2199200615.jpg| 4   A dog …, lacks its second bar
KAGGLE = re.compile(r"(?P<name>[^|]+)\|\s*\d+(?:\s*\||\s)(?P<caption>.*)")
KAGGLE_HEADER = re.compile(r"image_name\s*\|\s*comment_number\s*\|\s*comment\s*$")
MARKS = re.compile("<start>|<end>")


def read_flickr(
    path: str | os.PathLike, pictures: str | os.PathLike | Sequence, report: Report, *, source: str,
    split: str | None = None,
) -> Iterator[dict]:
    """Captions records, one a picture with its captions, of Flickr8k or Flickr30k (`source`).

    `path` is Flickr8k.token.txt or results_20130124.token (name#number<TAB>caption), Kaggle's results.csv (name|
    number| caption), the translated JSON of Flickr8k ({name: ["<start> … <end>", …]}) or the translated TSV of
    Flickr30k (columns `caption` and `image_name`). Raises ValueError for a file that is none of them.
    """
    path = Path(path)
    if first_mark(path) == "{":
        return local_records(_marked(path, report), pictures, report, source, split)
    number, first = next(((number, line) for number, line in text_lines(path) if line.strip()), (1, ""))
    if TOKEN.fullmatch(first):
        captions = _matched(path, TOKEN, 0, report)
    elif KAGGLE_HEADER.match(first):
        captions = _matched(path, KAGGLE, number, report)
    else:
        captions = named_captions(path, report)
    return local_records(captions, pictures, report, source, split)


def _marked(path: Path, report: Report) -> Iterator[tuple[str, str, str]]:
    remedy = 'this reads {"picture.jpg": ["<start> a caption <end>", …], …}'
    for name, captions in json_items(path, "", remedy, pairs=True):
        if not isinstance(captions, list) or not all(isinstance(caption, str | None) for caption in captions):
            raise ValueError(f"{path}: key {name!r} has {str(captions)[:80]!r}, no list of captions: {remedy}")
        captions = [MARKS.sub(" ", caption or "") for caption in captions]
        yield from listed_captions(name, captions, example(path, f"key {name}"), report)


def _matched(path: Path, form: re.Pattern, header: int, report: Report) -> Iterator[tuple[str, str, str]]:
    """The rows after line `header` that have the form, others dropped."""
    for number, line in text_lines(path):
        if number <= header or not line.strip():
            continue
        if NO_TEXT.search(line):
            report.drop(NOT_UTF8, example(path, number, line))
        elif not (found := form.fullmatch(line)):
            report.drop("no picture and caption", example(path, number, line))
        elif not (caption := clean_caption(found["caption"])):
            report.drop("empty caption", example(path, number, line))
        else:
            yield found["name"].strip(), example(path, number), caption


def read_xflickrco(
    path: str | os.PathLike, pictures: str | os.PathLike | Sequence, report: Report, *, split: str | None = "test"
) -> Iterator[dict]:
    """Captions records of xFlickrCO (Bugliarello et al. 2022, IGLUE), such as annotations/id/test.jsonl.

    A line is `{"sentences": [str, …], "id": …, "img_path": name}`. `pictures` are two folders: Flickr30k's and COCO's,
    of 2014 or of 2017. Meant for evaluation. Raises ValueError where the first line is another.
    """
    path = Path(path)
    return local_records(_sentences(path, report), pictures, report, "xflickrco", split)


def _sentences(path: Path, report: Report) -> Iterator[tuple[str, str, str]]:
    seen = False
    for number, row in json_lines(path, report):
        if isinstance(row.get("sentences"), list) and isinstance(row.get("img_path"), str):
            yield from listed_captions(row["img_path"], row["sentences"], example(path, number), report)
        elif not seen:
            raise ValueError(f"{path}:{number}: no keys 'sentences' and 'img_path': take xFlickrCO's "
                             "annotations/id/test.jsonl")
        else:
            report.drop("no sentences or img_path", example(path, number, row))
        seen = True
