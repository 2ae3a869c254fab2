"""Figures of attention weights."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from clipid_utils.plots.parts import named_cells, show, titled, written_matrix
from clipid_utils.plots.style import styled


@styled
def attention_over_picture(
    image: object, weights: Mapping[str, Float[np.ndarray, " P"]], title: str = "", size: float = 1.9
) -> Figure:
    """The picture, then for each name the weights of its patches: all on one colour scale, which starts at 0."""
    grid = round(len(next(iter(weights.values()))) ** 0.5)
    figure, axes = plt.subplots(1, len(weights) + 1, figsize=((len(weights) + 1) * size + 0.5, size + 0.5))
    show(axes[0], image)
    largest = max(float(np.max(row)) for row in weights.values())
    for axis, (name, row) in zip(axes[1:], weights.items(), strict=True):
        show(axis, image, name)
        layer = axis.imshow(np.reshape(row, (grid, grid)), vmin=0, vmax=largest, alpha=0.8,
                            extent=axis.images[0].get_extent())
    figure.colorbar(layer, ax=axes, fraction=0.02, label="weight")
    return titled(figure, title)


@styled
def attention_between_tokens(
    weights: Mapping[str, Float[np.ndarray, "L M"]], rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> Figure:
    """For each name a matrix: how much the token of a row attends to the token of a column, from 0 to 1."""
    side = 1.1 + 0.45 * len(columns)
    figure, axes = plt.subplots(1, len(weights), figsize=(len(weights) * side + 0.6, 0.9 + 0.42 * len(rows)),
                                squeeze=False)
    for axis, (name, matrix) in zip(axes[0], weights.items(), strict=True):
        mesh = axis.imshow(matrix, vmin=0, vmax=1, aspect="auto")
        named_cells(axis, list(rows), list(columns))
        written_matrix(axis, np.asarray(matrix), 0.5, "{:.2f}")
        axis.set_title(name, fontsize=10)
    figure.colorbar(mesh, ax=axes, fraction=0.03, label="weight")
    return titled(figure, title)
