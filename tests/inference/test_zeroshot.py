"""Zero-shot classification: weights from sentences, probabilities, and accuracy."""

import jax
import numpy as np
import pytest
from colour_model import WORDS, colour_clip, spot

from clipid_utils.inference import zeroshot
from clipid_utils.metrics import hits_at_k, label_ranks, with_interval
from clipid_utils.model.embed import embed_images, embed_texts
from clipid_utils.wording import fill, load_wording


@pytest.fixture(scope="module")
def clip():
    """A colour model that reads "ikan" as red with blue, so that templates have directions of their own."""
    model, processor = colour_clip()
    table = np.array(model.table[...])
    table[processor.tokenizer.token_to_id("ikan")] = [0.2, 0, 0.9, 0]
    model.table[...] = jax.numpy.asarray(table)
    return model, processor


def test_classifier_weights_are_renormalised_means(clip):
    templates = ["gambar {name}", "{name} di atas ikan", "ikan ikan {name}"]
    weights = zeroshot.classifier_weights(*clip, list(WORDS), templates)
    assert weights.shape == (3, 4) and weights.dtype == np.float32
    for word, weight in zip(WORDS, weights, strict=True):
        sentences = embed_texts(*clip, [template.format(name=word) for template in templates])
        mean = sentences.mean(axis=0)
        assert np.linalg.norm(mean) < 0.97 or word == "biru"  # not yet of unit length
        np.testing.assert_allclose(weight, mean / np.linalg.norm(mean), atol=1e-6)


def test_groups_choose_the_classifier_and_templates_have_a_default(clip, monkeypatch):
    asked = []
    monkeypatch.setattr(zeroshot, "embed_texts", lambda *args: asked.extend(args[2]) or embed_texts(*args))
    zeroshot.classifier_weights(*clip, ["biru", "merah"], ["foto {counted}"], ["animals", None])
    assert asked == [fill("foto {counted}", "biru", "animals"), fill("foto {counted}", "merah", None)]
    assert "seekor" in asked[0] and "seekor" not in asked[1]
    asked.clear()
    zeroshot.classifier_weights(*clip, ["merah"])
    assert asked == [fill(template, "merah", None) for template in load_wording()["templates"]]


def test_classify_gives_probabilities_and_the_right_colour(clip):
    weights, pictures = zeroshot.classifier_weights(*clip, list(WORDS), ["foto {name}"]), [spot("biru"), spot("merah")]
    probabilities = zeroshot.classify(*clip, pictures, weights)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), [2, 0])
    logits = np.exp(20.0 * embed_images(*clip, pictures, progress=False) @ weights.T)  # the scale is 20
    np.testing.assert_allclose(probabilities, logits / logits.sum(axis=1, keepdims=True), rtol=1e-4)


@pytest.mark.parametrize(("names", "templates"), [([], None), (["merah", " "], None), (["merah"], [])])
def test_weights_need_names_and_templates(clip, names, templates):
    with pytest.raises(ValueError, match="needs names"):
        zeroshot.classifier_weights(*clip, names, templates)


def test_accuracy_over_all_classes_and_within_groups():
    weights = np.eye(4, dtype=np.float32)
    images = np.array([[0.9, 0.1, 0.0, 0.0], [0.0, 0.5, 0.9, 0.0], [0.1, 0.0, 0.0, 0.9]], np.float32)
    labels = np.array([0, 1, 3])
    whole = zeroshot.zero_shot_accuracy(images, weights, labels)
    assert whole["top1"]["value"] == pytest.approx(2 / 3) and whole["top5"]["value"] == 1.0
    assert (whole["items"], whole["classes"]) == (3, 4)
    within = zeroshot.zero_shot_accuracy(images, weights, labels, ["hewan", "hewan", "buah", "buah"])
    assert within["top1"]["value"] == 1.0 and within["classes"] == 2.0 and within["items"] == 3
    for groups in (None, [1, 1, 1, 2]):
        found = zeroshot.zero_shot_accuracy(images, weights, labels, groups, clusters=["a", "a", "a"])
        assert list(found) == ["top1", "top5", "items", "classes"]
        assert found["top1"]["low"] == found["top1"]["high"] == found["top1"]["value"]


def test_intervals_of_accuracy_depend_on_the_seed():
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(80, 4)).astype(np.float32), rng.integers(0, 4, 80)
    weights = np.eye(4, dtype=np.float32)
    hits = hits_at_k(label_ranks(images, labels), 1)
    for groups in (None, ["a"] * 4):
        found = zeroshot.zero_shot_accuracy(images, weights, labels, groups, seed=1)
        assert found["top1"] == with_interval(hits, 1) != with_interval(hits, 0)
