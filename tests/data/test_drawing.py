"""Pictures drawn by processes: the same as in this one, in order, kept in parts, and clear errors."""

import pytest

from clipid_utils.data.dictionary import drawing
from clipid_utils.data.dictionary.drawing import draw, draw_rows
from clipid_utils.data.dictionary.rasterise import png_bytes, render_svg

CIRCLE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><circle cx="5" cy="5" r="{}" fill="{}"/></svg>'
DRAWINGS = [CIRCLE.format(radius, colour) for radius in (1, 2, 3, 4) for colour in ("red", "blue", "#123456")]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_processes_draw_the_same_pictures_in_the_same_order(monkeypatch, count):
    monkeypatch.setattr(drawing, "usable_threads", lambda: max(count, 1))
    assert draw("render_svg", DRAWINGS[: 4 * count]) == [png_bytes(render_svg(one)) for one in DRAWINGS[: 4 * count]]


def test_empty_and_broken_drawings_are_none_and_the_next_is_drawn(tmp_path):
    paths = [tmp_path / name for name in ("empty.svg", "broken.svg", "good.svg")]
    for path, text in zip(paths, (DRAWINGS[0].replace("circle", "none"), "<svg>", DRAWINGS[0]), strict=True):
        path.write_text(text)
    empty, broken, good = draw("render_stamp", paths)
    assert empty is None and broken is None and good.startswith(b"\x89PNG")


def test_a_process_that_fails_is_an_error_with_its_reason_and_keeps_nothing(tmp_path, monkeypatch):
    rows = [{"source": "a", "drawing": tmp_path / "missing.png"}]
    with pytest.raises(RuntimeError, match=r"a process that draws pictures failed: .*missing\.png.*FileNotFoundError"):
        list(draw_rows(rows, "render_png", tmp_path / "kept", "circles"))
    (tmp_path / "killed.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(drawing.rasterise, "__file__", str(tmp_path / "killed.py"))
    with pytest.raises(RuntimeError, match="a process that draws pictures failed: exit status -9"):
        draw("render_svg", DRAWINGS[:1])
    assert not (tmp_path / "kept").exists()


def test_rows_are_drawn_once_and_never_take_the_pictures_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "PART", 2)
    rows = [{"source": f"{i}", "drawing": one} for i, one in enumerate(DRAWINGS[:5])]
    drawn = list(draw_rows(rows, "render_svg", tmp_path, "circles"))
    assert [row["png"] for row in drawn] == [png_bytes(render_svg(row["drawing"])) for row in rows]
    other = list(draw_rows(rows[1:3], "render_svg", tmp_path, "circles"))
    assert other == drawn[1:3] and len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(drawing, "draw", lambda *args: pytest.fail("drawn again"))
    assert list(draw_rows(rows, "render_svg", tmp_path, "circles")) == drawn
