import io

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from clipid_utils import plots
from clipid_utils.plots.parts import cut

rng = np.random.default_rng(0)
PICTURES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
NAMES = ["kucing tidur", "anak laki-laki yang sedang tersenyum lebar sekali", "rumah"]
CELL = {"value": 0.5, "low": 0.45, "high": 0.56}
SUITE = {"photographs": {f"{way} R@1": {"mini": CELL, "photo": CELL | {"value": 0.46}}
                         for way in ("text_to_image", "image_to_text")},
         "pairs": {"all accuracy": {"mini": CELL, "photo": CELL}}}
LOSSES = [{"step": step, "loss": 5 - step / 20, "log_batch": 5.5} for step in range(90)]
FIGURES = {
    "gallery": lambda: plots.gallery(PICTURES, NAMES, title="Kamus"),
    "gallery_one": lambda: plots.gallery(PICTURES[:1]),
    "search_text": lambda: plots.search_grid("kucing", PICTURES, np.array([0.9, 0.5, 0.1]), NAMES, [True, False, True]),
    "search_image": lambda: plots.search_grid(PICTURES[0], PICTURES, np.array([0.9, 0.5, 0.1]), NAMES),
    "search_both": lambda: plots.search_grid(("tapi merah", PICTURES[0]), PICTURES, np.array([0.9, 0.5, 0.1]), NAMES),
    "counts": lambda: plots.counts_by_group({"hewan": {"noto": 4, "twemoji": 2}, "orang": {"noto": 1}}),
    "lengths_odd": lambda: plots.caption_lengths({"nama": [1, 151]}),
    "lengths": lambda: plots.caption_lengths({"nama": [1, 2, 3, 2], "keduanya": [5, 9, 30]}, limit=16),
    "history": lambda: plots.training_history(
        [*LOSSES, {"step": 9, **{f"text_to_picture_R@{k}": 0.3 for k in (1, 5, 10)}}]
    ),
    "history_empty": lambda: plots.training_history([]),
    "history_short": lambda: plots.training_history(LOSSES[:2]),
    "similarity": lambda: plots.similarity_matrix(rng.random((3, 3)), NAMES, NAMES, PICTURES, "Kemiripan"),
    "heatmap": lambda: plots.heatmap_overlay(PICTURES[0], {"penutupan": rng.normal(size=(4, 4))}, "kucing"),
    "heatmap_flat": lambda: plots.heatmap_overlay(PICTURES[0], {"nol": np.zeros((4, 4))}),
    "attention": lambda: plots.attention_over_picture(PICTURES[0], {"satu": rng.random(9), "dua": np.zeros(9)}),
    "attention_text": lambda: plots.attention_between_tokens({"blok 1": rng.random((2, 3))}, list("ab"), list("abc")),
    "recall": lambda: plots.recall_bars({"uji": {f"R@{k}": CELL for k in (1, 5, 10)}}),
    "differences": lambda: plots.differences(
        {"saringan": {"validation": CELL, "photographs": {"value": 0.0, "low": -0.01, "high": 0.02}}}, "R@10", "Beda"),
    "suite": lambda: plots.suite_points(SUITE, {"pairs": 0.5}, "Perbandingan"),
    "confusion": lambda: plots.confusion_matrix(np.array([0, 1, 1]), np.array([0, 1, 2]), NAMES),
    "parameters": lambda: plots.parameter_bars({"image": 1_200_000, "text": 800_000}),
    "schedule": lambda: plots.schedule(np.hstack([np.linspace(0, 1e-3, 10), np.linspace(1e-3, 0, 90)])),
    "curves": lambda: plots.curves({"loop": [3, 2, 1], "library": [3, 2, 1]}, "step", "loss", "Sama"),
    "curves_many": lambda: plots.curves({f"_{i}": 0.1 ** i * np.ones(4) for i in range(12)}, "n", "value", log=True),
    "augmentations": lambda: plots.augmentations(PICTURES[:2], [PICTURES, [np.full((8, 8, 3), 1.2)] * 3], NAMES[:2]),
    "projection": lambda: plots.projection(rng.normal(size=(9, 5)), NAMES * 3, np.arange(9) < 3, title="Peta"),
    "placements": lambda: plots.placements(
        {"rows": ((4, 4), {d: (slice(2 * d, 2 * d + 2), slice(None)) for d in (0, 1)}),
         "everywhere": ((4, 4), {d: (slice(None), slice(None)) for d in range(8)})}),
    "collectives": lambda: plots.collectives(
        {"all_gather": (np.array([[1], [2]]), np.array([[1, 2], [1, 2]])), "psum": (np.array([[1], [2]]),) * 2}),
    "collective_one": lambda: plots.collectives({"psum": (np.array([[1], [2]]), np.array([[3], [3]]))}),
    "growth": lambda: plots.growth([8, 64, 512], {"gradients": [1e8, 2e8, 2e8]}, "devices"),
    "rounding": lambda: plots.rounding(np.arange(9.0), np.arange(9.0), {"bfloat16": np.arange(9.0) // 2 * 2}, "x", "y"),
    "resumed": lambda: plots.resumed_run({1: 3.0, 2: 2.0, 3: 1.0}, {1: 3.0, 2: 2.0}, {2: 2.0, 3: 1.0}, "Dilanjutkan"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_and_left_off_pyplots_list(name):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure) and not matplotlib.pyplot.get_fignums()
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        assert file.tell() > 300


def test_the_style_does_not_leak():
    before = matplotlib.rcParams["axes.spines.top"]
    FIGURES["schedule"]()
    assert matplotlib.rcParams["axes.spines.top"] == before


def test_long_captions_are_cut():
    text = cut(" ".join(["kata"] * 30), 20)
    assert text.count("\n") == 1 and text.endswith("…") and max(map(len, text.split("\n"))) <= 22


def test_each_model_has_its_point_interval_and_colour_in_all_panels():
    figure = plots.suite_points(SUITE)
    assert [axis.get_title(loc="left") for axis in figure.axes] == list(SUITE)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["text to image R@1", "image to text R@1"]
    lines = [line for axis in figure.axes for line in axis.lines]
    assert [list(line.get_xdata()) for line in lines[::2]] == [[0.45, 0.56]] * 6
    assert [list(line.get_xdata()) for line in lines[1::2]] == [[0.5]] * 2 + [[0.46]] * 2 + [[0.5]] * 2
    first, second = (line.get_color() for line in lines[1:6:4])
    assert [line.get_color() for line in lines[1::2]] == [first, first, second, second, first, second]
    assert first != second
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mini", "photo"]  # each once


def test_chance_is_a_line_in_the_panel_of_its_task():
    lines = [[line for line in axis.lines if line.get_linestyle() == "--"]
             for axis in plots.suite_points(SUITE, {"pairs": 0.25}).axes]
    assert [[list(line.get_xdata()) for line in panel] for panel in lines] == [[], [[0.25, 0.25]]]


def test_equal_curves_are_both_seen():
    first, second = plots.curves({"loop": [2, 1], "library": [2, 1]}, "step", "loss").axes[0].lines
    assert list(first.get_ydata()) == list(second.get_ydata()) == [2, 1]
    assert first.get_linewidth() > second.get_linewidth() and first.get_color() != second.get_color()


def test_unnamed_curves_have_no_legend_and_a_shade_each():
    axis = plots.curves({f"_{i}": [1.0, 2.0] for i in range(12)}, "n", "value", log=True).axes[0]
    assert axis.get_legend() is None and axis.get_yscale() == "log"
    assert len({tuple(line.get_color()) for line in axis.lines}) == 12


def test_a_piece_on_several_devices_bears_all_their_numbers():
    held = {0: (slice(0, 2), slice(None)), 4: (slice(0, 2), slice(None)), 1: (slice(2, 4), slice(None))}
    axis = plots.placements({"x": ((4, 4), held)}).axes[0]
    assert sorted(text.get_text() for text in axis.texts) == ["0, 4", "1"]
    whole = plots.placements({"x": ((4, 4), {d: (slice(None), slice(None)) for d in range(8)})})
    assert [text.get_text() for text in whole.axes[0].texts] == ["0–7"]


def test_an_exchanged_number_keeps_the_colour_of_its_device():
    before, after = np.array([[10], [20]]), np.array([[20, 30], [10, 30]])
    cells = plots.collectives({"x": (before, after)}).axes[0].patches
    first, second, *rest = [cell.get_facecolor() for cell in cells]
    assert first != second and [rest[0], rest[2]] == [second, first]
    assert rest[1] == rest[3] and rest[1] not in (first, second)


def test_similarities_with_the_same_limits_have_the_same_colours():
    meshes = [plots.similarity_matrix(rng.random((3, 3)) * size, NAMES, limits=(-0.1, 0.8)).axes[0].images[0]
              for size in (0.1, 0.7)]
    assert [mesh.get_clim() for mesh in meshes] == [(-0.1, 0.8)] * 2


def test_a_few_long_captions_do_not_stretch_the_axis_and_are_counted():
    axis = plots.caption_lengths({"nama": [2] * 999 + [40], "kata kunci": [5] * 998 + [90, 100]}).axes[0]
    assert axis.get_xlim()[1] < 8
    assert "not shown: 3 longer than 5, up to 100" in [text.get_text() for text in axis.get_legend().get_texts()]


def test_the_axis_of_lengths_includes_the_limit():
    axis = plots.caption_lengths({"nama": [2] * 999 + [40]}, limit=20).axes[0]
    assert axis.get_xlim()[1] > 21 > axis.get_lines()[0].get_xdata()[0] > 20
    assert "not shown: 1 longer than 21, up to 40" in [text.get_text() for text in axis.get_legend().get_texts()]


def test_the_attention_of_all_heads_has_one_colour_scale():
    weights = {"one": np.full(4, 0.25), "two": np.array([0.7, 0.3, 0.0, 0.0])}
    panels = plots.attention_over_picture(PICTURES[0], weights).axes[1:3]
    assert [panel.images[1].get_clim() for panel in panels] == [(0, 0.7)] * 2
    np.testing.assert_array_equal(panels[1].images[1].get_array(), [[0.7, 0.3], [0.0, 0.0]])  # row by row
