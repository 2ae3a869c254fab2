"""Every figure of the course, in one style: functions take arrays, pictures and dicts, and return matplotlib Figures.

Colours are Okabe and Ito's (2008), which the colour-blind tell apart, and maps are cividis or a blue-white-orange one;
what matters is written on the figure too. A Figure shows itself as the last line of a notebook cell; elsewhere save it
with `figure.savefig`.
"""

from clipid_utils.plots.charts import (
    caption_lengths,
    confusion_matrix,
    counts_by_group,
    differences,
    parameter_bars,
    projection,
    recall_bars,
    schedule,
    training_curves,
    training_history,
)
from clipid_utils.plots.devices import (
    collectives,
    growth,
    placements,
    resumed_run,
    rounding,
)
from clipid_utils.plots.pictures import (
    augmentations,
    gallery,
    heatmap_overlay,
    search_grid,
    similarity_matrix,
)
from clipid_utils.plots.style import ORANGE

__all__ = [
    "ORANGE",
    "augmentations",
    "caption_lengths",
    "collectives",
    "confusion_matrix",
    "counts_by_group",
    "differences",
    "gallery",
    "growth",
    "heatmap_overlay",
    "parameter_bars",
    "placements",
    "projection",
    "recall_bars",
    "resumed_run",
    "rounding",
    "schedule",
    "search_grid",
    "similarity_matrix",
    "training_curves",
    "training_history",
]
