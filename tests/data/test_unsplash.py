"""Unsplash Lite's tables, in parts, with keywords, under either ending."""

import pytest

from clipid_utils.data.report import Report
from clipid_utils.data.sources.unsplash import read_unsplash

PHOTOS = ("photo_id\tphoto_url\tphoto_image_url\tphoto_width\tphoto_description\tphotographer_username\t"
          "ai_description\tblur_hash\n")
KEYWORDS = "photo_id\tkeyword\tai_service_1_confidence\tai_service_2_confidence\tsuggested_by_user\n"


def photo(name: str, description: str = "", ai: str = "", host: str = "https://images.unsplash.com/") -> str:
    return f"{name}\thttps://unsplash.com/photos/{name}\t{host}photo-{name}\t4000\t{description}\tana\t{ai}\tL00\n"


@pytest.mark.parametrize("ending", ["tsv000", "csv000", "tsv"])
def test_photos_with_their_descriptions_and_keywords(tmp_path, ending):
    (tmp_path / f"photos.{ending}").write_text(
        PHOTOS + photo("a", '"Say ""hi""\nto all"', "a lake") + photo("b") + photo("c", host="https://images.unsplash.com.jpg/")
        + photo("d", "", "a lake ") + photo("a", "again"))
    (tmp_path / f"keywords.{ending}").write_text(
        KEYWORDS + "a\tlake\t99.5\t\tf\na\tcar\t20.0\t31\tf\nd\t \t99\t\tf\na\tDanau Toba\t\t\tt\nb\tsky\t10\t\tf\n"
        + "a\tlake\t99\t\tt\n")
    for other in ("collections", "conversions", "colors"):
        (tmp_path / f"{other}.{ending}").write_text("x\n")
    report = Report()
    rows = list(read_unsplash(tmp_path, report))
    assert rows == [
        {"url": f"https://images.unsplash.com/photo-{name}?w=640&fm=jpg&fit=max", "captions": captions,
         "source": "unsplash", "split": None, "row": row}
        for name, captions, row in (("a", ['Say "hi" to all', "a lake", "lake, Danau Toba"], 0), ("d", ["a lake"], 3))]
    assert report.dropped == {"photo without captions": 1, "address of a different host": 1, "repeated photo": 1}
    assert report.examples["repeated photo"] == [f"photos.{ending}:7: 'a'"]


def test_the_full_set_comes_in_parts(tmp_path):
    (tmp_path / "photos.tsv000").write_text(PHOTOS + photo("a", "x"))
    (tmp_path / "photos.tsv001").write_text(PHOTOS + photo("b", "y"))
    (tmp_path / "keywords.tsv000").write_text(KEYWORDS)
    assert [row["row"] for row in read_unsplash(tmp_path, Report())] == [0, 1]


def test_another_folder_or_file_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"no photos\.tsv000 here: unpack the archive"):
        list(read_unsplash(tmp_path, Report()))
    (tmp_path / "photos.tsv000").write_text("a\tb\n")
    with pytest.raises(ValueError, match=r"no keywords\.tsv000 here: unpack the archive"):
        list(read_unsplash(tmp_path, Report()))
    (tmp_path / "keywords.tsv000").write_text(KEYWORDS)
    with pytest.raises(ValueError, match=r"photos\.tsv000:1: the header lacks photo_id, photo_image_url"):
        list(read_unsplash(tmp_path, Report()))
