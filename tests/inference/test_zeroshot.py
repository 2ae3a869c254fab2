import numpy as np
import pytest
from colour_model import WORDS, colour_clip, spot

from clipid_utils.inference import zeroshot
from clipid_utils.wording import load_wording


def test_classifier_weights_are_renormalised_means():
    model, processor = colour_clip()
    weights = zeroshot.classifier_weights(model, processor, list(WORDS))
    assert weights.shape == (3, 4)
    np.testing.assert_allclose(np.linalg.norm(weights, axis=1), 1, atol=1e-6)
    one = zeroshot.classifier_weights(model, processor, ["merah"], ["gambar {name}"])
    two = zeroshot.classifier_weights(model, processor, ["merah"], ["gambar {name}", "gambar {name}"])
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_classify_gives_probabilities_and_the_right_colour():
    model, processor = colour_clip()
    weights = zeroshot.classifier_weights(model, processor, list(WORDS), load_wording()["naive"])
    probabilities = zeroshot.classify(model, processor, [spot("biru"), spot("merah")], weights)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), [2, 0])


@pytest.mark.parametrize(("names", "templates"), [([], None), (["merah", " "], None), (["merah"], [])])
def test_weights_need_names_and_templates(names, templates):
    model, processor = colour_clip()
    with pytest.raises(ValueError, match="needs names"):
        zeroshot.classifier_weights(model, processor, names, templates)


def test_accuracy_over_all_classes_and_within_groups():
    weights = np.eye(4, dtype=np.float32)
    images = np.array([[0.9, 0.1, 0.0, 0.0], [0.0, 0.5, 0.9, 0.0], [0.1, 0.0, 0.0, 0.9]], np.float32)
    labels = np.array([0, 1, 3])
    whole = zeroshot.zero_shot_accuracy(images, weights, labels, ks=(1, 2))
    assert whole["top1"]["value"] == pytest.approx(2 / 3) and whole["top2"]["value"] == 1.0
    assert (whole["items"], whole["classes"]) == (3, 4)
    within = zeroshot.accuracy_within(images, weights, labels, ["hewan", "hewan", "buah", "buah"], ks=(1,))
    assert within["top1"]["value"] == 1.0 and within["classes"] == 2.0
    with pytest.raises(ValueError, match="class_groups"):
        zeroshot.accuracy_within(images, weights, labels, ["hewan"])
