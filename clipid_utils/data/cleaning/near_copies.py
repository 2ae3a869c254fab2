"""Near copies: pictures that are almost the same, found among few pictures or millions.

Two pictures are near copies if their perceptual hashes differ in at most MAX_BITS of 64 bits and their 32 x 32
thumbnails by at most MAX_DIFFERENCE of 255. `NearIndex` compares all hashes (a millisecond for a million) and then the
thumbnails of the few pairs that remain.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from jaxtyping import Int, UInt8, UInt64
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from clipid_utils.files import need, usable_threads
from clipid_utils.pictures import PictureError, open_picture

MAX_BITS = 10  # of 64 bits of the perceptual hash
MAX_DIFFERENCE = 6.0  # mean absolute difference of 32 x 32 RGB pixels, of 255
THUMBNAIL = (32, 32, 3)
# What is stored of a picture, beside its thumbnail; all zeros if it cannot be read
KEYS = np.dtype([("sha256", np.uint8, 32), ("hash", np.uint64), ("mirrored", np.uint64)])
SHORT_SIDE = 128  # pixels of a large picture that are enough for its signature
CHUNK = 512  # pictures or thumbnails in memory at once


@dataclass(frozen=True)
class Signatures:
    """The hashes and thumbnails that are compared in place of pictures; row i belongs to picture i."""

    hashes: UInt64[np.ndarray, " N"]
    thumbnails: UInt8[np.ndarray, "N 32 32 3"]

    def take(self, rows) -> "Signatures":
        """The given rows, in the given order."""
        return Signatures(self.hashes[rows], self.thumbnails[rows])


def signatures(images: Sequence[Image.Image], mirrored: bool = False, desc: str | None = None) -> Signatures:
    """The perceptual hash (DCT, 64 bits) and the 32 x 32 thumbnail of each picture, or of its mirror image.

    With `desc` a progress bar of this name is shown.
    """
    hashes, thumbnails = [], []
    for image in tqdm(images, desc=desc, disable=desc is None):
        image = ImageOps.mirror(image) if mirrored else image
        hashes.append(np.packbits(imagehash.phash(image).hash.ravel()).view(np.uint64)[0])
        thumbnails.append(np.asarray(image.convert("RGB").resize(THUMBNAIL[:2], Image.Resampling.BOX)))
    return Signatures(np.array(hashes, np.uint64), np.array(thumbnails, np.uint8).reshape(-1, *THUMBNAIL))


def near_copies(left: Signatures, right: Signatures) -> Int[np.ndarray, "pairs 2"]:
    """The near copies as pairs (row of left, row of right), in order.

    By the hash alone, different simple shapes are copies (a red and a blue circle, two arrows). So each pair that it
    proposes is also compared pixel by pixel.
    """
    index = NearIndex(right.thumbnails.__getitem__)
    index.add(right.hashes)
    pairs = [np.stack([np.full_like(found, row), found], axis=1) for row, found in index.find(left)]
    return np.concatenate([np.empty((0, 2), np.int64), *pairs])


class NearIndex:
    """An index of hashes, numbered from 0, which finds near copies of pictures: 8 bytes a picture in memory.

    `thumbnails` gives the thumbnails of any numbers; they can be on the disk.
    """

    def __init__(self, thumbnails: Callable[[np.ndarray], np.ndarray]):
        self.thumbnails, self.hashes = thumbnails, need("faiss", "data").IndexBinaryFlat(64)

    def add(self, hashes: UInt64[np.ndarray, " N"]) -> None:
        """Gives the hashes the next numbers."""
        self.hashes.add(_codes(hashes))

    def find(
        self, sought: Signatures, own: Int[np.ndarray, " N"] | None = None, one_is_enough: bool = False
    ) -> Iterator[tuple[int, Int[np.ndarray, " found"]]]:
        """(row of `sought`, numbers of its near copies in order); a row without any gives none, one with many several.

        `own` are the numbers that the sought pictures have here themselves; they are left out. With `one_is_enough`
        a row may come with only some of its near copies, the lowest numbers first.
        """
        for start in range(0, len(sought.hashes), CHUNK):
            codes = _codes(sought.hashes[start : start + CHUNK])
            ends, _, numbers = self.hashes.range_search(codes, MAX_BITS + 1)
            for row, (low, high) in enumerate(itertools.pairwise(ends.tolist()), start):
                near = np.sort(numbers[low:high])
                near = near if own is None else near[near != own[row]]
                for part in (near[first : first + CHUNK] for first in range(0, len(near), CHUNK)):
                    difference = np.abs(self.thumbnails(part).astype(np.int16) - sought.thumbnails[row]).mean((1, 2, 3))
                    if (found := part[difference <= MAX_DIFFERENCE]).size:
                        yield row, found
                        if one_is_enough:
                            break


def _codes(hashes: UInt64[np.ndarray, " N"]) -> UInt8[np.ndarray, "N 8"]:
    return np.ascontiguousarray(hashes, "<u8").view(np.uint8).reshape(-1, 8)


def sign(picture: str | bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """The keys and the thumbnail of a picture's file or bytes, or None if it cannot be read."""
    content = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
    try:
        image = open_picture(content, short_side=SHORT_SIDE)
    except PictureError:
        return None
    seen, mirrored = signatures([image]), signatures([image], mirrored=True)
    digest = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
    return np.array((digest, seen.hashes[0], mirrored.hashes[0]), KEYS), seen.thumbnails[0]


def sign_all(pictures: Callable[[int], Iterable[str | bytes]], count: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys [N] and thumbnails [N, 32, 32, 3] of `count` pictures, memory-mapped from files beside `path`.

    `pictures(start)` gives the pictures from number `start`: an interrupted call continues where it stopped. The keys
    of a picture that cannot be read are zeros. The files take 3 KB a picture.
    """
    files = [path.with_name(path.name + ending) for ending in (".keys", ".thumbnails")]
    sizes = (KEYS.itemsize, int(np.prod(THUMBNAIL)))
    done = min(os.path.getsize(file) // size if file.exists() else 0 for file, size in zip(files, sizes, strict=True))
    nothing = np.zeros((), KEYS), np.zeros(THUMBNAIL, np.uint8)
    with open(files[0], "ab") as keys, open(files[1], "ab") as thumbnails, ThreadPoolExecutor(usable_threads()) as pool:
        keys.truncate(done * sizes[0])
        thumbnails.truncate(done * sizes[1])
        waiting = iter(tqdm(pictures(done), desc=f"signatures of {path.stem}", initial=done, total=count))
        while done < count and (chunk := list(itertools.islice(waiting, CHUNK))):
            signed = [found or nothing for found in pool.map(sign, chunk)]
            keys.write(np.stack([key for key, _ in signed]).tobytes())
            thumbnails.write(np.stack([thumbnail for _, thumbnail in signed]).tobytes())
            done += len(chunk)
    return np.memmap(files[0], KEYS, "r"), np.memmap(files[1], np.uint8, "r").reshape(-1, *THUMBNAIL)
