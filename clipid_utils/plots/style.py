"""The style of the course's figures."""

import functools
from collections.abc import Callable

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW, GREY = COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#7F7F7F",
)
DIVERGING = LinearSegmentedColormap.from_list("blue_orange", [BLUE, "#FFFFFF", RED])
STYLE = {
    "figure.dpi": 100, "savefig.dpi": 100, "figure.facecolor": "white", "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#E5E5E5", "legend.frameon": False, "lines.linewidth": 1.8, "image.cmap": "cividis",
    "axes.prop_cycle": plt.cycler(color=COLOURS),
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in the course's style, and takes the figure off pyplot's list: a notebook would show it twice."""

    @functools.wraps(draw)
    def function(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            plt.close(figure)
        return figure

    return function
