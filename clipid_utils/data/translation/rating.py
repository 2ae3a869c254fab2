"""People's ratings of translations: a sheet of random pairs to fill in, and how far the raters agree.

The scale, after clip-italian: 4 right, 3 good with a fault that a reader may mind, 2 one gets the idea, 1 the meaning
is lost.
"""

import csv
import os
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from clipid_utils.metrics import bootstrap_interval

SCALE = (1, 2, 3, 4)
COLUMNS = ("number", "english", "indonesian", "rating")


def write_sheet(
    pairs: Iterable[tuple[str, str]], path: str | os.PathLike, count: int = 100, seed: int = 0
) -> list[int]:
    """Writes a CSV of `count` pairs, (English, Indonesian), drawn evenly from a stream; returns their places in it.

    Each rater gets a copy, writes 1 to 4 into the last column, and sees no other's. The order is random too.
    """
    rng, drawn = np.random.default_rng(seed), []
    for place, pair in enumerate(pairs):  # reservoir sampling (Vitter 1985): the stream is never held whole
        if place < count:
            drawn.append((place, pair))
        elif (slot := int(rng.integers(place + 1))) < count:
            drawn[slot] = (place, pair)
    drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    with open(path, "w", encoding="utf-8-sig", newline="") as file:  # the mark lets spreadsheets read it as UTF-8
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((number, *pair, "") for number, (_, pair) in enumerate(drawn, 1))
    return [place for place, _ in drawn]


def read_sheets(paths: Sequence[str | os.PathLike]) -> Int[np.ndarray, "items raters"]:
    """The ratings in the raters' copies of one sheet; 0 where a rater gave none. Raises ValueError for other ratings
    than 1 to 4 and for sheets that do not hold the same pairs."""
    sheets = []
    for path in paths:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or not set(COLUMNS) <= set(rows[0]):
            raise ValueError(f"{path} has not the columns {', '.join(COLUMNS)}: save the sheet as CSV with commas")
        sheets.append(rows)
    ratings = np.zeros((len(sheets[0]), len(sheets)), np.int64)
    for rater, (path, rows) in enumerate(zip(paths, sheets, strict=True)):
        if [(row["english"], row["indonesian"]) for row in rows] != [
            (row["english"], row["indonesian"]) for row in sheets[0]
        ]:
            raise ValueError(f"{path} and {paths[0]} hold other pairs, or in another order: give copies of one sheet")
        for item, row in enumerate(rows):
            said = (row["rating"] or "").strip()  # a row may lack its last comma
            if said and said not in map(str, SCALE):
                raise ValueError(f"{path}:{item + 2}: the rating {said!r} is none of {SCALE}: correct it, or leave it "
                                 "empty")
            ratings[item, rater] = int(said or 0)
    return ratings


def gwet(ratings: Int[np.ndarray, "items raters"], categories: Sequence[int] = SCALE) -> float:
    """Gwet's agreement coefficient of two or more raters: AC1 (Gwet 2008), in which only what is equal agrees.

    1 is agreement on all, 0 what chance gives. Unlike kappa it stays high where raters agree and nearly all is in one
    category. An item that fewer than two rated (0 is no rating) counts only for how common the categories are. Raises
    ValueError where no item has two ratings, or one has a rating outside the categories.
    """
    if not np.isin(ratings, (0, *categories)).all():
        raise ValueError(f"ratings other than {tuple(categories)} and 0, which is none")
    counts = np.stack([(ratings == category).sum(axis=1) for category in categories], axis=1)  # [items, categories]
    counts = counts[counts.sum(axis=1) > 0]
    raters = counts.sum(axis=1)
    if not (raters > 1).any():
        raise ValueError("no item has the ratings of two raters")
    both, several = counts[raters > 1], raters[raters > 1]
    agreeing = (both * (both - 1)).sum(axis=1) / (several * (several - 1))
    common = (counts / raters[:, None]).mean(axis=0)
    chance = (common * (1 - common)).sum() / (len(categories) - 1)
    return float((agreeing.mean() - chance) / (1 - chance))


def gwet_with_interval(
    ratings: Int[np.ndarray, "items raters"], categories: Sequence[int] = SCALE, seed: int = 0
) -> dict[str, float]:
    """The coefficient with a 95% interval, items drawn anew with replacement: `{"value", "low", "high"}`."""
    low, high = bootstrap_interval(ratings, lambda drawn: gwet(drawn, categories), seed=seed)
    return {"value": gwet(ratings, categories), "low": low, "high": high}
