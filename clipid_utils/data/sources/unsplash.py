"""Unsplash Lite: 25,000 photographs to search in. Neither they nor their data may be passed on (its TERMS.md)."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from clipid_utils.data.report import Report
from clipid_utils.data.sources.disk_table import OnDisk, gathered
from clipid_utils.data.sources.tables import clean_caption, example, quoted_table

PLACE = "https://images.unsplash.com/"
PART = re.compile(r"(photos|keywords)\.[ct]sv\d*$")  # photos.tsv000; from 2025 on photos.csv000, tabs all the same


def read_unsplash(
    folder: str | os.PathLike, report: Report, *, width: int = 640, confidence: int | float = 60,
    split: str | None = None,
) -> Iterator[dict]:
    """Rows for pictures yet to be downloaded, of the folder with photos.tsv000 and keywords.tsv000.

    A row is `{"url", "captions", "source", "split", "row"}`. The captions, in English, are those that there are of the
    photographer's, the one made by a machine, and the keywords in one: those that a user gave or of which a machine is
    sure, by `confidence` of 100. The address asks for `width` pixels, not for the 10 MB of the whole. A photo without
    captions, one that came before, and an address of another host (there are such) are dropped; the report counts
    photos. Raises ValueError where the files or their columns are missing.
    """
    folder = Path(folder)
    photos, lists = _parts(folder, "photos"), _parts(folder, "keywords")
    for table, parts in (("photos", photos), ("keywords", lists)):
        if not parts:
            raise ValueError(f"{folder}: no {table}.tsv000 here: unpack the archive of Unsplash Lite, and name its "
                             "folder")
    keywords = OnDisk((photo, ", ".join(dict.fromkeys(words)))
                      for photo, _, words in gathered(_keywords(lists, report, confidence)))
    columns, seen = ("photo_id", "photo_image_url", "photo_description?", "ai_description?"), OnDisk()
    for row, path, number, (photo, url, *texts) in quoted_table(photos, columns, report):
        captions = [text for text in map(clean_caption, [*texts, keywords.get(photo)]) if text]
        if not url.startswith(PLACE):
            report.drop("address of another host", example(path, number, url))
        elif not captions:
            report.drop("photo without captions", example(path, number, photo))
        elif not seen.add(photo):
            report.drop("photo came before", example(path, number, photo))
        else:
            report.keep()
            yield {"url": f"{url}?w={width}&fm=jpg&fit=max", "captions": list(dict.fromkeys(captions)),
                   "source": "unsplash", "split": split, "row": row}


def _parts(folder: Path, table: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if (found := PART.match(path.name)) and found[1] == table)


def _keywords(paths: list[Path], report: Report, confidence: int | float) -> Iterator[tuple[str, int, str]]:
    columns = ("photo_id", "keyword", "ai_service_1_confidence", "ai_service_2_confidence", "suggested_by_user")
    for row, _, _, (photo, keyword, first, second, suggested) in quoted_table(paths, columns, report):
        keyword = clean_caption(keyword)
        if keyword and (suggested in ("t", "true", "True") or max(_number(first), _number(second)) >= confidence):
            yield photo, row, keyword


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0  # most are empty
