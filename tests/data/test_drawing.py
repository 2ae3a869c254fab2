"""Drawings made in processes: the same as in this one, in order, and what happens where one fails."""

import io
import os
import pickle
import subprocess
import sys
import threading

import pytest

from clipid_utils.data.dictionary.drawing import Drawers
from clipid_utils.data.dictionary.rasterise import png_bytes, render_svg

CIRCLE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><circle cx="5" cy="5" r="{}" fill="{}"/></svg>'
SOURCES = [CIRCLE.format(radius, colour) for radius in (1, 2, 3, 4) for colour in ("red", "blue", "#123456")]


def test_what_processes_draw_is_what_this_one_draws_in_the_same_order():
    with Drawers(2) as drawers:
        assert list(drawers.map("render_svg", SOURCES)) == [png_bytes(render_svg(source)) for source in SOURCES]
        assert 1 <= len(drawers.processes) <= 2 and all(process.poll() is None for process in drawers.processes)
    assert {process.returncode for process in drawers.processes} == {0}


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe that nobody writes to")
def test_a_process_that_dies_is_told_with_what_it_was_to_draw_and_another_takes_its_place(tmp_path):
    pipe = tmp_path / "never.svg"
    os.mkfifo(pipe)  # whoever opens it waits
    with Drawers(1) as drawers:
        list(drawers.map("render_svg", SOURCES[:1]))
        threading.Timer(0.5, drawers.processes[0].kill).start()
        with pytest.raises(RuntimeError, match="never.svg.*died"):
            list(drawers.map("render_stamp", [pipe]))
        assert list(drawers.map("render_svg", SOURCES[:1])) == [png_bytes(render_svg(SOURCES[0]))]
        drawers.processes[-1].kill()
        drawers.processes[-1].wait()
        with pytest.raises(RuntimeError, match="circle.*died"):
            list(drawers.map("render_svg", SOURCES[:1]))
    assert all(process.returncode is not None for process in drawers.processes)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe that nobody writes to")
def test_an_interrupt_does_not_wait_for_a_drawing(tmp_path):
    pipe = tmp_path / "never.svg"
    os.mkfifo(pipe)
    with pytest.raises(KeyboardInterrupt), Drawers(2) as drawers:
        drawers.map("render_stamp", [pipe, pipe])
        raise KeyboardInterrupt
    assert all(process.returncode is not None for process in drawers.processes)


def test_a_panic_is_an_error_and_prints_do_not_disturb():
    """`_serve` in a process of its own; a function that prints and one that raises what is no Exception."""
    code = ("import pickle, sys; from clipid_utils.data import rasterise as r\n"
            "def noisy(source): print('noise'); return r.render_svg(source)\n"
            "def panic(source): raise SystemExit('resvg panics')\n"
            "r.noisy, r.panic = noisy, panic; r._serve()")
    asked = b"".join(pickle.dumps(question) for question in (("noisy", SOURCES[0]), ("panic", "a.svg")))
    done = subprocess.run([sys.executable, "-c", code], input=asked, capture_output=True, check=True)
    answers = io.BytesIO(done.stdout)
    assert pickle.load(answers) == png_bytes(render_svg(SOURCES[0]))
    error = pickle.load(answers)
    assert isinstance(error, RuntimeError) and "a.svg" in str(error) and "resvg panics" in str(error)
    assert b"noise" in done.stderr
