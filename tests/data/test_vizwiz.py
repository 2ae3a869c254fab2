"""VizWiz-Captions as published, with its flags, and as translated."""

import json

import pytest

from clipid_utils.data.report import Report
from clipid_utils.data.sources.coco import read_vizwiz


@pytest.fixture
def pictures(tmp_path):
    for number in range(2):
        (tmp_path / f"VizWiz_train_{number:08d}.jpg").touch()
    return tmp_path


def test_rejected_and_canned_captions_are_left_out(tmp_path, pictures):
    canned = "Quality issues are too severe to recognize visual content."
    captions = [(0, "A can of food", False, False), (0, canned, False, True), (1, "spam", True, False),
                (1, "a mug ", False, False), (2, "lost", False, False), (9, "unlisted", False, False)]
    value = {"images": [{"id": n, "file_name": f"VizWiz_train_{n:08d}.jpg", "text_detected": True} for n in range(3)],
             "annotations": [{"image_id": image, "caption": caption, "is_rejected": rejected, "is_precanned": precanned,
                              "id": number, "text_detected": False}
                             for number, (image, caption, rejected, precanned) in enumerate(captions)]}
    (tmp_path / "train.json").write_text(json.dumps(value))
    report = Report()
    records = list(read_vizwiz(tmp_path / "train.json", pictures, report))
    assert records == [
        {"image_path": str(tmp_path / f"VizWiz_train_{number:08d}.jpg"), "captions": [caption], "source": "vizwiz",
         "split": None} for number, caption in ((0, "A can of food"), (1, "a mug"))]
    assert report.dropped == {"is_precanned": 1, "is_rejected": 1, "picture not found": 2}
    assert report.examples["is_precanned"] == [
        f"train.json, annotation 2: {str(value['annotations'][1])[:80]!r}"]


def test_the_translation(tmp_path, pictures):
    value = [{"image_path": "VizWiz_train_00000001.jpg", "captions": ["cangkir", "", "sebuah  cangkir\n", "cangkir"]},
             {"image_path": "VizWiz_train_00000000.jpg", "captions": []},
             {"image_path": "VizWiz_train_00000007.jpg", "captions": ["hilang"]}]
    (tmp_path / "vizwiz.json").write_text(json.dumps(value))
    report = Report()
    (record,) = read_vizwiz(tmp_path / "vizwiz.json", pictures, report)
    assert record["captions"] == ["cangkir", "sebuah cangkir"]
    assert report.dropped == {"empty caption": 1, "picture without captions": 1, "picture not found": 1,
                              "the picture has this caption already": 1}
    assert report.examples["picture without captions"] == ["vizwiz.json, entry 2: 'VizWiz_train_00000000.jpg'"]


@pytest.mark.parametrize("value", [{"images": []}, [{"image": "a.jpg", "captions": ["a"]}], ["a"]])
def test_another_file_is_refused_at_once(tmp_path, pictures, value):
    (tmp_path / "train.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"train\.json:"):
        list(read_vizwiz(tmp_path / "train.json", pictures, Report()))
