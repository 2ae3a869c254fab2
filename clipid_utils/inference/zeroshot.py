"""Zero-shot classification in Indonesian: class names become sentences, sentences become the classifier's weights.

People who describe a picture write seekor kucing and sebuah mobil, so templates with the classifier
(`clipid_utils.wording`) are closer to real captions than "foto {name}".
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int
from PIL import Image

from clipid_utils.files import json_lines
from clipid_utils.metrics import hits_at_k, label_ranks, with_interval
from clipid_utils.model.embed import embed_images, embed_texts
from clipid_utils.paths import DATA
from clipid_utils.wording import fill, load_wording


def classifier_weights(
    model: nnx.Module, processor: object, names: Sequence[str], templates: Sequence[str] | None = None,
    groups: Sequence[str | None] | None = None, embed: Callable[[list[str]], np.ndarray] | None = None,
) -> Float[np.ndarray, "C E"]:
    """A unit vector for each class: the mean of its sentences' unit vectors, renormalised (Radford et al. 2021, 3.1.4).

    `templates` are by default those of `data/templates.json` (`load_wording()["naive"]` is the plain "foto {name}").
    `groups`, one for each name, help to choose classifiers. `embed` replaces `embed_texts`, for example by a function
    with a cache. Raises ValueError if there are no names or no templates, and for an empty name.
    """
    templates = load_wording()["templates"] if templates is None else list(templates)
    groups = [None] * len(names) if groups is None else groups
    if not len(names) or not templates or any(not name.strip() for name in names):
        raise ValueError("classifier_weights needs names, none of them empty, and at least one template")
    sentences = [fill(template, name, group) for name, group in zip(names, groups, strict=True)
                 for template in templates]
    vectors = embed_texts(model, processor, sentences) if embed is None else embed(sentences)
    embeds = vectors.reshape(len(names), len(templates), -1)  # [C, templates, E]
    means = embeds.mean(axis=1)
    return (means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def class_names() -> list[str]:
    """The usual Indonesian name of each of ImageNet's 1,000 classes."""
    return [record["indonesian"][0] for _, record, _ in json_lines(DATA / "class_names.jsonl")]


def classify(
    model: nnx.Module, processor: object, images: Sequence[Image.Image], weights: Float[np.ndarray, "C E"]
) -> Float[np.ndarray, "N C"]:
    """Probabilities of the classes for each picture: softmax(exp(logit_scale) * image_embeds @ weights.T)."""
    logits = float(model.scale()) * embed_images(model, processor, images, progress=False) @ weights.T
    return np.asarray(jax.nn.softmax(logits, axis=-1))


def zero_shot_accuracy(
    image_embeds: Float[np.ndarray, "N E"], weights: Float[np.ndarray, "C E"], labels: Int[np.ndarray, " N"],
    class_groups: Sequence[object] | None = None, seed: int = 0, clusters: Sequence[object] | None = None,
) -> dict:
    """Top-k accuracy with 95% bootstrap intervals: `{"top1": {"value", "low", "high"}, "top5": …, "items", "classes"}`.

    A class is a row of `weights`, for example a group of the dictionary or a concept. With `class_groups`, the group of
    each class, a picture chooses among the classes of its own class' group only: the question is, for example, which
    animal it is if it is known to be an animal. `classes` in the answer is the mean number of classes from which a
    picture chooses. `clusters`, one for each picture, are those of `metrics.bootstrap_interval`.
    """
    scores, classes = image_embeds @ weights.T, len(weights)
    if class_groups is not None:
        _, numbers = np.unique(np.asarray([str(group) for group in class_groups]), return_inverse=True)  # [C]
        allowed = numbers[np.asarray(labels)][:, None] == numbers  # [N, C]
        scores, classes = np.where(allowed, scores, -np.inf), float(allowed.sum(axis=1).mean())
    rank = label_ranks(scores, labels)
    summary: dict = {f"top{k}": with_interval(hits_at_k(rank, k), seed, clusters) for k in (1, 5)}
    return summary | {"items": len(rank), "classes": classes}
