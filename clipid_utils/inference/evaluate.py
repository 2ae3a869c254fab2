"""The whole evaluation of a checkpoint on the picture dictionary; the same input gives the same figures.

    evaluate_checkpoint("mini", load_picture_dictionary())
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from jaxtyping import Float
from PIL import Image

import clipid_utils
from clipid_utils.inference.zeroshot import classifier_weights, zero_shot_accuracy
from clipid_utils.metrics import retrieval_summary, same_key
from clipid_utils.model.embed import embed_images, embed_texts, fingerprint
from clipid_utils.pictures import to_rgb
from clipid_utils.versions import versions
from clipid_utils.wording import group_phrase, load_wording

SPLITS = ("validation", "unseen_artist", "unseen_concept", "photographs")
PACKAGES = ("clip-indonesian", "jax", "jaxlib", "flax", "numpy", "pillow", "datasets", "tokenizers")
PIXEL_SIDE = 32  # pictures are compared pixel by pixel at this size; at a finer one their edges never coincide


def evaluate_checkpoint(
    checkpoint: str | Path | tuple[nnx.Module, object], dictionary, *, splits: Sequence[str] = SPLITS,
    batch_size: int = 64, seed: int = 0, progress: bool = True,
) -> dict:
    """Retrieval both ways, zero-shot accuracy and the pixel baseline, with 95% bootstrap intervals, as one dict.

    `checkpoint` is a folder for `load_clip`, or (model, processor); `dictionary` is the DatasetDict of
    `load_picture_dictionary`. Only the bootstrap draws at random, from `seed`; it draws whole concepts, because
    pictures of one concept are not independent. An empty split is recorded as 0 pictures. Raises KeyError for a split
    that the dictionary lacks, FileNotFoundError if there is no such checkpoint.

    Retrieval: the queries are the distinct (concept, Indonesian name) pairs of a split and the candidates all of its
    pictures, or the reverse; a picture of the same concept or of the same name (in any case) is right.
    """
    given = isinstance(checkpoint, tuple)
    model, processor = checkpoint if given else clipid_utils.load_clip(checkpoint)
    report: dict = {
        "checkpoint": {"name": None if given else Path(checkpoint).name, "fingerprint": fingerprint(model, processor)},
        "seed": seed, "versions": versions(PACKAGES), "data": {}, "retrieval": {}, "zero_shot": {},
    }
    for split in splits:
        rows, checksum = dictionary[split], hashlib.sha256()
        report["data"][split] = {"pictures": len(rows)}
        if not len(rows):  # `photographs`, without Debian's packages
            continue
        images = _opened(rows, checksum)  # one batch at a time
        image_embeds = embed_images(model, processor, images, batch_size=batch_size, progress=progress)
        report["data"][split]["sha256"] = checksum.hexdigest()
        report["retrieval"][split] = retrieval_both_ways(model, processor, rows, image_embeds, seed)
        report["zero_shot"][split] = zero_shot_both(model, processor, rows, image_embeds, seed)
    if "train" in dictionary and "unseen_artist" in splits:
        report["pixel_nearest_neighbour"] = pixel_baseline(dictionary["unseen_artist"], dictionary["train"], seed)
    return rounded(report)


def _opened(rows, checksum) -> Iterator[Image.Image]:
    """The rows' pictures, RGB; `checksum` gets the concept, artist, size and pixels of each, in their order."""
    for row in rows:
        image = to_rgb(row["image"])
        checksum.update(f"{row['concept']}\0{row['artist']}\0{image.size}\0".encode() + image.tobytes())
        yield image


def retrieval_both_ways(model, processor, rows, image_embeds: Float[np.ndarray, "N E"], seed: int = 0) -> dict:
    """`{"text_to_image": …, "image_to_text": …}`, each a `metrics.retrieval_summary`, for one split's rows."""
    concepts, names = list(rows["concept"]), [name.casefold() for name in rows["name_id"]]
    text_concepts, text_names = zip(*dict.fromkeys(zip(concepts, names, strict=True)), strict=True)  # in their order
    similarity = embed_texts(model, processor, text_names) @ image_embeds.T  # [Q, N]
    positives = same_key(text_concepts, concepts, (text_names, names))
    return {"text_to_image": retrieval_summary(similarity, positives, seed=seed, clusters=text_concepts),
            "image_to_text": retrieval_summary(similarity.T, positives.T, seed=seed, clusters=concepts)}


def zero_shot_both(model, processor, rows, image_embeds: Float[np.ndarray, "N E"], seed: int = 0) -> dict:
    """Zero-shot accuracy of one split, class = group and class = concept within its group, naive and with templates."""
    wording = load_wording()
    group_names = {group: group_phrase(name) for group, name in zip(rows["group"], rows["group_id"], strict=True)}
    groups, group_labels = np.unique(list(rows["group"]), return_inverse=True)
    named = [(name.casefold(), group) for name, group in zip(rows["name_id"], rows["group"], strict=True)]
    # Two concepts of one name and group are one class: they cannot be told apart by their name
    classes, labels = np.unique(named, axis=0, return_inverse=True)
    names, concept_groups = classes.T.tolist()
    report: dict = {"group": {}, "concept_within_group": {}}
    drawn = {"seed": seed, "clusters": list(rows["concept"])}
    for key in ("naive", "templates"):
        weights = classifier_weights(model, processor, [group_names[group] for group in groups], wording[key],
                                     groups.tolist())
        report["group"][key] = zero_shot_accuracy(image_embeds, weights, group_labels, **drawn)
        weights = classifier_weights(model, processor, names, wording[key], concept_groups)
        report["concept_within_group"][key] = zero_shot_accuracy(image_embeds, weights, labels, concept_groups, **drawn)
    return report


def pixel_baseline(queries, candidates, seed: int = 0) -> dict:
    """Picture to picture by nearest neighbour in pixels: a search for look-alikes without a model.

    Both sides are 32 x 32 RGB, and the distance is Euclidean; a picture of the same concept or name is right. Queries
    without a right candidate are left out and counted in `without_candidate`.
    """
    names = [[name.casefold() for name in rows["name_id"]] for rows in (queries, candidates)]
    concepts = list(queries["concept"])
    positives = same_key(concepts, list(candidates["concept"]), tuple(names))
    answerable = positives.any(axis=1)
    if not answerable.any():
        raise ValueError("no query picture shares its concept or name with a candidate")
    left, right = _pixels(queries["image"])[answerable], _pixels(candidates["image"])
    nearness = 2 * left @ right.T - (right**2).sum(axis=1)  # minus the squared distance, up to the query's own norm
    clusters = [concept for concept, kept in zip(concepts, answerable, strict=True) if kept]
    summary = retrieval_summary(nearness, positives[answerable], seed=seed, clusters=clusters)
    return summary | {"without_candidate": int((~answerable).sum()), "side": PIXEL_SIDE}


def _pixels(images) -> Float[np.ndarray, "N pixels"]:
    size = (PIXEL_SIDE, PIXEL_SIDE)
    small = [np.asarray(to_rgb(image).resize(size, Image.Resampling.BOX), np.float32) for image in images]
    return np.stack(small).reshape(len(small), -1) / 255


def rounded(value, digits: int = 6):
    """A report with every float in it rounded, for readers of the file."""
    return json.loads(json.dumps(value), parse_float=lambda number: round(float(number), digits))
