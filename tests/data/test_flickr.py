"""Flickr8k, Flickr30k and xFlickrCO in each of the forms in which they go about."""

import json

import pytest

from clipid_utils.data.report import Report
from clipid_utils.data.sources.flickr import read_flickr, read_xflickrco


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("1000268201_693b08cb0e.jpg", "1000092795.jpg", "2199200615.jpg", "000000391895.jpg"):
        (folder / name).touch()
    return folder


def read(path, pictures, source="flickr30k"):
    report = Report()
    records = list(read_flickr(path, pictures, report, source=source))
    assert all(record["source"] == source and record["split"] is None for record in records)
    return {record["image_path"].rpartition("/")[2]: record["captions"] for record in records}, report


def test_flickr8k_translated_with_its_marks(tmp_path, pictures):
    marked = ["<start> seorang anak &amp; tangga <end>", "", "<start>  <end>", "anak <end>"]
    value = {"1000268201_693b08cb0e.jpg": marked,
             "2258277193_586949ec62.jpg.1": ["<start> orang di \u201clalu lintas\u201d <end>"], "9.jpg": []}
    (tmp_path / "flickr8k.json").write_text(json.dumps(value, indent=1))
    found, report = read(tmp_path / "flickr8k.json", pictures, "flickr8k")
    assert found == {"1000268201_693b08cb0e.jpg": ["seorang anak & tangga", "anak"]}
    assert report.dropped == {"empty caption": 2, "picture not found": 1, "picture without captions": 1}


def test_the_token_files_as_published(tmp_path, pictures):
    (tmp_path / "results_20130124.token").write_bytes(
        b"1000092795.jpg#0\tTwo young guys with \xe2\x80\x9cshaggy\xe2\x80\x9d hair .\r\n1000092795.jpg#1\tTwo\tmen .\n"
        b"2258277193_586949ec62.jpg.1#0\tPeople in traffic .\n1000092795.jpg#2\t\n1000092795.jpg 3 no mark\n\n"
        b"1000092795.jpg#4\tcaf\xe9\n2199200615.jpg#4\tA dog runs across the grass .")
    found, report = read(tmp_path / "results_20130124.token", pictures)
    assert found == {"1000092795.jpg": ["Two young guys with \u201cshaggy\u201d hair .", "Two men ."],
                     "2199200615.jpg": ["A dog runs across the grass ."]}
    assert report.dropped == {"picture not found": 1, "empty caption": 1, "not a picture and a caption": 1,
                              "not UTF-8": 1}
    assert report.examples["not a picture and a caption"] == ["results_20130124.token:5: '1000092795.jpg 3 no mark'"]


def test_kaggles_table_with_the_line_that_lacks_a_bar(tmp_path, pictures):
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\n1000092795.jpg| 0| Two young guys , \"one\" | two .\n"
        "2199200615.jpg| 3| A dog .\n2199200615.jpg| 4   A dog runs across the grass .\n1000092795.jpg| 1|\nnothing\n")
    found, report = read(tmp_path / "results.csv", pictures)
    assert found == {"1000092795.jpg": ['Two young guys , "one" | two .'],
                     "2199200615.jpg": ["A dog .", "A dog runs across the grass ."]}
    assert report.examples == {"empty caption": ["results.csv:5: '1000092795.jpg'"],
                               "not a picture and a caption": ["results.csv:6: 'nothing'"]}


def test_flickr30k_translated(tmp_path, pictures):
    (tmp_path / "flickr30k.tsv").write_text(
        'caption\timage_name\n"""Dua"" pria"\t1000092795.jpg\npria\t1000092795.jpg\n')
    found, report = read(tmp_path / "flickr30k.tsv", pictures)
    assert found == {"1000092795.jpg": ['"Dua" pria', "pria"]} and report.kept == 2


@pytest.mark.parametrize("text, message", [
    ('{"images": [{"id": 1}]}', "key images: .*different format: this reads"), ('{"a": ', r"flickr:1: not valid JSON"),
    ("a,b,c", "not the header"), ("", "not the header"),
])
def test_another_file_is_refused_at_once(tmp_path, pictures, text, message):
    (tmp_path / "flickr").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "flickr", pictures)


def test_xflickrco_from_two_folders(tmp_path, pictures):
    rows = [{"sentences": ["Seorang pria.", " "], "id": "1000092795", "img_path": "1000092795.jpg"},
            {"sentences": ["Pengendara motor"], "id": 391895, "img_path": "COCO_val2014_000000391895.jpg"},
            {"id": 1}, {"sentences": ["hilang"], "id": 2, "img_path": "2.jpg"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "other").mkdir()
    report = Report()
    records = list(read_xflickrco(tmp_path / "test.jsonl", [tmp_path / "other", pictures], report))
    assert records == [
        {"image_path": str(pictures / "1000092795.jpg"), "captions": ["Seorang pria."], "source": "xflickrco",
         "split": "test"},
        {"image_path": str(pictures / "000000391895.jpg"), "captions": ["Pengendara motor"], "source": "xflickrco",
         "split": "test"}]
    assert report.dropped == {"empty caption": 1, "no 'sentences' or 'img_path'": 1, "picture not found": 1}
    (tmp_path / "test.jsonl").write_text('{"id": 1}')
    with pytest.raises(ValueError, match=r"test\.jsonl:1: .*: no 'sentences' or 'img_path': take xFlickrCO's"):
        list(read_xflickrco(tmp_path / "test.jsonl", pictures, Report()))
