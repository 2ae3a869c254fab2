"""Every figure of the course, in one style: functions take arrays, pictures and dicts, and return matplotlib Figures.

Colours are Okabe and Ito's (2008), which the colour-blind tell apart, and maps are cividis or a blue-white-orange one;
what matters is written on the figure too. A Figure shows itself as the last line of a notebook cell; elsewhere save it
with `figure.savefig`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float, Int
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


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the course's style and take the figure off pyplot's list, or a notebook would show it twice."""

    @functools.wraps(draw)
    def function(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = draw(*args, **kwargs)
            plt.close(figure)
        return figure

    return function


def _cut(text: object, width: int, lines: int = 2) -> str:
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


def _picture_grid(count: int, columns: int, size: float, extra: float) -> tuple[Figure, list]:
    columns = max(1, min(columns, count))
    rows = max(1, math.ceil(count / columns))
    figure, axes = plt.subplots(rows, columns, figsize=(columns * size, rows * (size + extra)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, list(axes.flat)


def _show(axis, image, caption: str = "", frame: str = "#DDDDDD", width: float = 0.6) -> None:
    axis.imshow(np.asarray(image), interpolation="antialiased")
    axis.set_title(caption, fontsize=8, loc="center", pad=3)
    axis.axis("on")
    axis.grid(False)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color=frame, linewidth=width)


@_styled
def gallery(
    images: Sequence, captions: Sequence[object] | None = None, columns: int = 8, title: str = "", size: float = 1.4
) -> Figure:
    """Pictures in a grid, each with its caption above it; pictures are PIL images or arrays [H, W, 3]."""
    captions = [""] * len(images) if captions is None else captions
    figure, axes = _picture_grid(len(images), columns, size, 0.35 if any(map(str, captions)) else 0.05)
    for axis, image, caption in zip(axes, images, captions, strict=False):
        _show(axis, image, _cut(caption, int(11 * size)))
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


@_styled
def search_grid(
    query: object,
    images: Sequence,
    scores: Float[np.ndarray, " k"],
    captions: Sequence[object] | None = None,
    right: Sequence[bool] | None = None,
    columns: int = 5,
    size: float = 1.7,
) -> Figure:
    """A query and the pictures found, best first, with their similarities; it is a text, a picture, or (text, picture).

    With `right`, a boolean a picture, hits carry a green frame and a tick, misses an orange frame and a cross.
    """
    captions = [""] * len(images) if captions is None else captions
    text, example = query if isinstance(query, tuple) else (query, None) if isinstance(query, str) else ("", query)
    figure, axes = _picture_grid(len(images) + (example is not None), columns, size, 0.45)
    if example is not None:
        _show(axes[0], example, "seperti ini, tapi …" if text else "seperti ini", BLUE, 2.5)
        axes = axes[1:]
    for i, (axis, image) in enumerate(zip(axes, images, strict=False)):
        mark = "" if right is None else ("✓ " if right[i] else "✗ ")
        frame = () if right is None else (GREEN if right[i] else RED, 2.0)
        _show(axis, image, f"{mark}{scores[i]:.2f}  {_cut(captions[i], int(9 * size))}", *frame)
    if text:
        figure.suptitle(f"“{text}”", x=0.01, ha="left", fontsize=12)
    return figure


@_styled
def counts_by_group(counts: Mapping[str, Mapping[str, int]], title: str = "", unit: str = "pictures") -> Figure:
    """Stacked bars: `counts[group][artist]`, groups downwards from the largest, artists as colours."""
    groups = sorted(counts, key=lambda group: -sum(counts[group].values()))
    parts = list(dict.fromkeys(part for group in groups for part in counts[group]))
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.3 * len(groups)))
    left = np.zeros(len(groups))
    for i, part in enumerate(parts):
        values = np.array([counts[group].get(part, 0) for group in groups])
        axis.barh(groups, values, left=left, label=part, color=COLOURS[i % len(COLOURS)], edgecolor="white")
        left += values
    for y, total in enumerate(left):
        axis.text(total, y, f" {int(total):,}", va="center", fontsize=9)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlabel=unit, title=title)
    axis.margins(x=0.1)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@_styled
def caption_lengths(
    lengths: Mapping[str, Sequence[int]], limit: int | None = None, unit: str = "tokens", title: str = ""
) -> Figure:
    """Histogram of caption lengths, one outline a kind of caption; `limit` draws where the tokenizer cuts."""
    figure, axis = plt.subplots(figsize=(8, 3.2))
    longest = max(max(values) for values in lengths.values())
    step = max(1, longest // 60)
    edges = np.arange(0.5, longest + step + 0.5, step)
    for (name, values), colour in zip(lengths.items(), COLOURS, strict=False):
        label = f"{name} (median {np.median(values):.0f})"
        axis.hist(values, bins=edges, histtype="step", linewidth=2, color=colour, label=label)
    if limit is not None:
        over = sum(int((np.asarray(values) > limit).sum()) for values in lengths.values())
        axis.axvline(limit + 0.5, color=GREY, linestyle="--", label=f"cut after {limit} ({over:,} longer)")
    axis.set(xlabel=f"{unit} in a caption", ylabel="captions", title=title)
    axis.legend()
    return figure


@_styled
def training_curves(
    steps: Sequence[int] | np.ndarray,
    loss: Sequence[float] | np.ndarray,
    batch_size: int | None = None,
    recall_steps: Sequence[int] = (),
    recall: Mapping[str, Sequence[float]] | None = None,
    title: str = "",
) -> Figure:
    """The loss (thin: each step, thick: mean) with log(batch), which chance pays, and validation recall beside it.

    `recall` maps a name ("R@1") to one value a step of `recall_steps`.
    """
    recall = recall or {}
    figure, axes = plt.subplots(1, 2 if recall else 1, figsize=(9 if recall else 5.5, 3.2), squeeze=False)
    axis = axes[0, 0]
    axis.plot(steps, loss, color=SKY, linewidth=0.7)
    span = max(1, len(loss) // 30)
    if span > 1:
        smooth = np.convolve(loss, np.ones(span) / span, mode="valid")
        axis.plot(steps[span - 1 :], smooth, color=BLUE, label=f"mean of {span} steps")
    if batch_size:
        chance = math.log(batch_size)
        axis.axhline(chance, color=GREY, linestyle="--", label=f"chance: log({batch_size}) = {chance:.2f}")
    axis.set(xlabel="step", ylabel="loss", title=title, ylim=(0, None))
    if span > 1 or batch_size:
        axis.legend()
    for (name, values), colour, marker in zip(recall.items(), (BLUE, ORANGE, GREEN, RED), "os^D", strict=False):
        axes[0, 1].plot(recall_steps, values, color=colour, marker=marker, markersize=4, label=name)
    if recall:
        axes[0, 1].set(xlabel="step", ylabel="share of queries", ylim=(0, 1), title="Validation recall")
        axes[0, 1].legend(loc="upper left")
    return figure


def training_history(history: Sequence[Mapping], title: str = "") -> Figure:
    """`training_curves` of the lines that `fit` logs (`metrics.jsonl`): some hold a loss, some validation recall."""
    losses = [line for line in history if "loss" in line]
    checks = [line for line in history if "text_to_picture_R@1" in line]
    batch_size = round(math.exp(losses[0]["log_batch"])) if losses else None
    recall = {f"R@{k}": [line[f"text_to_picture_R@{k}"] for line in checks] for k in (1, 5, 10)} if checks else None
    steps, values = [line["step"] for line in losses], [line["loss"] for line in losses]
    return training_curves(steps, values, batch_size, [line["step"] for line in checks], recall, title)


@_styled
def similarity_matrix(
    similarity: Float[np.ndarray, "N M"],
    rows: Sequence[object],
    columns: Sequence[object] | None = None,
    images: Sequence | None = None,
    title: str = "",
) -> Figure:
    """Every text (rows) against every picture (columns), the values written in; `images` stand above the columns."""
    count, width = similarity.shape
    figure, axis = plt.subplots(figsize=(2.6 + 0.62 * width, 1.0 + 0.5 * count + (0.7 if images is not None else 0)))
    mesh = axis.imshow(similarity, aspect="auto")
    axis.set_yticks(range(count), [_cut(row, 26, 1) for row in rows])
    labels = [""] * width if columns is None else [_cut(column, 20, 1) for column in columns]
    axis.set_xticks(range(width), labels, rotation=40, ha="right", rotation_mode="anchor")
    axis.tick_params(length=0)
    axis.grid(False)
    middle = (similarity.min() + similarity.max()) / 2
    for (y, x), value in np.ndenumerate(similarity):
        colour = "white" if value < middle else "black"
        axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    for x, image in enumerate([] if images is None else images):
        inset = axis.inset_axes((x / width + 0.05 / width, 1.01, 0.9 / width, 1.3 / count))
        inset.imshow(np.asarray(image))
        inset.axis("off")
    figure.colorbar(mesh, ax=axis, label="cosine similarity", fraction=0.04)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


@_styled
def heatmap_overlay(
    image: object, heatmaps: Mapping[str, Float[np.ndarray, "grid grid"]], title: str = "", size: float = 2.4
) -> Figure:
    """The picture, then each map over it: orange where the text is found, blue where the contrary, white between."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    figure, axes = plt.subplots(1, len(heatmaps) + 1, figsize=((len(heatmaps) + 1) * size * 1.12, size + 0.5))
    axes = np.atleast_1d(axes)
    for axis in axes:
        axis.axis("off")
    axes[0].imshow(pixels)
    axes[0].set_title(title, fontsize=9, loc="center")
    for axis, (name, heat) in zip(axes[1:], heatmaps.items(), strict=True):
        grey = np.repeat(pixels[..., :3].mean(axis=-1, keepdims=True), 3, axis=-1) / 255
        axis.imshow(grey * 0.6 + 0.4)
        limit = float(np.abs(heat).max()) or 1.0
        extent = (0, width, height, 0)
        layer = axis.imshow(
            heat, cmap=DIVERGING, vmin=-limit, vmax=limit, alpha=0.65, extent=extent, interpolation="bilinear"
        )
        axis.set_title(_cut(name, 26), fontsize=9, loc="center")
        figure.colorbar(layer, ax=axis, fraction=0.046, format="%.2f").ax.tick_params(labelsize=7)
    return figure


@_styled
def recall_bars(
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    metrics: Sequence[str] = ("R@1", "R@5", "R@10"),
    reference: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Bars with 95% intervals: `results[label][metric] = {"value", "low", "high"}`, as `metrics.json` holds them.

    `reference` draws named horizontal lines (nearest neighbours in pixels, chance).
    """
    figure, axis = plt.subplots(figsize=(max(5.5, 1.1 + 0.62 * len(results) * len(metrics)), 3.4))
    wide = 0.8 / len(metrics)
    for i, metric in enumerate(metrics):
        cells = [result[metric] for result in results.values()]
        values = np.array([cell["value"] for cell in cells])
        error = [values - [cell["low"] for cell in cells], [cell["high"] for cell in cells] - values]
        x = np.arange(len(results)) + (i - (len(metrics) - 1) / 2) * wide
        axis.bar(x, values, wide * 0.94, color=COLOURS[i], label=metric)
        axis.errorbar(x, values, np.maximum(error, 0), fmt="none", ecolor="#333333", capsize=3, linewidth=1)
        for position, cell in zip(x, cells, strict=True):
            axis.text(position, cell["high"] + 0.012, f"{cell['value']:.2f}", ha="center", fontsize=8)
    for (name, level), style in zip((reference or {}).items(), ("--", ":", "-."), strict=False):
        axis.axhline(level, color=GREY, linestyle=style, linewidth=1.2, label=f"{name}: {level:.2f}")
    room = int((figure.get_figwidth() - 1.1) / len(results) / 0.09)  # letters
    axis.set_xticks(range(len(results)), [_cut(label, room) for label in results])
    axis.grid(axis="x", visible=False)
    axis.set(ylim=(0, 1.05), ylabel="share of queries", title=title)
    axis.legend(ncols=len(metrics), loc="upper left", bbox_to_anchor=(0, -0.14), fontsize=9)
    return figure


@_styled
def confusion_matrix(
    true: Int[np.ndarray, " N"], predicted: Int[np.ndarray, " N"], names: Sequence[str], title: str = ""
) -> Figure:
    """Which class (rows) is taken for which (columns), in per cent of the row; beside the name the row's pictures."""
    size = len(names)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.asarray(true), np.asarray(predicted)), 1)
    totals = matrix.sum(axis=1, keepdims=True)
    share = 100 * matrix / np.maximum(totals, 1)
    figure, axis = plt.subplots(figsize=(2.8 + 0.5 * size, 1.6 + 0.42 * size))
    axis.imshow(share, vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(size), [_cut(name, 18, 1) for name in names], rotation=40, ha="right", rotation_mode="anchor")
    labels = [f"{_cut(name, 22, 1)} ({int(n)})" for name, n in zip(names, totals[:, 0], strict=True)]
    axis.set_yticks(range(size), labels)
    axis.grid(False)
    for (y, x), value in np.ndenumerate(share):
        if value >= 0.5:
            colour = "white" if value < 50 else "black"
            axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set(xlabel="taken for", ylabel="is", title=title)
    return figure


@_styled
def parameter_bars(counts: Mapping[str, int], title: str = "") -> Figure:
    """How many parameters each part of the model has, in the order given, with its share of the whole."""
    total = sum(counts.values())
    figure, axis = plt.subplots(figsize=(7, 0.7 + 0.32 * len(counts)))
    axis.barh(list(counts), list(counts.values()), color=BLUE)
    for y, count in enumerate(counts.values()):
        axis.text(count, y, f" {count:,} ({count / total:.0%})", va="center", fontsize=9)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.3)
    axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=" "))
    axis.set(title=title or f"{total:,} parameters")
    return figure


@_styled
def schedule(rates: Float[np.ndarray, " steps"] | Sequence[float], title: str = "Learning rate") -> Figure:
    """The learning rate over the steps, its peak marked."""
    rates = np.asarray(rates)
    figure, axis = plt.subplots(figsize=(5.5, 2.6))
    axis.plot(rates, color=BLUE)
    peak = int(rates.argmax())
    axis.plot(peak, rates[peak], "o", color=RED)
    note = f"{rates[peak]:.2g} at step {peak:,}"
    axis.annotate(note, (peak, rates[peak]), xytext=(10, 4), textcoords="offset points")
    axis.set(xlabel="step", title=title, ylim=(0, rates.max() * 1.2))
    return figure


@_styled
def augmentations(
    originals: Sequence, augmented: Sequence[Sequence], captions: Sequence[object] | None = None, title: str = ""
) -> Figure:
    """One row a picture: the original at the left, then what training sees of it."""
    figure, axes = plt.subplots(
        len(originals), len(augmented[0]) + 1, figsize=(1.25 * (len(augmented[0]) + 1), 1.35 * len(originals) + 0.3),
        squeeze=False,
    )  # fmt: skip
    for row, (original, variants) in enumerate(zip(originals, augmented, strict=True)):
        for axis, image in zip(axes[row], [original, *variants], strict=True):
            pixels = np.asarray(image)
            _show(axis, pixels if pixels.dtype == np.uint8 else np.clip(pixels, 0, 1))
        axes[row, 0].spines[:].set(color=BLUE, linewidth=2.5)
        if captions is not None:
            axes[row, 0].set_ylabel(_cut(captions[row], 14), fontsize=8)
    axes[0, 0].set_title("before", fontsize=9, loc="center")
    axes[0, 1].set_title("after", fontsize=9, loc="center")
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


@_styled
def projection(
    embeds: Float[np.ndarray, "N E"], labels: Sequence[str], marked: Bool[np.ndarray, " N"] | None = None,
    mark_names: tuple[str, str] = ("pictures", "texts"), title: str = "",
) -> Figure:  # fmt: skip
    """Embeddings on their first two principal components, a colour and marker a label; `marked` rows are framed."""
    centred = embeds - embeds.mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    points = centred @ directions[:2].T
    explained = singular[:2] ** 2 / (singular**2).sum()
    marked = np.zeros(len(embeds), bool) if marked is None else np.asarray(marked)
    labels = np.asarray([str(label) for label in labels])
    figure, axis = plt.subplots(figsize=(7.2, 4.4))
    for i, label in enumerate(dict.fromkeys(labels)):
        colour, marker = COLOURS[i % len(COLOURS)], "os^DvPX*"[(i + i // len(COLOURS)) % 8]
        chosen = labels == label
        look = {"color": colour, "marker": marker}
        axis.scatter(*points[chosen & ~marked].T, s=16, alpha=0.75, label=_cut(label, 24, 1), **look)
        axis.scatter(*points[chosen & marked].T, s=90, edgecolor="black", linewidth=1.3, **look)
    axis.set(xlabel=f"component 1 ({explained[0]:.0%})", ylabel=f"component 2 ({explained[1]:.0%})", title=title)
    if marked.any():
        axis.scatter([], [], s=90, color="white", edgecolor="black", label=f"framed: {mark_names[1]}")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def _numbers(devices: Sequence[int]) -> str:
    """Device numbers in a word: "3", "0, 4", "0–7"."""
    devices = sorted(devices)
    whole = len(devices) > 2 and devices[-1] - devices[0] == len(devices) - 1
    return f"{devices[0]}–{devices[-1]}" if whole else ", ".join(map(str, devices))


@_styled
def placements(
    arrays: Mapping[str, tuple[tuple[int, int], Mapping[int, tuple[slice, slice]]]], title: str = ""
) -> Figure:
    """Which device holds which piece of a matrix: for each name the matrix's shape, and each device's rows and columns.

    A piece held by several devices bears all their numbers.
    """
    figure, axes = plt.subplots(1, len(arrays), figsize=(2.4 * len(arrays), 2.7), squeeze=False)
    for axis, (name, ((rows, columns), held)) in zip(axes[0], arrays.items(), strict=True):
        holders: dict[tuple, list[int]] = {}
        for device, index in held.items():
            (top, bottom, _), (left, right, _) = index[0].indices(rows), index[1].indices(columns)
            holders.setdefault((left, top, right - left, bottom - top), []).append(device)
        for (left, top, wide, high), devices in holders.items():
            colour = COLOURS[min(devices) % len(COLOURS)] if len(holders) > 1 else "#DDDDDD"
            axis.add_patch(plt.Rectangle((left, top), wide, high, facecolor=colour, alpha=0.55, edgecolor="white"))
            axis.text(left + wide / 2, top + high / 2, _numbers(devices), ha="center", va="center", fontsize=9)
        axis.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[], aspect="equal")
        axis.set_title(_cut(name, 26), fontsize=9)
        axis.grid(False)
        axis.spines[:].set_visible(False)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


@_styled
def collectives(exchanges: Mapping[str, tuple[Int[np.ndarray, "D N"], Int[np.ndarray, "D M"]]]) -> Figure:
    """What each device (a row) holds before and after an exchange.

    A number has the colour of the device that it comes from; one that no device held before is white.
    """
    columns = 2 if len(exchanges) > 1 else 1
    rows = math.ceil(len(exchanges) / columns)
    tall = max(len(before) for before, _ in exchanges.values())
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, rows * (0.7 + 0.24 * tall)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, (before, after)) in zip(axes.flat, exchanges.items(), strict=False):
        owner = {int(value): device for device in reversed(range(len(before))) for value in before[device]}
        gap = before.shape[1] + 1.6
        for offset, table in ((0.0, before), (gap, after)):
            for (device, column), value in np.ndenumerate(table):
                known = int(value) in owner
                look = {"facecolor": COLOURS[owner[int(value)] % len(COLOURS)] if known else "white", "alpha": 0.55}
                axis.add_patch(plt.Rectangle((offset + column, device), 0.94, 0.9, edgecolor=GREY, lw=0.4, **look))
                axis.text(offset + column + 0.47, device + 0.45, int(value), ha="center", va="center", fontsize=7)
        axis.annotate("", (gap - 0.25, len(before) / 2), (gap - 1.3, len(before) / 2), arrowprops={"arrowstyle": "->"})
        wide = max(gap + after.shape[1], 12)
        axis.set(xlim=(-0.1, wide), ylim=(len(before), -0.1), title=name)
    return figure


@_styled
def growth(
    x: Sequence[int], series: Mapping[str, Sequence[int | float]], xlabel: str, unit: str = "B", ylabel: str = "",
    limits: Mapping[str, int | float] | None = None, title: str = "",
) -> Figure:  # fmt: skip
    """How quantities grow or fall with x, both axes logarithmic; `limits` draws named horizontal lines."""
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    for (name, values), colour, marker in zip(series.items(), COLOURS, "os^DvPX*", strict=False):
        axis.plot(x, values, color=colour, marker=marker, markersize=5, label=name)
    for (name, level), style in zip((limits or {}).items(), ("--", ":", "-."), strict=False):
        axis.axhline(level, color=GREY, linestyle=style, linewidth=1.2, label=name)
    axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
    axis.set_xticks(x, [f"{value:,}" for value in x])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(matplotlib.ticker.EngFormatter(unit=unit, places=0))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return figure


@_styled
def rounding(
    x: Float[np.ndarray, " N"], exact: Float[np.ndarray, " N"], rounded: Mapping[str, Float[np.ndarray, " N"]],
    xlabel: str, ylabel: str, title: str = "",
) -> Figure:  # fmt: skip
    """A quantity and what is left of it in a coarser format: the steps of a staircase where there was a line."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    axis.plot(x, exact, color=GREY, linewidth=1, label="float32")
    for (name, values), colour in zip(rounded.items(), (RED, BLUE, GREEN), strict=False):
        axis.plot(x, values, color=colour, linewidth=1.4, drawstyle="steps-mid", label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.legend()
    return figure


@_styled
def resumed_run(
    unbroken: Mapping[int, float], killed: Mapping[int, float], resumed: Mapping[int, float], title: str = ""
) -> Figure:
    """The loss by step of an unbroken run, of one that was killed, and of what went on from its last checkpoint."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    axis.plot(list(unbroken), list(unbroken.values()), color="#BBBBBB", linewidth=5, label="never stopped")
    axis.plot(list(resumed), list(resumed.values()), ".-", color=BLUE, linewidth=1.2, label="resumed")
    axis.plot(list(killed), list(killed.values()), "o", color=RED, mfc="none", markersize=7, label="killed")
    axis.axvline(max(killed), color=RED, linestyle="--", linewidth=1, label=f"SIGKILL after step {max(killed)}")
    axis.axvline(min(resumed), color=BLUE, linestyle=":", linewidth=1, label=f"goes on with step {min(resumed)}")
    axis.set(xlabel="step", ylabel="loss", title=title)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return figure
