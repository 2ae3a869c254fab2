"""Unsplash Lite: 25,000 photographs to search in. Its TERMS.md forbids passing on the photographs and their data."""

import re
from collections.abc import Iterator
from pathlib import Path

from clipid_utils.data.report import Report
from clipid_utils.data.sources.disk_table import OnDisk, gathered
from clipid_utils.data.sources.tables import PathLike, clean_caption, quoted_table

PREFIX = "https://images.unsplash.com/"
CONFIDENCE = 60  # of 100, that a machine gives a keyword


def read_unsplash(folder: PathLike, report: Report) -> Iterator[dict]:
    """Rows of pictures to download, from the folder with photos.tsv000 and keywords.tsv000.

    A row is `{"url", "captions", "source", "split", "row"}`. The English captions are the photographer's, a machine's,
    and the keywords as one caption: those that a user gave or that a machine is sure of (CONFIDENCE). The address
    asks for 640 pixels and not for the original of 10 MB. Photos without captions,
    repeated photos and addresses of a different host (some exist) are dropped; the report counts photos. Raises
    ValueError if the files or their columns are missing.
    """
    folder = Path(folder)
    photos, keywords = (_parts(folder, table) for table in ("photos", "keywords"))
    keywords = OnDisk((photo, ", ".join(dict.fromkeys(words)))
                      for photo, _, words in gathered(_keywords(keywords, report)))
    columns, seen = ("photo_id", "photo_image_url", "photo_description", "ai_description"), OnDisk()
    for row, path, number, (photo, url, *texts) in quoted_table(photos, columns, report):
        captions = [text for text in map(clean_caption, [*texts, keywords.get(photo)]) if text]
        if not url.startswith(PREFIX):
            report.drop("address of a different host", path, number, url)
        elif not captions:
            report.drop("photo without captions", path, number, photo)
        elif report.count(None if seen.add(photo) else "repeated photo", path, number, photo):
            yield {"url": f"{url}?w=640&fm=jpg&fit=max", "captions": list(dict.fromkeys(captions)),
                   "source": "unsplash", "split": None, "row": row}


def _parts(folder: Path, table: str) -> list[Path]:
    """The files of a table: photos.tsv000; since 2025 photos.csv000, also with tabs."""
    if paths := sorted(path for path in folder.iterdir() if re.fullmatch(rf"{table}\.[ct]sv\d*", path.name)):
        return paths
    raise ValueError(f"{folder}: no {table}.tsv000 here: unpack the archive of Unsplash Lite, and name its folder")


def _keywords(paths: list[Path], report: Report) -> Iterator[tuple[str, int, str]]:
    columns = ("photo_id", "keyword", "ai_service_1_confidence", "ai_service_2_confidence", "suggested_by_user")
    for row, _, _, (photo, keyword, first, second, suggested) in quoted_table(paths, columns, report):
        keyword = clean_caption(keyword)
        if keyword and (suggested in ("t", "true", "True") or max(_number(first), _number(second)) >= CONFIDENCE):
            yield photo, row, keyword


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0  # most are empty
