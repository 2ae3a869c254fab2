"""Retrieval among any number of pictures and texts: both directions from one pass over their similarities.

The matrix of similarities of 25,000 pictures and 125,000 captions has 12 GB. Here only a block of it is in memory.

Letters in shapes: T texts, N pictures, E embedding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.sparse import csr_array

ROWS, COLUMNS = 1024, 2048  # of a block of similarities: 8 MB; larger ones take half as long again
TIE = 1e-6  # similarities that are nearer than this are a tie: equal vectors can differ by rounding


def ranks_both_ways(
    texts: Float[np.ndarray, "T E"], pictures: Float[np.ndarray, "N E"], positives: csr_array
) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " N"]]:
    """The rank (0 = first) of the best right picture of each text, and of the best right text of each picture.

    `positives` [T, N] is True where a text and a picture belong together. A wrong candidate counts as before the best
    right one if its similarity is the same or higher, as in `metrics.ranks`. Raises ValueError for shapes that differ,
    a NaN, and a text or picture without a positive.
    """
    if positives.shape != (len(texts), len(pictures)) or 0 in positives.shape:
        raise ValueError(f"positives have shape {positives.shape}, and there are {len(texts)} texts and "
                         f"{len(pictures)} pictures: expected one row for each text and one column for each picture")
    for name, vectors in (("text", texts), ("picture", pictures)):
        if not np.isfinite(vectors).all():
            raise ValueError(f"the vector of {name} {int(np.argmin(np.isfinite(vectors).all(axis=1)))} has a NaN or an "
                             "infinity: look for it in the model's weights")
    best_picture, best_text = _best(texts, pictures, positives)
    text_ranks, picture_ranks = np.zeros(len(texts), np.int64), np.zeros(len(pictures), np.int64)
    columns = [_padded(pictures, start, COLUMNS) for start in range(0, len(pictures), COLUMNS)]
    for top in range(0, len(texts), ROWS):
        rows, right = _padded(texts, top, ROWS), positives[top : top + ROWS]
        limits = jnp.asarray(_padded(best_picture, top, ROWS))
        for number, part in enumerate(columns):
            left = number * COLUMNS
            block = np.ones((len(rows), len(part)), np.bool_)  # padding counts as right, so it is never before
            inside = right[:, left : left + COLUMNS].toarray()
            block[: inside.shape[0], : inside.shape[1]] = inside
            before = _count(rows, part, block, limits, jnp.asarray(_padded(best_text, left, COLUMNS)))
            for ranks, start, counts in ((text_ranks, top, before[0]), (picture_ranks, left, before[1])):
                ranks[start : start + len(counts)] += np.asarray(counts)[: len(ranks) - start]
    return text_ranks, picture_ranks


@jax.jit
def _count(
    texts: Float[Array, "t E"], pictures: Float[Array, "n E"], right: Bool[Array, "t n"],
    best_picture: Float[Array, " t"], best_text: Float[Array, " n"],
) -> tuple[Int[Array, " t"], Int[Array, " n"]]:
    """How many wrong candidates of each text, and of each picture, are before its best right one."""
    scores = jnp.where(right, -jnp.inf, jnp.matmul(texts, pictures.T, precision="highest"))
    return (scores >= best_picture[:, None] - TIE).sum(axis=1), (scores >= best_text - TIE).sum(axis=0)


def _best(
    texts: np.ndarray, pictures: np.ndarray, positives: csr_array
) -> tuple[Float[np.ndarray, " T"], Float[np.ndarray, " N"]]:
    """The highest similarity of a positive, of each text and of each picture."""
    best_picture, best_text = np.full(len(texts), -np.inf, np.float32), np.full(len(pictures), -np.inf, np.float32)
    rows, columns = positives.nonzero()
    for start in range(0, len(rows), 2**16):
        left, right = rows[start : start + 2**16], columns[start : start + 2**16]
        scores = np.einsum("ij,ij->i", texts[left], pictures[right])
        np.maximum.at(best_picture, left, scores)
        np.maximum.at(best_text, right, scores)
    for name, best in (("text", best_picture), ("picture", best_text)):
        if np.isneginf(best).any():
            raise ValueError(f"{name} {int(np.argmin(best))} has no positive: leave it out, or add one")
    return best_picture, best_text


def _padded(array: np.ndarray, start: int, size: int) -> np.ndarray:
    """A block of rows. The last one is filled with zeros up to a power of two, so that few shapes are compiled."""
    block = array[start : start + size]
    rows = min(size, 1 << (len(block) - 1).bit_length())
    return np.concatenate([block, np.zeros((rows - len(block), *block.shape[1:]), block.dtype)])
