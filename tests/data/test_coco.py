"""COCO captions as published and as translated: five captions a picture, gathered, and what is left out counted."""

import json

import pytest

from clipid_utils.data.captions import read_captions, write_captions
from clipid_utils.data.report import Report
from clipid_utils.data.sources.coco import read_coco


@pytest.fixture
def pictures(tmp_path):
    """The folder train2017 with three pictures in it."""
    folder = tmp_path / "train2017"
    folder.mkdir()
    for number in (9, 25, 30):
        (folder / f"{number:012d}.jpg").touch()
    return folder


def annotation(number: int, image: int, caption) -> dict:
    return {"image_id": image, "id": number, "caption": caption}


def read(path, pictures):
    report = Report()
    return list(read_coco(path, pictures, report)), report


ANNOTATIONS = [
    annotation(37, 25, "A giraffe."), annotation(38, 9, "Food in\na tray \n"), annotation(39, 25, "Two giraffes"),
    annotation(40, 9, " \n"), annotation(41, 77, "A lost picture"), annotation(42, 25, "A giraffe."),
    annotation(43, 30, 'A "vase" \ud83d'), annotation(44, 30, None),
]


@pytest.mark.parametrize("images", [
    None,  # as the ancestor's
    [{"id": n, "file_name": f"{n:012d}.jpg", "license": 3} for n in (9, 25, 30, 77)],
    [{"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg"} for n in (9, 25, 30, 77)],  # 2014's list, 2017's folder
])
def test_the_annotations_as_published(tmp_path, pictures, images):
    value = {"info": {}, "licenses": [], "annotations": ANNOTATIONS} | ({"images": images} if images else {})
    (tmp_path / "captions_train2017.json").write_text(json.dumps(value), encoding="utf-8-sig")
    records, report = read(tmp_path / "captions_train2017.json", pictures)
    assert records == [
        {"image_path": str(pictures / f"{number:012d}.jpg"), "captions": captions, "source": "coco", "split": None}
        for number, captions in ((25, ["A giraffe.", "Two giraffes"]), (9, ["Food in a tray"]), (30, ['A "vase" ?']))]
    assert (report.read, report.kept) == (8, 4)
    assert report.dropped == {"empty caption": 2, "picture not found": 1, "the picture has this caption already": 1}
    assert report.examples["picture not found"][0].startswith("captions_train2017.json, annotation 5: ")


def test_the_records_are_read_where_they_are_written(tmp_path, pictures):
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": ANNOTATIONS}))
    write_captions(read_coco(tmp_path / "captions.json", pictures, Report()), tmp_path / "coco.jsonl")
    records = read_captions(tmp_path / "coco.jsonl")
    assert len(records) == 3 and "train2017/000000000025.jpg" in (tmp_path / "coco.jsonl").read_text()


def test_a_picture_that_is_not_listed_and_has_no_number_is_dropped(tmp_path, pictures):
    (pictures / "vas.jpg").touch()
    captions = [annotation(1, "vas", "A vase"), annotation(2, "kucing", "A cat"), annotation(3, 25, "A giraffe."),
                annotation(4, None, "A dog")]
    value = {"images": [{"id": "vas", "file_name": "vas.jpg"}, {"id": "kucing"}], "annotations": captions}
    (tmp_path / "captions.json").write_text(json.dumps(value))
    records, report = read(tmp_path / "captions.json", pictures)
    assert [(record["image_path"][len(str(pictures)) + 1 :], record["captions"]) for record in records] == [
        ("vas.jpg", ["A vase"]), ("000000000025.jpg", ["A giraffe."])]  # a number's name is known without a list
    assert report.dropped == {"picture not listed": 2} and report.read == 4
    assert report.examples["picture not listed"][0] == (
        f"captions.json, annotation 2: {str(captions[1])[:80]!r}")


@pytest.mark.parametrize("header", ["caption\timage_name\n", "image_name\tcaption\n", ""])
def test_the_translated_table_in_any_order_of_rows(tmp_path, pictures, header):
    rows = [("seekor jerapah", 25), ("makanan, di \tnampan", 9), ("dua jerapah", 25), ('"vas" itu', 30), ("hilang", 77)]
    cells = [(caption, f"{number:012d}.jpg")[:: -1 if header.startswith("image") else 1] for caption, number in rows]
    (tmp_path / "coco.tsv").write_text(header + "\n".join(map("\t".join, cells)))
    records, report = read(str(tmp_path / "coco.tsv"), str(pictures))
    assert [(record["image_path"][-6:], record["captions"]) for record in records] == [
        ("25.jpg", ["seekor jerapah", "dua jerapah"]), ("09.jpg", ["makanan, di nampan"]), ("30.jpg", ['"vas" itu'])]
    lost = 6 if header else 5
    assert report.examples == {"picture not found": [f"coco.tsv:{lost}: '000000000077.jpg'"]} and report.kept == 4


@pytest.mark.parametrize("text, message", [
    ('{"annotations": [{"image_id": 9, "id": 1, "bbox": []}]}', r"annotation 1: .*different format"),
    ('{"images": []}', "no captions here"), ("[]", "no captions here"), ('{"annotations": []}', "no captions here"),
    ('{"annotations": [\n1,', r"coco\.json:2: not valid JSON"), ('{"annotations": [NaN]}', r"coco\.json: not valid"),
    ("\xff", "byte 1 is not UTF-8"),
])
def test_another_file_is_refused_at_once(tmp_path, pictures, text, message):
    (tmp_path / "coco.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=f"{message}.*take the captions_"):
        read(tmp_path / "coco.json", pictures)


def test_a_folder_that_is_not_there_is_refused_at_once(tmp_path):
    (tmp_path / "coco.json").write_text(json.dumps({"annotations": ANNOTATIONS}))
    with pytest.raises(ValueError, match="val2017: no such folder: unpack the pictures there"):
        read(tmp_path / "coco.json", tmp_path / "val2017")


def test_annotations_are_not_held_at_once(tmp_path, pictures, monkeypatch):
    """The reader gets by without the value of a whole file."""
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": ANNOTATIONS}))
    monkeypatch.setattr("clipid_utils.files.json.loads", None)
    assert len(read(path, pictures)[0]) == 3
