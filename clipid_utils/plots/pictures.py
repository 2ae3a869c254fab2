"""Figures that show pictures: galleries, results of a search, similarities, heat maps, augmentations."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from clipid_utils.plots.parts import cut, named_cells, picture_grid, show, titled, written_matrix
from clipid_utils.plots.style import BLUE, DIVERGING, GREEN, RED, styled


@styled
def gallery(
    images: Sequence, captions: Sequence[object] | None = None, columns: int = 8, title: str = "", size: float = 1.4
) -> Figure:
    """Pictures in a grid, each with its caption above it; pictures are PIL images or arrays [H, W, 3]."""
    captions = [""] * len(images) if captions is None else captions
    figure, axes = picture_grid(len(images), columns, size, 0.35 if any(map(str, captions)) else 0.05)
    for axis, image, caption in zip(axes, images, captions, strict=False):
        show(axis, image, cut(caption, int(11 * size)))
    return titled(figure, title)


@styled
def search_grid(
    query: object, images: Sequence, scores: Float[np.ndarray, " k"], captions: Sequence[object],
    right: Sequence[bool] | None = None, columns: int = 5, size: float = 1.7,
) -> Figure:
    """The pictures that a query found, best first, with their similarities.

    The query is a text, a picture, or (text, picture).
    With `right`, a boolean for each picture, a hit has a green frame and a tick, a miss an orange frame and a cross.
    """
    text, example = query if isinstance(query, tuple) else (query, None) if isinstance(query, str) else ("", query)
    figure, axes = picture_grid(len(images) + (example is not None), columns, size, 0.45)
    if example is not None:
        show(axes[0], example, "seperti ini, tapi …" if text else "seperti ini", BLUE, 2.5)
        axes = axes[1:]
    for i, (axis, image) in enumerate(zip(axes, images, strict=False)):
        mark = "" if right is None else ("✓ " if right[i] else "✗ ")
        frame = () if right is None else (GREEN if right[i] else RED, 2.0)
        show(axis, image, f"{mark}{scores[i]:.2f}  {cut(captions[i], int(9 * size))}", *frame)
    return titled(figure, f"“{text}”" if text else "", fontsize=12)


@styled
def similarity_matrix(
    similarity: Float[np.ndarray, "N M"], rows: Sequence[object], columns: Sequence[object] | None = None,
    images: Sequence | None = None, title: str = "", limits: tuple[float, float] | None = None,
) -> Figure:
    """Every text (row) against every picture (column), with the values; `images` are drawn above the columns.

    `limits` are the least and the greatest value of the colour scale: give two figures the same to compare them.
    """
    count, width = similarity.shape
    figure, axis = plt.subplots(figsize=(2.6 + 0.62 * width, 1.0 + 0.5 * count + (0.7 if images is not None else 0)))
    low, high = (similarity.min(), similarity.max()) if limits is None else limits
    mesh = axis.imshow(similarity, aspect="auto", vmin=low, vmax=high)
    labels = [""] * width if columns is None else [cut(column, 20, 1) for column in columns]
    named_cells(axis, [cut(row, 26, 1) for row in rows], labels)
    axis.tick_params(length=0)
    written_matrix(axis, similarity, (low + high) / 2, "{:.2f}")
    for x, image in enumerate([] if images is None else images):
        inset = axis.inset_axes((x / width + 0.05 / width, 1.01, 0.9 / width, 1.3 / count))
        inset.imshow(np.asarray(image))
        inset.axis("off")
    figure.colorbar(mesh, ax=axis, label="cosine similarity", fraction=0.04)
    return titled(figure, title)


@styled
def heatmap_overlay(
    image: object, heatmaps: Mapping[str, Float[np.ndarray, "grid grid"]], title: str = "", size: float = 2.4
) -> Figure:
    """The picture, then each map over it: orange where it fits the text, blue where it does not, white between."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    figure, axes = plt.subplots(1, len(heatmaps) + 1, figsize=((len(heatmaps) + 1) * size * 1.12, size + 0.5))
    for axis in axes:
        axis.axis("off")
    axes[0].imshow(pixels)
    axes[0].set_title(title, fontsize=9, loc="center")
    for axis, (name, heat) in zip(axes[1:], heatmaps.items(), strict=True):
        grey = np.repeat(pixels[..., :3].mean(axis=-1, keepdims=True), 3, axis=-1) / 255
        axis.imshow(grey * 0.6 + 0.4)
        limit = float(np.abs(heat).max()) or 1.0
        layer = axis.imshow(heat, cmap=DIVERGING, vmin=-limit, vmax=limit, alpha=0.65,
                            extent=(0, width, height, 0), interpolation="bilinear")
        axis.set_title(cut(name, 26), fontsize=9, loc="center")
        figure.colorbar(layer, ax=axis, fraction=0.046, format="%.2f").ax.tick_params(labelsize=7)
    return figure


@styled
def augmentations(
    originals: Sequence, augmented: Sequence[Sequence], captions: Sequence[object], title: str = ""
) -> Figure:
    """A row for each picture: the original at the left, then its forms in training."""
    rows, columns = len(originals), len(augmented[0]) + 1
    figure, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.35 * rows + 0.3), squeeze=False)
    for row, (original, variants) in enumerate(zip(originals, augmented, strict=True)):
        for axis, image in zip(axes[row], [original, *variants], strict=True):
            pixels = np.asarray(image)
            show(axis, pixels if pixels.dtype == np.uint8 else np.clip(pixels, 0, 1))
        axes[row, 0].spines[:].set(color=BLUE, linewidth=2.5)
        axes[row, 0].set_ylabel(cut(captions[row], 14), fontsize=8)
    axes[0, 0].set_title("before", fontsize=9, loc="center")
    axes[0, 1].set_title("after", fontsize=9, loc="center")
    return titled(figure, title)
