"""Drawings made in processes: the same as in this one, in order, and what happens where one fails."""

import os
import threading

import pytest

from clipid_utils.data.drawing import Drawers
from clipid_utils.data.rasterise import png_bytes, render_svg

CIRCLE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><circle cx="5" cy="5" r="{}" fill="{}"/></svg>'
SOURCES = [CIRCLE.format(radius, colour) for radius in (1, 2, 3, 4) for colour in ("red", "blue", "#123456")]


def test_what_processes_draw_is_what_this_one_draws_in_the_same_order():
    with Drawers(2) as drawers:
        assert list(drawers.map("render_svg", SOURCES)) == [png_bytes(render_svg(source)) for source in SOURCES]
        assert all(process.poll() is None for process in drawers.processes)
    assert [process.returncode for process in drawers.processes] == [0, 0]


def test_what_cannot_be_drawn_comes_back_as_its_error_and_the_next_is_drawn(tmp_path):
    empty, good = tmp_path / "empty.svg", tmp_path / "good.svg"
    empty.write_text('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"/>')
    good.write_text(SOURCES[0])
    with Drawers(1) as drawers:
        bad, drawn = drawers.map("render_stamp", [empty, good])
        assert isinstance(bad, ValueError) and "empty.svg" in str(bad)
        assert drawn.startswith(b"\x89PNG")
        with pytest.raises(FileNotFoundError, match="missing.png"):
            list(drawers.map("render_png", [tmp_path / "missing.png"]))


def test_a_process_that_dies_is_told_with_what_it_was_to_draw(tmp_path):
    pipe = tmp_path / "never.svg"
    os.mkfifo(pipe)  # whoever opens it waits
    with Drawers(1) as drawers:
        threading.Timer(1.0, drawers.processes[0].kill).start()
        with pytest.raises(RuntimeError, match="never.svg.*died"):
            list(drawers.map("render_stamp", [pipe]))
