"""Every figure of the course, in one style: functions take arrays, pictures and dicts, and return matplotlib Figures.

The colours are Okabe and Ito's (2008), which colour-blind readers can tell apart, and the maps are cividis or a
blue-white-orange one; nothing is said by colour alone. A Figure shows itself as the last line of a notebook cell;
elsewhere save it with `figure.savefig`.
"""
# ruff: noqa: F401  (the figures are offered from here)

from clipid_utils.plots.attention import attention_between_tokens, attention_over_picture
from clipid_utils.plots.charts import (
    caption_lengths,
    confusion_matrix,
    counts_by_group,
    curves,
    differences,
    parameter_bars,
    projection,
    recall_bars,
    schedule,
    suite_points,
    training_history,
)
from clipid_utils.plots.devices import collectives, growth, placements, resumed_run, rounding
from clipid_utils.plots.pictures import augmentations, gallery, heatmap_overlay, search_grid, similarity_matrix
from clipid_utils.plots.style import ORANGE
