"""Near copies among millions of pictures, by the law of near_copies.py: signatures on disk, and a search in cells.

Two thumbnails whose mean difference is at most MAX_DIFFERENCE differ by no more than that in any weighted mean with
weights between -1 and 1. So pictures are put into cells of that width along five such means (WEIGHTS); the near copies
of a picture lie in its cell or beside it, in a few thousandths of all, where their hashes and then their thumbnails are
compared. None is missed.
"""

import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from clipid_utils.data.cleaning.near_copies import MAX_BITS, MAX_DIFFERENCE, signatures
from clipid_utils.files import to_rgb, usable_threads

# What a picture is known by; its thumbnail, 32 x 32 RGB, stands in a file of its own
KEYS = np.dtype([("sha256", np.uint8, 32), ("hash", np.uint64), ("mirrored", np.uint64), ("cell", np.int64)])
THUMBNAIL = (32, 32, 3)
DECODED = 128  # pixels of the short side at least: a JPEG that is larger is decoded at 1/2, 1/4 or 1/8
CHUNK = 512


def _weights() -> Int[np.ndarray, "5 pixels"]:
    ones = np.ones(THUMBNAIL, np.int64)
    across = np.where(np.arange(32) < 16, 1, -1)[:, None]
    middle = -ones
    middle[5:27, 5:27] = 1
    brightness, side, height, warmth = ones, ones * across, ones * across[:, None], ones * np.array([1, 0, -1])
    return np.stack([brightness, side, height, middle, warmth]).reshape(5, -1)


WEIGHTS = _weights()
WIDTH = int(MAX_DIFFERENCE * np.prod(THUMBNAIL))  # of a cell, in sums of 3,072 values
STEPS = 64 ** np.arange(5)[::-1]  # six bits each; no cell lies more than 43 from 0
AROUND = np.array(list(itertools.product((-1, 0, 1), repeat=4))) @ STEPS[:4]  # the last mean's neighbours adjoin


def cells(thumbnails: UInt8[np.ndarray, "N 32 32 3"]) -> Int[np.ndarray, " N"]:
    """The number of the cell of each picture."""
    means = thumbnails.reshape(len(thumbnails), -1).astype(np.float64) @ WEIGHTS.T  # exact: whole numbers below 2**53
    return (means // WIDTH).astype(np.int64) @ STEPS


def sign(picture: str | bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys and thumbnail of a picture's file, or of its bytes; None where it cannot be decoded."""
    content = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft(None, (DECODED, DECODED))
            image = to_rgb(image)
        seen, mirrored = signatures([image]), signatures([image], mirrored=True)
    except Exception:  # a broken file can raise anything
        return None
    keys = np.zeros((), KEYS)
    keys["sha256"] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
    keys["hash"], keys["mirrored"], keys["cell"] = seen.hashes[0], mirrored.hashes[0], cells(seen.thumbnails)[0]
    return keys, seen.thumbnails[0]


def sign_all(
    pictures: Callable[[int], Iterable[str | bytes]], count: int, path: Path,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys [N] and thumbnails [N, 32, 32, 3] of `count` pictures, in files beside `path`, mapped, not read.

    `pictures(start)` gives those from `start` on: an interrupted call goes on where it stopped. A picture that cannot
    be decoded has keys of zeros. 3 KB a picture.
    """
    files = [path.with_name(path.name + ending) for ending in (".keys", ".thumbnails")]
    sizes = (KEYS.itemsize, int(np.prod(THUMBNAIL)))
    done = min(os.path.getsize(file) // size if file.exists() else 0 for file, size in zip(files, sizes, strict=True))
    nothing = np.zeros((), KEYS), np.zeros(THUMBNAIL, np.uint8)
    with open(files[0], "ab") as keys, open(files[1], "ab") as thumbnails, ThreadPoolExecutor(usable_threads()) as pool:
        keys.truncate(done * sizes[0])
        thumbnails.truncate(done * sizes[1])
        waiting = iter(progress(pictures(done)))
        while done < count and (chunk := list(itertools.islice(waiting, CHUNK))):
            signed = [found or nothing for found in pool.map(sign, chunk)]
            keys.write(np.stack([key for key, _ in signed]).tobytes())
            thumbnails.write(np.stack([thumbnail for _, thumbnail in signed]).tobytes())
            done += len(chunk)
    return np.memmap(files[0], KEYS, "r"), np.memmap(files[1], np.uint8, "r").reshape(-1, *THUMBNAIL)


class CopySearch:
    """The near copies that pictures have among some of them; `keys` [N], `thumbnails` gives those of any rows."""

    def __init__(self, keys: np.ndarray, thumbnails: Callable[[np.ndarray], np.ndarray], among: Int[np.ndarray, " M"]):
        order = np.argsort(keys["cell"][among], kind="stable")
        self.keys, self.thumbnails, self.rows = keys, thumbnails, among[order]
        self.cells, self.hashes = keys["cell"][self.rows], keys["hash"][self.rows]

    def copies(
        self, rows: Int[np.ndarray, " Q"], mirrored: bool = False, one_is_enough: bool = False
    ) -> Iterator[tuple[int, Int[np.ndarray, " found"]]]:
        """(row, rows that are near copies of it, itself left out); none for a row without, some more than once.

        With `mirrored`, near copies of the picture in the mirror. With `one_is_enough`, not all of them.
        """
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            thumbnails = self.thumbnails(chunk)[:, :, ::-1] if mirrored else self.thumbnails(chunk)
            around = cells(thumbnails)[:, None] + AROUND  # [Q, 81]
            lows, highs = np.searchsorted(self.cells, around - 1), np.searchsorted(self.cells, around + 1, "right")
            hashes = self.keys["mirrored" if mirrored else "hash"][chunk]
            for row, thumbnail, value, low, high in zip(chunk, thumbnails, hashes, lows, highs, strict=True):
                near = _ranges(low, high)
                near = self.rows[near[np.bitwise_count(self.hashes[near] ^ value) <= MAX_BITS]]
                near = near[near != row]
                for part in (near[first : first + CHUNK] for first in range(0, len(near), CHUNK)):
                    difference = np.abs(self.thumbnails(part).astype(np.int16) - thumbnail).mean((1, 2, 3))
                    if (found := part[difference <= MAX_DIFFERENCE]).size:
                        yield int(row), found
                        if one_is_enough:
                            break


def _ranges(lows: np.ndarray, highs: np.ndarray) -> np.ndarray:
    """The numbers from each low up to its high."""
    counts = highs - lows
    return np.arange(counts.sum()) + np.repeat(lows - np.cumsum(counts) + counts, counts)
