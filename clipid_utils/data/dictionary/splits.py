"""Splits the picture dictionary so that no picture and no near copy of it is on both sides."""

import hashlib

import numpy as np
from jaxtyping import Int

from clipid_utils.data.captions import flip_allowed
from clipid_utils.data.cleaning.near_copies import Signatures, near_copies

SPLITS = ("train", "validation", "unseen_artist", "unseen_concept", "photographs")
UNSEEN_ARTIST = "noto"
UNSEEN_CONCEPTS = 0.1  # share of the emoji concepts
VALIDATION = 0.1  # share of the training pictures


def share(text: str) -> float:
    """A number in [0, 1) that depends only on the text, evenly spread: it draws the split of a row."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def assign_splits(rows: list[dict], seen: Signatures, mirrored: Signatures) -> np.ndarray:
    """The name of the split of each row [N], "" for a row without a split.

    `seen` and `mirrored` are the signatures of the rows' pictures as they are and in the mirror.

    - unseen_concept: every drawing of a tenth of the emoji concepts, and the drawn stamps of the same name.
    - unseen_artist: UNSEEN_ARTIST's drawings of concepts that training has other drawings of.
    - photographs: the stamps that are photographs.
    - train, validation: the other rows, without near copies of pictures in the three splits above.
    """
    names = np.array([row["name_id"].lower() for row in rows])
    artists, kinds = np.array([row["artist"] for row in rows]), np.array([row["kind"] for row in rows])
    # By name: everything with the name of an unseen concept leaves training.
    unseen = [row["name_id"].lower() for row in rows
              if row["artist"] != "tuxpaint" and share(row["concept"]) < UNSEEN_CONCEPTS]
    split = np.full(len(rows), "train", dtype="<U20")
    split[artists == UNSEEN_ARTIST] = "unseen_artist"
    split[np.isin(names, unseen)] = "unseen_concept"
    split[kinds == "photograph"] = "photographs"
    train, tested = np.flatnonzero(split == "train"), np.flatnonzero(split != "train")
    split[copy_pairs(rows, seen, mirrored, train, tested)[:, 0]] = ""
    split[(split == "unseen_artist") & ~np.isin(names, names[split == "train"])] = ""
    split[choose_validation(rows, names, seen, mirrored, np.flatnonzero(split == "train"))] = "validation"
    return split


def copy_pairs(
    rows: list[dict], seen: Signatures, mirrored: Signatures, train: Int[np.ndarray, " T"],
    others: Int[np.ndarray, " O"],
) -> Int[np.ndarray, "pairs 2"]:
    """The near copies as (row of `train`, row of `others`), also in the mirror if training may flip the picture."""
    flipping = train[[may_flip(rows[i]) for i in train]] if len(train) else train
    pairs = []
    for left, left_seen in ((train, seen), (flipping, mirrored)):
        found = near_copies(left_seen.take(left), seen.take(others))
        pairs.append(np.stack([left[found[:, 0]], others[found[:, 1]]], axis=1))
    pairs = np.concatenate(pairs)
    return pairs[pairs[:, 0] != pairs[:, 1]]  # a picture is not its own copy


def may_flip(row: dict) -> bool:
    """Whether training may mirror the picture of a row."""
    return flip_allowed(row["name_id"], row["keywords_id"], row["has_text"])


def choose_validation(
    rows: list[dict], names: np.ndarray, seen: Signatures, mirrored: Signatures, train: Int[np.ndarray, " T"]
) -> Int[np.ndarray, " V"]:
    """About VALIDATION of the training rows: rows without a near copy in training, whose name training keeps."""
    drawn = [i for i in train if share(f"validation {rows[i]['artist']} {rows[i]['source']}") < VALIDATION]
    drawn = np.setdiff1d(drawn, copy_pairs(rows, seen, mirrored, train, train)).astype(np.int64)
    return drawn[np.isin(names[drawn], names[np.setdiff1d(train, drawn)])]
