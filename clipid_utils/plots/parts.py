"""Parts that several figures share."""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure


def cut(text: object, width: int, lines: int = 2) -> str:
    """Text broken at spaces into at most `lines` lines of about `width` letters, with … if some is left out."""
    rows: list[str] = [""]
    for word in str(text).split():
        if rows[-1] and len(rows[-1]) + 1 + len(word) > width:
            if len(rows) == lines:
                rows[-1] += " …"
                break
            rows.append("")
        rows[-1] = f"{rows[-1]} {word}".strip()
    return "\n".join(row if len(row) <= width + 2 else row[: width - 1] + "…" for row in rows)


def titled(figure: Figure, title: str, **options) -> Figure:
    if title:
        figure.suptitle(title, x=0.01, ha="left", **options)
    return figure


def legend_beside(axis, size: int = 9) -> None:
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=size)


def written_matrix(axis, values: np.ndarray, dark_below: float | int, text: str, least: float = -math.inf) -> None:
    """Writes each value of at least `least` into its cell, white on the dark cells."""
    for (y, x), value in np.ndenumerate(values):
        if value >= least:
            colour = "white" if value < dark_below else "black"
            axis.text(x, y, text.format(value), ha="center", va="center", fontsize=8, color=colour)
    axis.grid(False)


def named_cells(axis, rows: list[str], columns: list[str]) -> None:
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")


def picture_grid(count: int, columns: int, size: float, extra: float) -> tuple[Figure, list]:
    columns = max(1, min(columns, count))
    rows = max(1, math.ceil(count / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(columns * size, rows * (size + extra)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, list(axes.flat)


def show(axis, image, caption: str = "", frame: str = "#DDDDDD", width: float = 0.6) -> None:
    axis.imshow(np.asarray(image), interpolation="antialiased")
    axis.set_title(caption, fontsize=8, loc="center", pad=3)
    axis.axis("on")
    axis.grid(False)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color=frame, linewidth=width)
