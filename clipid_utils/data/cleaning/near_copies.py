"""Finds pictures that are near copies of one another: a perceptual hash proposes, a difference of pixels decides."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import imagehash
import numpy as np
from jaxtyping import Int, UInt8, UInt64
from PIL import Image, ImageOps

MAX_BITS = 10  # of 64 bits of the perceptual hash that may differ
MAX_DIFFERENCE = 6.0  # mean absolute difference of 32x32 RGB pixels, of 255


@dataclass(frozen=True)
class Signatures:
    """What two pictures are compared by; row i belongs to picture i."""

    hashes: UInt64[np.ndarray, " N"]
    thumbnails: UInt8[np.ndarray, "N 32 32 3"]

    def take(self, rows) -> "Signatures":
        """The given rows, in the given order."""
        return Signatures(self.hashes[rows], self.thumbnails[rows])


def signatures(
    images: Sequence[Image.Image], mirrored: bool = False, progress: Callable[[Iterable], Iterable] = iter
) -> Signatures:
    """The perceptual hash (DCT, 64 bits) and the 32x32 thumbnail of each picture, or of its mirror image."""
    hashes, thumbnails = [], []
    for image in progress(images):
        image = ImageOps.mirror(image) if mirrored else image
        hashes.append(np.packbits(imagehash.phash(image).hash.ravel()).view(np.uint64)[0])
        thumbnails.append(np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BOX)))
    return Signatures(np.array(hashes, np.uint64), np.array(thumbnails, np.uint8).reshape(-1, 32, 32, 3))


def near_copies(
    left: Signatures, right: Signatures, max_bits: int = MAX_BITS, max_difference: float = MAX_DIFFERENCE
) -> Int[np.ndarray, "pairs 2"]:
    """The pairs (row of left, row of right) whose hashes differ in `max_bits` at most, and thumbnails little.

    The hash alone takes simple shapes for one another (a red and a blue circle, two arrows), so that each pair it
    proposes is also compared pixel by pixel at 32x32: mean absolute difference at most `max_difference` of 255.
    """
    pairs = []
    for row, value in enumerate(left.hashes):
        close = np.flatnonzero(count_bits(right.hashes ^ value) <= max_bits)
        difference = np.abs(right.thumbnails[close].astype(np.int16) - left.thumbnails[row]).mean((1, 2, 3))
        pairs += [(row, other) for other in close[difference <= max_difference]]
    return np.array(pairs, np.int64).reshape(-1, 2)


def count_bits(numbers: UInt64[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
    """The number of ones in the binary form of each number."""
    return np.unpackbits(numbers[:, None].view(np.uint8), axis=1).sum(1, dtype=np.int64)
