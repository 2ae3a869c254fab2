"""Batches for training from pictures that fit in memory, shuffled by seed and epoch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from clipid_utils.data.captions import flip_allowed, sample_caption
from clipid_utils.wording import group_phrase


@dataclass(frozen=True)
class PicturePairs:
    """Pictures of one size with what their captions are drawn from; row i of each field is picture i."""

    images: UInt8[np.ndarray, "N H W 3"]
    concepts: Int[np.ndarray, " N"]  # equal numbers: one concept, or two of the same name
    names: list[str]
    keywords: list[list[str]]
    groups: list[str]
    may_flip: Bool[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows) -> "PicturePairs":
        """The given rows, in the given order."""
        rows = np.arange(len(self))[rows]
        return PicturePairs(self.images[rows], self.concepts[rows], [self.names[i] for i in rows],
                            [self.keywords[i] for i in rows], [self.groups[i] for i in rows], self.may_flip[rows])


def load_pairs(dataset: Dataset, size: int) -> PicturePairs:
    """The rows of a picture dictionary split as arrays, pictures at `size` pixels, resized as the processor does it.

    The Indonesian name of a picture's group is one of its keywords: people search for "hewan" too.
    """
    names = dataset["name_id"][:]
    number = {name: i for i, name in enumerate(sorted({name.lower() for name in names}))}
    images = np.empty((len(names), size, size, 3), np.uint8)
    for row, image in enumerate(dataset["image"]):
        images[row] = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    keywords = [list(dict.fromkeys([*words, group_phrase(group)]))
                for words, group in zip(dataset["keywords_id"], dataset["group_id"], strict=True)]
    letters = dataset["has_text"][:]
    may_flip = [flip_allowed(*row) for row in zip(names, keywords, letters, strict=True)]
    concepts = np.array([number[name.lower()] for name in names], np.int32)
    return PicturePairs(images, concepts, list(names), keywords, list(dataset["group"]), np.array(may_flip))


def batches(
    pairs: PicturePairs, tokenize, batch_size: int, *, seed: int, epoch: int, length: int,
    group_concepts: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
    """One epoch in an order that depends on seed and epoch alone; a caption is drawn anew for each picture.

    Yields `images` uint8 [B, H, W, 3], `input_ids` and `attention_mask` [B, length], `concepts` [B] and `may_flip` [B];
    the rest that fills no batch is left out. `tokenize(texts, length)` is the processor's. With `group_concepts` it is
    the concepts that are shuffled, and the pictures of each stand next to each other.
    """
    if batch_size > len(pairs):
        raise ValueError(f"batch_size {batch_size} is more than the {len(pairs)} pictures: choose a smaller one")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(pairs))
    if group_concepts:
        place = rng.permutation(pairs.concepts.max() + 1)
        order = order[np.argsort(place[pairs.concepts[order]], kind="stable")]
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        captions = [sample_caption(pairs.names[i], pairs.keywords[i], rng, pairs.groups[i]) for i in rows]
        yield {"images": pairs.images[rows], "concepts": pairs.concepts[rows], "may_flip": pairs.may_flip[rows],
               **tokenize(captions, length)}
