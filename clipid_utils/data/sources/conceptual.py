"""CC3M, CC12M and SBU: captions with the addresses of their pictures, as tables, and the mirrors of the pictures.

    rows = read_conceptual("cc12m_translate_final.tsv", report, source="cc12m")   # for download.py

Where links are dead the mirrors still have the picture (`pixparse/cc3m-wds` and `pixparse/cc12m-wds` on the hub, in
WebDataset's tars), with its English caption and mostly its address, by which the translation is found:

    translations = OnDisk(address_captions("cc12m_translate_final.tsv", Report()))
    records = read_mirror(sorted(Path("cc12m-wds").glob("*.tar")), report, source="cc12m", translations=translations)
    write_captions(records, "cc12m.parquet")

CC12M has `<PERSON>` where a name stood; it stays.
"""

import itertools
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from clipid_utils.data.report import Report
from clipid_utils.data.sources.disk_table import OnDisk
from clipid_utils.data.sources.tables import (
    NO_TEXT,
    NOT_UTF8,
    caption_table,
    clean_caption,
    each,
    example,
    refused,
    text_lines,
)

PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp")
SBU_FILES = ("SBU_captioned_photo_dataset_urls.txt", "SBU_captioned_photo_dataset_captions.txt")


def read_conceptual(
    path: str | os.PathLike, report: Report, *, source: str, split: str | None = None
) -> Iterator[dict]:
    """Rows for pictures yet to be downloaded, of CC3M's, CC12M's or the translations' TSV.

    Columns `caption` and `url` in either order, with the translations' header or, as published, without one. A row is
    `{"url", "captions", "source", "split", "row"}`, `row` counted from 0 after the header. SVG, what is no http(s)
    address, and an address that came before, are dropped. Raises ValueError for another file.
    """
    return _addressed(caption_table(Path(path), "url", report), Path(path), report, source, split)


def read_sbu(folder: str | os.PathLike, report: Report, *, split: str | None = None) -> Iterator[dict]:
    """Rows as `read_conceptual` has them, of SBU's two text files, whose lines belong together by number.

    Its translation is a TSV, which `read_conceptual` reads. Raises ValueError where one file has more lines.
    """
    return _addressed(_line_by_line(Path(folder), report), Path(folder) / SBU_FILES[1], report, "sbu", split)


def _line_by_line(folder: Path, report: Report) -> Iterator[tuple[int, int, str, str]]:
    urls, captions = (folder / name for name in SBU_FILES)
    for url, caption in itertools.zip_longest(text_lines(urls), text_lines(captions)):
        if url is None or caption is None:
            longer, (number, _) = (urls, url) if caption is None else (captions, caption)
            raise ValueError(f"{longer}:{number}: the other file of {' and '.join(SBU_FILES)} ends before this line: "
                             "fetch both again")
        number, text = caption
        if NO_TEXT.search(text + url[1]):
            report.drop(NOT_UTF8, example(captions, number, text))
        elif clean := clean_caption(text):
            yield number - 1, number, url[1].strip(), clean
        else:
            report.drop("empty caption", example(captions, number, url[1]))


def _addressed(
    table: Iterable[tuple[int, int, str, str]], path: Path, report: Report, source: str, split: str | None
) -> Iterator[dict]:
    seen = OnDisk()
    for row, number, url, caption in table:
        if reason := refused(url):
            report.drop(reason, example(path, number, url))
        elif not seen.add(url):
            report.drop("address came before", example(path, number, url))
        else:
            report.keep()
            yield {"url": url, "captions": [caption], "source": source, "split": split, "row": row}


def address_captions(path: str | os.PathLike, report: Report) -> Iterator[tuple[str, str]]:
    """(url, caption) of each row of a TSV such as `read_conceptual` reads; what is dropped is reported."""
    for _, _, url, caption in caption_table(Path(path), "url", report):
        yield url, caption


def read_mirror(
    tars: str | os.PathLike | Iterable, report: Report, *, source: str, split: str | None = None,
    translations: OnDisk | None = None,
) -> Iterator[dict]:
    """Records `{"image": bytes, "captions", "source", "split"}` of WebDataset's tars, for Parquet.

    A sample is a picture, its caption (.txt, or "caption" in .json) and its address ("url" in .json; the validation
    tars of cc3m-wds have none). With `translations`, by address, their caption takes the place of the English one, and
    a picture without one is dropped. Raises ValueError for a file that is no tar, or is cut off.
    """
    for path in each(tars):
        for name, members in _samples(path):
            place = example(path, name)
            picture = next((members[ending] for ending in PICTURE_ENDINGS if members.get(ending)), None)
            facts = _facts(members.get("json"))
            caption = members["txt"].decode("utf-8", "surrogateescape") if "txt" in members else facts.get("caption")
            if translations is not None:
                url = facts.get("url")
                caption = translations.get(url) if isinstance(url, str) else None
            if picture is None:
                report.drop("no picture in the sample", place)
            elif caption is None:
                report.drop("no caption in the sample" if translations is None else "no translation of its address",
                            place)
            elif NO_TEXT.search(str(caption)):
                report.drop(NOT_UTF8, place)
            elif not (clean := clean_caption(caption)):
                report.drop("empty caption", place)
            else:
                report.keep()
                yield {"image": picture, "captions": [clean], "source": source, "split": split}


def _facts(text: bytes | None) -> dict:
    try:
        facts = json.loads(text or b"{}")
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Name and files, by ending, of each run of files of one name in a tar, which ends at the first dot."""
    try:
        with tarfile.open(path, "r|*") as tar:
            files = ((*_split(member.name), tar.extractfile(member).read()) for member in _members(tar)
                     if member.isfile())
            for name, group in itertools.groupby(files, key=lambda file: file[0]):
                yield name, {ending: content for _, ending, content in group}
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: no tar, or cut off ({error}): fetch it again") from None


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, which would keep each that was read."""
    for member in tar:
        tar.members.clear()
        yield member


def _split(name: str) -> tuple[str, str]:
    folder, base = os.path.split(name)
    stem, _, ending = base.partition(".")
    return os.path.join(folder, stem), ending.lower()
