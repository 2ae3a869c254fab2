"""Figures of notebook 05: the pieces on each device, their exchanges, and a run that was killed."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from clipid_utils.plots.parts import cut, legend_beside
from clipid_utils.plots.style import BLUE, COLOURS, GREEN, GREY, RED, styled


def _numbers(devices: Sequence[int]) -> str:
    """Device numbers in a word: "3", "0, 4", "0–7"."""
    devices = sorted(devices)
    whole = len(devices) > 2 and devices[-1] - devices[0] == len(devices) - 1
    return f"{devices[0]}–{devices[-1]}" if whole else ", ".join(map(str, devices))


@styled
def placements(arrays: Mapping[str, tuple[tuple[int, int], Mapping[int, tuple[slice, slice]]]]) -> Figure:
    """The piece of a matrix that each device has: for each name the matrix's shape, and each device's rows and columns.

    A piece on several devices shows all their numbers.
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
        axis.set_title(cut(name, 26), fontsize=9)
        axis.grid(False)
        axis.spines[:].set_visible(False)
    return figure


@styled
def collectives(exchanges: Mapping[str, tuple[Int[np.ndarray, "D N"], Int[np.ndarray, "D M"]]]) -> Figure:
    """The numbers on each device (a row) before and after an exchange.

    A number has the colour of the device that it comes from; a new one is white.
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


@styled
def growth(
    x: Sequence[int], series: Mapping[str, Sequence[int | float]], xlabel: str, unit: str = "B", ylabel: str = "",
    title: str = "",
) -> Figure:
    """How quantities grow or fall with x, both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    for (name, values), colour, marker in zip(series.items(), COLOURS, "os^DvPX*", strict=False):
        axis.plot(x, values, color=colour, marker=marker, markersize=5, label=name)
    axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
    axis.set_xticks(x, [f"{value:,}" for value in x])
    axis.minorticks_off()
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(matplotlib.ticker.EngFormatter(unit=unit, places=0))
    legend_beside(axis)
    return figure


@styled
def rounding(
    x: Float[np.ndarray, " N"], exact: Float[np.ndarray, " N"], rounded: Mapping[str, Float[np.ndarray, " N"]],
    xlabel: str, ylabel: str, title: str = "",
) -> Figure:
    """A quantity, and the same in coarser formats, where its line becomes a staircase."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    axis.plot(x, exact, color=GREY, linewidth=1, label="float32")
    for (name, values), colour in zip(rounded.items(), (RED, BLUE, GREEN), strict=False):
        axis.plot(x, values, color=colour, linewidth=1.4, drawstyle="steps-mid", label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axis.legend()
    return figure


@styled
def resumed_run(
    unbroken: Mapping[int, float], killed: Mapping[int, float], resumed: Mapping[int, float], title: str = ""
) -> Figure:
    """The loss by step of an unbroken run, of one that was killed, and of the one resumed from its last checkpoint."""
    figure, axis = plt.subplots(figsize=(7, 3.2))
    axis.plot(list(unbroken), list(unbroken.values()), color="#BBBBBB", linewidth=5, label="never stopped")
    axis.plot(list(resumed), list(resumed.values()), ".-", color=BLUE, linewidth=1.2, label="resumed")
    axis.plot(list(killed), list(killed.values()), "o", color=RED, mfc="none", markersize=7, label="killed")
    axis.axvline(max(killed), color=RED, linestyle="--", linewidth=1, label=f"SIGKILL after step {max(killed)}")
    axis.axvline(min(resumed), color=BLUE, linestyle=":", linewidth=1, label=f"resumes with step {min(resumed)}")
    axis.set(xlabel="step", ylabel="loss", title=title)
    legend_beside(axis)
    return figure
