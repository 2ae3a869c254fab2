"""Drawings become pictures in their order, are kept in parts, and the errors are clear."""

import pytest

from clipid_utils.data.dictionary import rasterise
from clipid_utils.data.dictionary.rasterise import draw, draw_rows, render_png, render_stamp, render_svg

CIRCLE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10"><circle cx="5" cy="5" r="{}" fill="{}"/></svg>'
DRAWINGS = [CIRCLE.format(radius, colour) for radius in (1, 2, 3, 4) for colour in ("red", "blue", "#123456")]


def test_empty_and_broken_drawings_are_none(tmp_path):
    paths = [tmp_path / name for name in ("empty.svg", "broken.svg", "good.svg")]
    for path, text in zip(paths, (DRAWINGS[0].replace("circle", "none"), "<svg>", DRAWINGS[0]), strict=True):
        path.write_text(text)
    empty, broken, good = (draw(render_stamp, path) for path in paths)
    assert empty is None and broken is None and good.startswith(b"\x89PNG")


def test_a_missing_drawing_is_an_error_and_keeps_nothing(tmp_path):
    rows = [{"source": "a", "drawing": tmp_path / "missing.png"}]
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        list(draw_rows(rows, render_png, tmp_path / "kept", "circles"))
    assert not (tmp_path / "kept").exists()


def test_rows_are_drawn_once_and_never_take_the_pictures_of_others(tmp_path, monkeypatch):
    monkeypatch.setattr(rasterise, "PART", 2)
    rows = [{"source": f"{i}", "drawing": one} for i, one in enumerate(DRAWINGS[:5])]
    drawn = list(draw_rows(rows, render_svg, tmp_path, "circles"))
    assert [row["png"] for row in drawn] == [draw(render_svg, row["drawing"]) for row in rows]
    other = list(draw_rows(rows[1:3], render_svg, tmp_path, "circles"))
    assert other == drawn[1:3] and len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(rasterise, "draw", lambda *args: pytest.fail("drawn again"))
    assert list(draw_rows(rows, render_svg, tmp_path, "circles")) == drawn
