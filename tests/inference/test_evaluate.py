import json

import datasets
import numpy as np
import pytest
from colour_model import colour_clip, spot

from clipid_utils.inference import evaluate

GROUPS = {"merah": ("fruit", "buah"), "hijau": ("animals", "hewan"), "biru": ("fish", "ikan")}


def split(names: list[str], artist: str, shade: int = 0) -> datasets.Dataset:
    rows = {
        "image": [spot(name, shade=shade + i) for i, name in enumerate(names)],
        "artist": [artist] * len(names),
        "concept": [f"c-{name}" for name in names],
        "name_id": names,
        "group": [GROUPS[name][0] for name in names],
        "group_id": [GROUPS[name][1] for name in names],
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


@pytest.fixture(scope="module")
def dictionary():
    return datasets.DatasetDict(
        train=split(["merah", "hijau", "biru"] * 2, "openmoji"),
        validation=split(["merah", "hijau", "biru", "merah"], "twemoji", 7),
        unseen_artist=split(["merah", "hijau", "biru"], "noto", 3),
        unseen_concept=split(["biru", "hijau"], "noto", 9),
        photographs=split(["merah", "biru"], "tuxpaint", 11),
    )


@pytest.fixture(scope="module")
def report(dictionary, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate") / "metrics.json"
    found = evaluate.evaluate_checkpoint(colour_clip(), dictionary, out=out, progress=False)
    assert json.loads(out.read_text()) == found
    return found


def test_a_model_that_knows_gets_everything_right(report):
    for name in evaluate.SPLITS:
        for direction in ("text_to_image", "image_to_text"):
            assert report["retrieval"][name][direction]["R@1"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert report["zero_shot"]["validation"]["concept_within_group"]["templates"]["top1"]["value"] == 1.0
    assert report["pixel_nearest_neighbour"]["R@1"]["value"] == 1.0


def test_sizes_versions_and_checksums_are_recorded(report):
    both = report["retrieval"]["validation"]
    assert (both["text_to_image"]["queries"], both["text_to_image"]["candidates"]) == (3, 4)
    assert (both["image_to_text"]["queries"], both["image_to_text"]["candidates"]) == (4, 3)
    assert report["data"]["photographs"]["pictures"] == 2 and len(report["data"]["photographs"]["sha256"]) == 64
    assert report["seed"] == 0 and {"python", "jax", "numpy"} <= set(report["versions"])
    assert len(report["checkpoint"]["fingerprint"]) == 16
    assert report["zero_shot"]["validation"]["group"]["naive"]["classes"] == 3


def test_the_same_again(report, dictionary):
    assert evaluate.evaluate_checkpoint(colour_clip(), dictionary, progress=False) == report


def test_the_checksum_sees_a_pixel(dictionary):
    rows = dictionary["photographs"]
    images = list(rows["image"])
    before = evaluate.data_checksum(rows, images)
    images[0] = images[0].copy()
    images[0].putpixel((0, 0), (254, 255, 255))
    assert evaluate.data_checksum(rows, images) != before


def test_same_names_of_two_concepts_are_right_for_each_other():
    model, processor = colour_clip()
    rows = split(["merah", "merah"], "noto")
    rows = rows.remove_columns("concept").add_column("concept", ["a", "b"])
    both = evaluate.retrieval_both_ways(model, processor, rows, np.array([[1, 0, 0, 0], [0.9, 0, 0, 0.1]], np.float32))
    assert both["text_to_image"]["R@1"]["value"] == 1.0 and both["text_to_image"]["queries"] == 2


def test_the_pixel_baseline_leaves_out_what_cannot_be_found(dictionary):
    summary = evaluate.pixel_baseline(dictionary["unseen_artist"], split(["merah"], "openmoji"))
    assert (summary["queries"], summary["without_candidate"]) == (1, 2)
    with pytest.raises(ValueError, match="shares its concept"):
        evaluate.pixel_baseline(split(["merah"], "noto"), split(["biru"], "openmoji"))


def test_a_missing_split_is_named(dictionary):
    with pytest.raises(KeyError, match="uji"):
        evaluate.evaluate_checkpoint(colour_clip(), dictionary, splits=("uji",))
