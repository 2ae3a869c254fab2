"""WIT, the pictures of Wikipedia with the captions that its pages give them (Srinivasan et al. 2021)."""

from collections.abc import Iterator
from pathlib import Path

from clipid_utils.data.report import Report
from clipid_utils.data.sources.disk_table import gathered
from clipid_utils.data.sources.tables import Paths, as_paths, clean_caption, quoted_table, refused, unique_captions

CAPTION = "caption_reference_description"  # under the picture on the page


def read_wit(paths: Paths, report: Report, *, language: str = "id") -> Iterator[dict]:
    """Rows of pictures to download, from wit_v1.train.all-*.tsv.gz, packed or not.

    A row is `{"url", "captions", "source", "split", "row"}`: an address with all captions that pages in the language
    give it. `row` is the address's first row, from 0 over all files. Rows in a different language, most of a published
    file, are dropped, and so are SVG and rows without a caption. Raises ValueError for a file that lacks the columns.
    """
    for url, row, captions in gathered(_rows(as_paths(paths), report, language)):
        captions = unique_captions(captions, report, f"row {row + 1}: {url!r}")
        yield {"url": url, "captions": captions, "source": "wit", "split": None, "row": row}


def _rows(paths: list[Path], report: Report, language: str) -> Iterator[tuple[str, int, str]]:
    columns = ("image_url", CAPTION, "mime_type", "language")
    misfit = f"language is not {language}"
    for row, path, number, (url, text, mime_type, spoken) in quoted_table(paths, columns, report):
        if spoken != language:
            report.drop(misfit, path, number, f"{spoken}: {url}")
        elif not (text := clean_caption(text)):
            report.drop(f"empty {CAPTION}", path, number, url)
        elif reason := refused(url, mime_type):
            report.drop(reason, path, number, url)
        else:
            yield url, row, text
