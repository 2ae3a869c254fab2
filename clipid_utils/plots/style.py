"""The style of the course's figures, and what several of them are drawn with."""

import functools
import math
from collections.abc import Callable

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW, GREY = COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F",
)  # fmt: skip
DIVERGING = LinearSegmentedColormap.from_list("blue_orange", [BLUE, "#FFFFFF", RED])
STYLE = {
    "figure.dpi": 100, "savefig.dpi": 100, "figure.facecolor": "white", "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#E5E5E5", "legend.frameon": False, "lines.linewidth": 1.8, "image.cmap": "cividis",
    "axes.prop_cycle": plt.cycler(color=COLOURS),
}  # fmt: skip


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the course's style and take the figure off pyplot's list, or a notebook would show it twice."""

    @functools.wraps(draw)
    def function(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            plt.close(figure)
        return figure

    return function


def cut(text: object, width: int, lines: int = 2) -> str:
    """Text broken at spaces into at most `lines` lines of about `width` letters, with … where some is left out."""
    rows: list[str] = [""]
    for word in str(text).split():
        if rows[-1] and len(rows[-1]) + 1 + len(word) > width:
            if len(rows) == lines:
                rows[-1] += " …"
                break
            rows.append("")
        rows[-1] = f"{rows[-1]} {word}".strip()
    return "\n".join(row if len(row) <= width + 2 else row[: width - 1] + "…" for row in rows)


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
