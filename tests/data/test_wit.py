"""WIT's tables: one language of many, quoted fields over several lines, a picture's captions together."""

import csv
import gzip
import io

import pytest

from clipid_utils.data.report import EXAMPLES, Report
from clipid_utils.data.sources.wit import read_wit

COLUMNS = (
    "language page_url image_url page_title section_title hierarchical_section_title caption_reference_description "
    "caption_attribution_description caption_alt_text_description mime_type original_height original_width "
    "is_main_image attribution_passes_lang_id page_changed_recently context_page_description "
    "context_section_description").split()
COMMONS = "https://upload.wikimedia.org/wikipedia/commons/"


def row(name: str, caption: str, language: str = "id", mime_type: str = "image/jpeg") -> dict:
    return {"language": language, "page_url": "https://id.wikipedia.org/wiki/Candi", "image_url": COMMONS + name,
            "caption_reference_description": caption, "mime_type": mime_type, "original_height": 300,
            "is_main_image": "true", "context_page_description": 'Candi "Sewu"\n\nadalah\tcandi', }


def write(path, rows: list[dict], packed: bool = True) -> None:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes((gzip.compress if packed else bytes)(file.getvalue().encode()))


def test_rows_of_the_language_and_their_captions_by_picture(tmp_path):
    write(tmp_path / "wit_v1.train.all-00000-of-00010.tsv.gz", [
        row("a.jpg", "Candi Sewu"), row("a.jpg", "A temple", "en"), row("b.svg", "Peta"), row("b.png", "Peta", "id",
        "image/svg+xml"), row("c.jpg", ""), row("d.jpg", ' "Candi",\n dari timur'), row("a.jpg", "Candi dari jauh")])
    write(tmp_path / "1.tsv", [row("a.jpg", "Candi Sewu"), row("e.jpg", "Gunung")], packed=False)
    report = Report()
    rows = list(read_wit([tmp_path / "wit_v1.train.all-00000-of-00010.tsv.gz", tmp_path / "1.tsv"], report))
    assert rows == [{"url": COMMONS + name, "captions": captions, "source": "wit", "split": None, "row": number}
                    for name, captions, number in (("a.jpg", ["Candi Sewu", "Candi dari jauh"], 0),
                                                   ("d.jpg", ['"Candi", dari timur'], 5), ("e.jpg", ["Gunung"], 8))]
    assert report.dropped == {"SVG": 2, "empty caption_reference_description": 1, "language is not id": 1,
                              "the picture has this caption already": 1}
    assert report.examples["language is not id"] == [
        f"wit_v1.train.all-00000-of-00010.tsv.gz:5: 'en: {COMMONS}a.jpg'"]
    assert report.examples["empty caption_reference_description"] == [
        f"wit_v1.train.all-00000-of-00010.tsv.gz:14: '{COMMONS}c.jpg'"] and report.kept == 4


def test_every_row_of_every_language_is_counted(tmp_path):
    languages = ["en", "id", "jv", "de", "", "id-ID", "ms", "ID", "id", "su"]
    write(tmp_path / "wit.tsv.gz", [row(f"{number}.jpg", "" if number == 8 else f"Candi {number}", language)
                                    for number, language in enumerate(languages)])
    report = Report()
    assert [found["row"] for found in read_wit([tmp_path / "wit.tsv.gz"], report)] == [1]
    assert (report.read, report.kept) == (len(languages), 1)
    assert report.dropped == {"language is not id": 8, "empty caption_reference_description": 1}
    assert len(report.examples["language is not id"]) == EXAMPLES < 8
    assert str(report).splitlines()[:2] == ["10 read, 1 kept, 9 dropped", "       8 language is not id"]


def test_a_table_that_lacks_a_column_is_refused(tmp_path):
    (tmp_path / "wit.tsv").write_text(f"caption_reference_description\timage_url\nCandi\t{COMMONS}a.jpg\n")
    with pytest.raises(ValueError, match=r"wit\.tsv:1: the header lacks mime_type, language"):
        list(read_wit(tmp_path / "wit.tsv", Report()))
