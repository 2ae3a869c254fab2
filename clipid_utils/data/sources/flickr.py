"""Flickr8k and Flickr30k as published, as Kaggle has them and as translated; xFlickrCO and Crossmodal-3600."""

import re
from collections.abc import Iterator
from pathlib import Path

from clipid_utils.data.report import Report
from clipid_utils.data.sources import tables
from clipid_utils.data.sources.coco import first_character, named_captions
from clipid_utils.data.sources.tables import PathLike, Paths, json_records, local_records, picked_captions

TOKEN = re.compile(r"(?P<name>[^\t]+)#\d+\t(?P<caption>.*)")  # 1000092795.jpg#0<TAB>Two young guys …
# 1000092795.jpg| 0| Two young guys …; one line, 2199200615.jpg| 4   A dog …, lacks its second bar
KAGGLE = re.compile(r"(?P<name>[^|]+)\|\s*\d+(?:\s*\||\s)(?P<caption>.*)")
KAGGLE_HEADER = re.compile(r"image_name\s*\|\s*comment_number\s*\|\s*comment\s*$")
MARKS = re.compile("<start>|<end>")


def read_flickr(path: PathLike, pictures: Paths, report: Report, *, source: str) -> Iterator[dict]:
    """Captions records, one for each picture, of Flickr8k or Flickr30k (`source`).

    `path` is Flickr8k.token.txt or results_20130124.token (name#number<TAB>caption), Kaggle's results.csv (name|
    number| caption), the translated JSON of Flickr8k ({name: ["<start> … <end>", …]}) or the translated TSV of
    Flickr30k (columns `caption` and `image_name`). Raises ValueError for a different file.
    """
    path = Path(path)
    if first_character(path) == "{":
        remedy = 'this reads {"picture.jpg": ["<start> a caption <end>", …], …}'
        pairs = ((f"key {pair[0]}", pair) for pair in tables.json_items(path, "", remedy, pairs=True))
        return local_records(picked_captions(path, pairs, _marked, report, remedy), pictures, report, source)
    number, first = next(((number, line) for number, line in tables.text_lines(path) if line.strip()), (1, ""))
    if TOKEN.fullmatch(first):
        captions = _matched(path, TOKEN, 0, report)
    elif KAGGLE_HEADER.match(first):
        captions = _matched(path, KAGGLE, number, report)
    else:
        captions = named_captions(path, report)
    return local_records(captions, pictures, report, source)


def _marked(pair: tuple[str, object]) -> tuple[str, list | None]:
    name, captions = pair
    return name, [MARKS.sub(" ", caption or "") for caption in captions] if isinstance(captions, list) else None


def _matched(path: Path, form: re.Pattern, header: int, report: Report) -> Iterator[tuple[str, str, str]]:
    """The captions of the lines after line `header`; a line that does not have the form is dropped."""
    def pick(line: str) -> tuple[str, list] | str:
        if tables.SURROGATE.search(line):
            return tables.NOT_UTF8
        found = form.fullmatch(line)
        return (found["name"].strip(), [found["caption"]]) if found else "not a picture and a caption"

    lines = ((number, line) for number, line in tables.text_lines(path) if number > header and line.strip())
    return picked_captions(path, lines, pick, report, "take the file as it was published")


def read_xflickrco(path: PathLike, pictures: Paths, report: Report) -> Iterator[dict]:
    """Captions records of xFlickrCO (Bugliarello et al. 2022, IGLUE), such as annotations/id/test.jsonl.

    A line is `{"sentences": [str, …], "id": …, "img_path": name}`. `pictures` are two folders: Flickr30k's and COCO's,
    of 2014 or of 2017. Meant for evaluation. Raises ValueError for a different file.
    """
    path, remedy = Path(path), "take xFlickrCO's annotations/id/test.jsonl"
    captions = picked_captions(path, json_records(path, report), lambda row: (row["img_path"], row["sentences"]),
                               report, remedy, "no 'sentences' or 'img_path'")
    return local_records(captions, pictures, report, "xflickrco", "test")


def read_xm3600(path: PathLike, pictures: Paths, report: Report, *, language: str = "id") -> Iterator[dict]:
    """Captions records of Crossmodal-3600 (Thapliyal et al. 2022) in one of its 36 languages, of captions.jsonl.

    A line is `{"image/key": key, "id": {"caption": [str, …], …}, "en": {…}, …}`; the picture is `key.jpg`. Meant for
    evaluation, not for training. Raises ValueError for a different file, or if its first line lacks the language.
    """
    path, remedy = Path(path), "take XM3600's captions.jsonl, and one of its languages"
    captions = picked_captions(
        path, json_records(path, report), lambda row: (row["image/key"] + ".jpg", row[language]["caption"]), report,
        remedy, f"no captions in {language!r}")
    return local_records(captions, pictures, report, "xm3600", "test")
