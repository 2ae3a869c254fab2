"""CC3M, CC12M and SBU: captions with the addresses of their pictures, as tables, and mirrors of the pictures.

    rows = read_conceptual("cc12m_translate_final.tsv", report, source="cc12m")   # for `download`

Where links are dead, the mirrors still have the picture (`pixparse/cc3m-wds` and `pixparse/cc12m-wds` on the hub, in
WebDataset tars), with its English caption and mostly its address, by which the translation is found:

    rows = read_conceptual("cc12m_translate_final.tsv", report, source="cc12m")
    translations = OnDisk((row["url"], row["captions"][0]) for row in rows)
    records = read_mirror(sorted(Path("cc12m-wds").glob("*.tar")), report, source="cc12m", translations=translations)
    write_captions(records, "cc12m.parquet")

CC12M has `<PERSON>` in place of a name; the readers keep it.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from clipid_utils.data.report import Report
from clipid_utils.data.sources import tables
from clipid_utils.data.sources.disk_table import OnDisk
from clipid_utils.data.sources.tables import PathLike, Paths, caption_table, clean_caption
from clipid_utils.data.tars import tar_samples
from clipid_utils.files import parse_line

PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp")
SBU_FILES = ("SBU_captioned_photo_dataset_urls.txt", "SBU_captioned_photo_dataset_captions.txt")


def read_conceptual(path: PathLike, report: Report, *, source: str) -> Iterator[dict]:
    """Rows of pictures to download, from the TSV of CC3M, CC12M or a translation.

    The columns are `caption` and `url` in either order, with the translations' header or, as published, without one. A
    row is `{"url", "captions", "source", "split", "row"}`, with `row` from 0 after the header. SVG, repeated addresses
    and anything but an http(s) address are dropped. Raises ValueError for a different file.
    """
    return _addressed(caption_table(Path(path), "url", report), Path(path), report, source)


def read_sbu(folder: PathLike, report: Report) -> Iterator[dict]:
    """Rows in the form of `read_conceptual`, from SBU's two text files, whose lines belong together by number.

    SBU's translation is a TSV for `read_conceptual`. Raises ValueError if one file has more lines.
    """
    return _addressed(_line_by_line(Path(folder), report), Path(folder) / SBU_FILES[1], report, "sbu")


def _line_by_line(folder: Path, report: Report) -> Iterator[tuple[int, int, str, str]]:
    urls, captions = (folder / name for name in SBU_FILES)
    for row, (url, caption) in enumerate(itertools.zip_longest(*map(tables.text_lines, (urls, captions)))):
        if url is None or caption is None:
            raise ValueError(f"{urls if caption is None else captions}:{row + 1}: the other file of "
                             f"{' and '.join(SBU_FILES)} ends before this line: fetch both again")
        if tables.SURROGATE.search(caption[1] + url[1]):
            report.drop(tables.NOT_UTF8, captions, row + 1, caption[1])
        elif clean := clean_caption(caption[1]):
            yield row, row + 1, url[1].strip(), clean
        else:
            report.drop("empty caption", captions, row + 1, url[1])


def _addressed(table: Iterable[tuple[int, int, str, str]], path: Path, report: Report, source: str) -> Iterator[dict]:
    seen = OnDisk()
    for row, number, url, caption in table:
        reason = tables.refused(url) or (None if seen.add(url) else "repeated address")
        if report.count(reason, path, number, url):
            yield {"url": url, "captions": [caption], "source": source, "split": None, "row": row}


def read_mirror(tars: Paths, report: Report, *, source: str, translations: OnDisk | None = None) -> Iterator[dict]:
    """Records `{"image": bytes, "captions", "source", "split"}` of WebDataset tars, for Parquet.

    A sample is a picture, its caption (.txt, or else "caption" in .json) and its address ("url" in .json; the
    validation tars of cc3m-wds have none). With `translations`, the caption of the address replaces the English one,
    and a picture without a translation is dropped. Raises ValueError for a bad tar, as
    `tar_samples` does.
    """
    for path in tables.as_paths(tars):
        for name, members in tar_samples(path):
            members = {ending.lower(): content for ending, content in members.items()}
            picture = next((members[ending] for ending in PICTURE_ENDINGS if members.get(ending)), None)
            facts = parse_line(members.get("json", b""))[0] or {}
            if translations is not None:
                caption = translations.get(facts["url"]) if isinstance(facts.get("url"), str) else None
            elif "txt" in members:
                caption = members["txt"].decode("utf-8", "surrogateescape")
            else:
                caption = facts.get("caption")
            if picture is None:
                reason = "no picture in the sample"
            elif caption is None:
                reason = "no caption in the sample" if translations is None else "no translation for its address"
            elif tables.SURROGATE.search(str(caption)):
                reason = tables.NOT_UTF8
            else:
                reason = None if (clean := clean_caption(caption)) else "empty caption"
            if report.count(reason, path, name):
                yield {"image": picture, "captions": [clean], "source": source, "split": None}
