"""Figures of counts, curves and scores."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib.figure import Figure

from clipid_utils.plots.parts import cut, legend_beside, named_cells, written_matrix
from clipid_utils.plots.style import BLUE, COLOURS, GREEN, GREY, ORANGE, RED, SKY, styled

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


@styled
def counts_by_group(counts: Mapping[str, Mapping[str, int]], title: str = "", unit: str = "pictures") -> Figure:
    """Stacked bars of `counts[group][artist]`: the largest group on top, a colour for each artist."""
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
    legend_beside(axis, 10)
    return figure


@styled
def caption_lengths(
    lengths: Mapping[str, Sequence[int]], limit: int | None = None, unit: str = "tokens", title: str = ""
) -> Figure:
    """Histogram of caption lengths, an outline for each kind of caption; `limit` marks where the tokenizer cuts.

    The axis includes `limit`, and ends where at most 1 in 200 captions of each kind is longer; the legend counts these.
    """
    figure, axis = plt.subplots(figsize=(8, 3.2))
    longest = int(max(np.ceil(np.quantile(list(values), 0.995)) for values in lengths.values()))
    longest = max(longest, 0 if limit is None else limit + 1)
    beyond = [value for values in lengths.values() for value in values if value > longest]
    step = max(1, longest // 60)
    edges = np.arange(0.5, longest + step + 0.5, step)
    for (name, values), colour in zip(lengths.items(), COLOURS, strict=False):
        label = f"{name} (median {np.median(values):.0f})"
        axis.hist(values, bins=edges, histtype="step", linewidth=2, color=colour, label=label)
    if limit is not None:
        over = sum(int((np.asarray(values) > limit).sum()) for values in lengths.values())
        axis.axvline(limit + 0.5, color=GREY, linestyle="--", label=f"cut after {limit} ({over:,} longer)")
    if beyond:
        axis.plot([], [], " ", label=f"not shown: {len(beyond):,} longer than {longest}, up to {max(beyond)}")
    axis.set(xlabel=f"{unit} in a caption", ylabel="captions", title=title, xlim=(0, longest + step))
    axis.legend()
    return figure


@styled
def training_history(history: Sequence[Mapping], title: str = "") -> Figure:
    """The lines that `fit` logs (`metrics.jsonl`): some have a loss, and some the validation recall.

    The loss (thin: each step, thick: mean) with log(batch), the loss of a guess; beside it the recall, if there is any.
    """
    losses = [line for line in history if "loss" in line]
    checks = [line for line in history if "text_to_picture_R@1" in line]
    figure, axes = plt.subplots(1, 2 if checks else 1, figsize=(9 if checks else 5.5, 3.2), squeeze=False)
    axis, span = axes[0, 0], max(1, len(losses) // 30)
    steps, loss = [line["step"] for line in losses], [line["loss"] for line in losses]
    axis.plot(steps, loss, color=SKY, linewidth=0.7)
    if span > 1:
        smooth = np.convolve(loss, np.ones(span) / span, mode="valid")
        axis.plot(steps[span - 1 :], smooth, color=BLUE, label=f"mean of {span} steps")
    if losses:
        batch_size = round(math.exp(losses[0]["log_batch"]))
        chance = math.log(batch_size)
        axis.axhline(chance, color=GREY, linestyle="--", label=f"chance: log({batch_size}) = {chance:.2f}")
        axis.legend()
    axis.set(xlabel="step", ylabel="loss", title=title, ylim=(0, None))
    if checks:
        for k, colour, marker in zip((1, 5, 10), (BLUE, ORANGE, GREEN), "os^", strict=True):
            values = [line[f"text_to_picture_R@{k}"] for line in checks]
            axes[0, 1].plot([line["step"] for line in checks], values, color=colour, marker=marker, markersize=4,
                            label=f"R@{k}")
        axes[0, 1].set(xlabel="step", ylabel="share of queries", ylim=(0, 1), title="Validation recall")
        axes[0, 1].legend(loc="best")
    return figure


@styled
def recall_bars(results: Results, metrics: Sequence[str] = ("R@1", "R@5", "R@10"), title: str = "") -> Figure:
    """Bars with 95% intervals: `results[label][metric] = {"value", "low", "high"}`, as in `metrics.json`."""
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
    room = int((figure.get_figwidth() - 1.1) / len(results) / 0.09)  # letters
    axis.set_xticks(range(len(results)), [cut(label, room) for label in results])
    axis.grid(axis="x", visible=False)
    axis.set(ylim=(0, 1.05), ylabel="share of queries", title=title)
    axis.legend(ncols=len(metrics), loc="upper left", bbox_to_anchor=(0, -0.14), fontsize=9)
    return figure


@styled
def differences(results: Results, unit: str = "R@1", title: str = "") -> Figure:
    """Differences with their 95% intervals: `results[question][split] = {"value", "low", "high"}`.

    Each question has a panel. A point is filled if its interval does not include 0.
    """
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    figure, axes = plt.subplots(1, len(results), figsize=(3.1 * len(results), 1.1 + 0.36 * len(names)), sharey=True,
                                sharex=True, squeeze=False)
    for axis, (question, found) in zip(axes[0], results.items(), strict=True):
        for y, name in enumerate(names):
            cell = found[name]
            colour, fill = (BLUE, BLUE) if cell["low"] > 0 or cell["high"] < 0 else (GREY, "white")
            axis.plot([cell["low"], cell["high"]], [y, y], color=colour, linewidth=2)
            axis.plot(cell["value"], y, "o", color=colour, markerfacecolor=fill)
            axis.annotate(f"{cell['value']:+.3f}", (cell["value"], y), xytext=(0, 5), textcoords="offset points",
                          ha="center", fontsize=8)
        axis.axvline(0, color="#333333", linewidth=1)
        axis.set_title(question, fontsize=10)
        axis.set(xlabel=f"difference in {unit}", ylim=(len(names) - 0.5, -0.7))
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(names)), names)
    figure.suptitle(title)
    return figure


@styled
def suite_points(tasks: Mapping[str, Results], chance: Mapping[str, float] | None = None, title: str = "") -> Figure:
    """A panel for each task and a row for each figure: `tasks[task][figure][model] = {"value", "low", "high"}`.

    Each model is a point with its 95% interval, in a colour and a shape of its own. A dashed line is at the `chance` of
    a task.
    """
    models = list(dict.fromkeys(model for found in tasks.values() for cells in found.values() for model in cells))
    heights = [len(found) for found in tasks.values()]
    figure, axes = plt.subplots(len(tasks), 1, figsize=(7.2, 1.2 + 0.42 * sum(heights) + 0.5 * len(tasks)), sharex=True,
                                squeeze=False, height_ratios=[rows + 0.6 for rows in heights])
    for axis, (task, found) in zip(axes[:, 0], tasks.items(), strict=True):
        for number, model in enumerate(models):
            shift = (number - (len(models) - 1) / 2) * 0.6 / len(models)
            for y, cells in enumerate(found.values()):
                cell, colour = cells[model], COLOURS[number % len(COLOURS)]
                axis.plot([cell["low"], cell["high"]], [y + shift] * 2, color=colour, linewidth=1.6)
                axis.plot(cell["value"], y + shift, "os^Dv"[number % 5], color=colour, markersize=5,
                          label=model if y == 0 else None)
        if task in (chance or {}):
            axis.axvline(chance[task], color="#333333", linewidth=1, linestyle="--")
        axis.set_yticks(range(len(found)), [name.replace("_", " ") for name in found])
        axis.set(xlim=(0, 1), ylim=(len(found) - 0.4, -0.6))
        axis.set_title(task, loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("share of queries or pictures")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, loc="outside lower center", fontsize=9)
    figure.suptitle(title)
    return figure


@styled
def confusion_matrix(
    true: Int[np.ndarray, " N"], predicted: Int[np.ndarray, " N"], names: Sequence[str], title: str = ""
) -> Figure:
    """How often each class (row) is taken for each other (column), in per cent of the row's pictures."""
    size = len(names)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.asarray(true), np.asarray(predicted)), 1)
    totals = matrix.sum(axis=1, keepdims=True)
    share = 100 * matrix / np.maximum(totals, 1)
    figure, axis = plt.subplots(figsize=(2.8 + 0.5 * size, 1.6 + 0.42 * size))
    axis.imshow(share, vmin=0, vmax=100, aspect="auto")
    labels = [f"{cut(name, 22, 1)} ({int(n)})" for name, n in zip(names, totals[:, 0], strict=True)]
    named_cells(axis, labels, [cut(name, 18, 1) for name in names])
    written_matrix(axis, share, 50, "{:.0f}", least=0.5)
    axis.set(xlabel="taken for", ylabel="is", title=title)
    return figure


@styled
def parameter_bars(counts: Mapping[str, int], title: str = "") -> Figure:
    """The number of parameters of each part of the model, in the given order, with its share of the whole."""
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


@styled
def schedule(rates: Float[np.ndarray, " steps"] | Sequence[float], title: str = "Learning rate") -> Figure:
    """The learning rate over the steps, with its peak."""
    rates = np.asarray(rates)
    figure, axis = plt.subplots(figsize=(5.5, 2.6))
    axis.plot(rates, color=BLUE)
    peak = int(rates.argmax())
    axis.plot(peak, rates[peak], "o", color=RED)
    note = f"{rates[peak]:.2g} at step {peak:,}"
    axis.annotate(note, (peak, rates[peak]), xytext=(10, 4), textcoords="offset points")
    axis.set(xlabel="step", title=title, ylim=(0, rates.max() * 1.2))
    return figure


@styled
def curves(
    series: Mapping[str, Sequence[int | float] | Float[np.ndarray, " N"]], xlabel: str, ylabel: str, title: str = "",
    log: bool = False,
) -> Figure:
    """Lines over 0, 1, 2, …; each is drawn thinner than the one before, so that equal lines are both seen.

    A name that begins with "_" is left out of the legend. With more than eight lines, dark ones come first.
    """
    figure, axis = plt.subplots(figsize=(6, 3.2))
    many = len(series) > len(COLOURS)
    shades = matplotlib.colormaps["cividis"](np.linspace(0, 0.9, len(series))) if many else COLOURS
    for i, ((name, values), colour) in enumerate(zip(series.items(), shades, strict=False)):
        width = 1.2 if many else max(1.2, 5.0 - 3.6 * i)
        axis.plot(np.asarray(values), color=colour, linewidth=width, label=name, alpha=1.0 if i or many else 0.6)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title, yscale="log" if log else "linear")
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    if any(not name.startswith("_") for name in series):
        axis.legend()
    return figure


@styled
def projection(
    embeds: Float[np.ndarray, "N E"], labels: Sequence[str], marked: Bool[np.ndarray, " N"], title: str = ""
) -> Figure:
    """Embeddings on their first two principal components; each label has a colour and marker, `marked` texts a frame.

    `marked` is True for the rows that are texts.
    """
    centred = embeds - embeds.mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    points = centred @ directions[:2].T
    explained = singular[:2] ** 2 / (singular**2).sum()
    labels = np.asarray([str(label) for label in labels])
    figure, axis = plt.subplots(figsize=(7.2, 4.4))
    for i, label in enumerate(dict.fromkeys(labels)):
        colour, marker = COLOURS[i % len(COLOURS)], "os^DvPX*"[(i + i // len(COLOURS)) % 8]
        chosen = labels == label
        look = {"color": colour, "marker": marker}
        axis.scatter(*points[chosen & ~marked].T, s=16, alpha=0.75, label=cut(label, 24, 1), **look)
        axis.scatter(*points[chosen & marked].T, s=90, edgecolor="black", linewidth=1.3, **look)
    axis.set(xlabel=f"component 1 ({explained[0]:.0%})", ylabel=f"component 2 ({explained[1]:.0%})", title=title)
    axis.scatter([], [], s=90, color="white", edgecolor="black", label="framed: texts")
    legend_beside(axis, 8)
    return figure
