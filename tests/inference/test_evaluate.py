"""The whole evaluation: its figures against brute force, and the record of what was evaluated."""

import json

import datasets
import numpy as np
import pytest
from colour_model import colour_clip, spot
from PIL import Image

from clipid_utils.inference import evaluate
from clipid_utils.inference.zeroshot import classifier_weights
from clipid_utils.metrics import bootstrap_interval, label_ranks
from clipid_utils.wording import group_phrase, load_wording

GROUPS = {"merah": ("fruit", "buah"), "hijau": ("animals", "hewan"), "biru": ("fish", "ikan")}


def split(names: list[str], artist: str, shade: int = 0, **columns) -> datasets.Dataset:
    """A picture of each colour; `columns` are in place of those that the colours give."""
    rows = {
        "image": columns.get("image") or [spot(name, shade=shade + i) for i, name in enumerate(names)],
        "artist": [artist] * len(names),
        "concept": [f"c-{name}" for name in names],
        "name_id": names,
        "group": [GROUPS[name][0] for name in names],
        "group_id": [GROUPS[name][1] for name in names],
        **columns,
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
def report(dictionary):
    found = evaluate.evaluate_checkpoint(colour_clip(), dictionary, progress=False)
    assert json.loads(json.dumps(found)) == found
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


def test_the_checksum_sees_a_pixel_a_concept_and_an_artist(dictionary):
    def checksum(rows) -> str:
        report = evaluate.evaluate_checkpoint(colour_clip(), {"photographs": rows}, splits=["photographs"],
                                              progress=False)
        return report["data"]["photographs"]["sha256"]

    rows = split(["merah", "biru"], "noto")
    found = {checksum(rows), checksum(split(["merah", "biru"], "twemoji")), checksum(split(["biru", "merah"], "noto"))}
    images = [image.copy() for image in rows["image"]]
    images[1].putpixel((0, 0), (254, 255, 255))
    found.add(checksum(split(["merah", "biru"], "noto", image=images)))
    found.add(checksum(split(["merah", "biru"], "noto", concept=["x", "y"])))
    assert len(found) == 5 and checksum(rows) in found


def test_pictures_of_one_concept_are_drawn_together():
    """Three pictures of each of four concepts, all right or all wrong: an interval as of four items."""
    model, processor = colour_clip()
    names = ["merah", "hijau", "biru", "ikan"]
    rows = split(["merah"] * 12, "noto", concept=[f"c{i}" for i in range(4) for _ in range(3)],
                 name_id=[name for name in names for _ in range(3)])
    embeds = np.repeat(np.array([[1, 0, 0, 0], [1, 0, 0, 0.1], [0, 0, 1, 0], [1, 0, 0, 0.2]], np.float32), 3, axis=0)
    hits = np.repeat([1.0, 0.0, 1.0, 0.0], 3)
    for seed in (0, 1):
        low, high = bootstrap_interval(hits, seed=seed, clusters=list(rows["concept"]))
        found = evaluate.retrieval_both_ways(model, processor, rows, embeds, seed)["image_to_text"]["R@1"]
        assert found == {"value": 0.5, "low": low, "high": high} and (low, high) != bootstrap_interval(hits, seed=seed)


def test_zero_shot_asks_for_groups_and_for_concepts_within_their_group():
    """Names differ in case and groups come in any order; the figures are those of a search by hand."""
    model, processor = colour_clip()
    rows = split(["merah"] * 5, "noto", name_id=["Merah", "biru", "hijau", "merah", "Biru"],
                 group=["z", "z", "a", "z", "m"], group_id=["ikan", "ikan", "biru", "ikan", "merah"])
    rng = np.random.default_rng(0)
    embeds = rng.random((5, 4)).astype(np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    found = evaluate.zero_shot_both(model, processor, rows, embeds, seed=1)
    for key in ("naive", "templates"):
        templates = load_wording()[key]
        groups = {"z": "ikan", "a": "biru", "m": "merah"}
        weights = classifier_weights(model, processor, [group_phrase(name) for name in groups.values()], templates,
                                     list(groups))
        labels = np.array([list(groups).index(group) for group in rows["group"]])
        right = label_ranks(embeds @ weights.T, labels) < 1
        once = {name: right.mean() for name in ("value", "low", "high")}  # all pictures are of one concept
        assert found["group"][key]["top1"] == once and found["group"][key]["classes"] == 3
        classes = [("merah", "z"), ("biru", "z"), ("hijau", "a"), ("biru", "m")]
        weights = classifier_weights(model, processor, [name for name, _ in classes], templates,
                                     [group for _, group in classes])
        own = np.array([0, 1, 2, 0, 3])
        scores = embeds @ weights.T
        rivals = [[c for c, (_, group) in enumerate(classes) if group == rows["group"][i]] for i in range(5)]
        hits = [scores[i, own[i]] >= scores[i, rivals[i]].max() for i in range(5)]
        assert found["concept_within_group"][key]["top1"] == {name: np.mean(hits) for name in once}
        assert found["concept_within_group"][key]["classes"] == np.mean([len(each) for each in rivals])


def test_same_names_of_two_concepts_are_right_for_each_other():
    model, processor = colour_clip()
    rows = split(["merah", "merah"], "noto", concept=["a", "b"], name_id=["merah", "Merah"])  # in any case
    both = evaluate.retrieval_both_ways(model, processor, rows, np.array([[1, 0, 0, 0], [0.9, 0, 0, 0.1]], np.float32))
    assert both["text_to_image"]["R@1"]["value"] == 1.0 and both["text_to_image"]["queries"] == 2


def test_the_pixel_baseline_leaves_out_what_cannot_be_found(dictionary):
    summary = evaluate.pixel_baseline(dictionary["unseen_artist"], split(["merah"], "openmoji"))
    assert (summary["queries"], summary["without_candidate"]) == (1, 2)
    with pytest.raises(ValueError, match="shares its concept"):
        evaluate.pixel_baseline(split(["merah"], "noto"), split(["biru"], "openmoji"))


def test_the_pixel_baseline_is_a_search_for_the_nearest_picture():
    """Dark and light pictures: a product alone, without the norms, would always find the lightest."""
    rng, names = np.random.default_rng(0), np.array(["merah", "hijau", "biru"] * 4)
    left, right = ((rng.random((12, 32, 32, 3)) * rng.uniform(40, 255, (12, 1, 1, 1))).astype(np.uint8) for _ in "ab")
    distance = ((left[:, None] / 255 - right[None] / 255) ** 2).sum(axis=(2, 3, 4))
    expected = np.mean(names[distance.argmin(axis=1)] == names)
    found = evaluate.pixel_baseline(*(split(list(names), "noto", image=[Image.fromarray(one) for one in side])
                                      for side in (left, right)))
    assert found["R@1"]["value"] == pytest.approx(expected) and 0 < expected < 1


def test_a_missing_split_or_checkpoint_is_named(dictionary, tmp_path):
    with pytest.raises(KeyError, match="uji"):
        evaluate.evaluate_checkpoint(colour_clip(), dictionary, splits=("uji",))
    with pytest.raises(FileNotFoundError, match="nowhere.* is not a folder"):
        evaluate.evaluate_checkpoint(tmp_path / "nowhere", dictionary)
