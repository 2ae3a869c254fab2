"""The contact sheet: a page in HTML with the pictures inside, and a figure."""

import base64
import dataclasses
import io
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from colour_model import colour_clip, picture_folder, spot
from PIL import Image

from clipid_utils.inference.index import build_index
from clipid_utils.inference.sheet import SIDE, check_sheet, write_sheet
from clipid_utils.pictures import PictureError

SCORES = np.array([0.5, 0.25], np.float32)
NASTY = '"><script>alert(1)</script> & {x} $x^$'


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build_index(*colour_clip(), picture_folder(tmp_path_factory.mktemp("sheet") / "foto"), progress=False)


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text inside each kind of element."""

    def __init__(self, path):
        super().__init__()
        self.found, self.texts, self.inside = [], {}, []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.inside == [], "an element that is not closed"

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        if self.inside and data.strip():
            self.texts.setdefault(self.inside[-1], []).append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def opened(address: str) -> Image.Image:
    start, _, data = address.partition(",")
    assert start == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert picture.format == "JPEG"
    return picture


def test_a_page_has_the_query_and_the_pictures_with_paths_and_scores(index, tmp_path):
    rows = np.array([2, 0])
    write_sheet(tmp_path / "a.HTML", index, SCORES, rows, "buah biru")
    page = Page(tmp_path / "a.HTML")
    assert page.all("html") == [{"lang": "id"}] and {"charset": "utf-8"} in page.all("meta")
    assert page.texts["title"] == page.texts["h1"] == ["buah biru"]
    assert page.texts["p"] == [f"2 gambar paling cocok dari {len(index)} gambar di {index.source}"]
    assert page.texts["figcaption"] == [f"0.500  {index.keys[2]}", f"0.250  {index.keys[0]}"]
    assert [image["alt"] for image in page.all("img")] == [f"Gambar 1: {index.keys[2]}", f"Gambar 2: {index.keys[0]}"]
    for image, row in zip(page.all("img"), rows, strict=True):
        shown = np.asarray(opened(image["src"])).astype(int)
        assert np.abs(shown - np.asarray(index.picture(row)).astype(int)).mean() < 8


def test_a_page_needs_no_other_file_and_no_network(index, tmp_path):
    write_sheet(tmp_path / "a.html", index, SCORES, np.array([0, 1]), "merah")
    page = Page(tmp_path / "a.html")
    assert not {"link", "script", "iframe", "a"} & {tag for tag, _ in page.found}
    assert all(image["src"].startswith("data:") for image in page.all("img"))
    style = "".join(page.texts["style"])
    assert "url(" not in style and "@import" not in style
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_large_pictures_are_reduced_and_small_ones_are_not_enlarged(tmp_path):
    folder = tmp_path / "foto"
    folder.mkdir()
    Image.new("RGB", (3000, 600), "red").save(folder / "a.jpg")
    Image.new("L", (20, 30)).save(folder / "b.png")
    index = build_index(*colour_clip(), folder, progress=False)
    write_sheet(tmp_path / "a.html", index, SCORES, np.array([0, 1]), "merah")
    sizes = [opened(image["src"]).size for image in Page(tmp_path / "a.html").all("img")]
    assert sizes == [(SIDE, SIDE // 5), (20, 30)]


def test_names_and_queries_are_escaped(index, tmp_path):
    index = dataclasses.replace(index, labels=[NASTY] * len(index))
    write_sheet(tmp_path / "a.html", index, SCORES, np.array([0, 1]), NASTY)
    page = Page(tmp_path / "a.html")
    assert not page.all("script") and page.texts["h1"] == page.texts["title"] == [NASTY]
    assert page.texts["figcaption"][0] == f"0.500  {NASTY}" and page.all("img")[0]["alt"] == f"Gambar 1: {NASTY}"


def test_a_name_that_is_no_utf8_can_be_shown(index, tmp_path):
    index = dataclasses.replace(index, labels=["a\udcff.jpg"] * len(index))
    write_sheet(tmp_path / "a.html", index, SCORES, np.array([0, 1]), "merah")
    assert Page(tmp_path / "a.html").texts["figcaption"] == ["0.500  a?.jpg", "0.250  a?.jpg"]


@pytest.mark.parametrize("text, title", [(None, "Seperti <b>.png"), ("merah", "merah, seperti <b>.png")])
def test_the_picture_of_the_query_comes_first(text, title, index, tmp_path):
    spot("hijau").save(tmp_path / "<b>.png")
    write_sheet(tmp_path / "a.html", index, SCORES, np.array([0, 2]), text, tmp_path / "<b>.png")
    page = Page(tmp_path / "a.html")
    assert page.texts["h1"] == [title] and page.texts["figcaption"][0] == "Gambar acuan" and len(page.all("img")) == 3
    red, green, blue = opened(page.all("img")[0]["src"]).getpixel((16, 16))
    assert green > red + 100 and green > blue + 100


def test_a_figure_has_the_same_pictures(index, tmp_path):
    for rows in ([0, 3], [1, 4]):  # two red, two green
        write_sheet(tmp_path / "a.PNG", index, SCORES, np.array(rows), "merah $x^$")
        with Image.open(tmp_path / "a.PNG") as figure:
            red, green, _ = np.asarray(figure.convert("RGB")).astype(int).mean(axis=(0, 1))
        assert figure.format == "PNG" and (red > green) == (rows[0] == 0)


@pytest.mark.parametrize("name", ["a.html", "a.png"])
def test_a_sheet_is_written_whole_or_not_at_all(name, tmp_path):
    folder = tmp_path / "foto"
    folder.mkdir()
    for colour in ("merah", "hijau"):
        spot(colour).save(folder / f"{colour}.png")
    index = build_index(*colour_clip(), folder, progress=False)
    write_sheet(tmp_path / name, index, SCORES, np.array([0, 1]), "merah")
    before = (tmp_path / name).read_bytes()
    (folder / "merah.png").write_bytes(b"broken since")
    with pytest.raises(PictureError, match="merah.png"):
        write_sheet(tmp_path / name, index, SCORES, np.array([0, 1]), "hijau")
    assert (tmp_path / name).read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_places_where_no_sheet_can_be(tmp_path, monkeypatch):
    folder = tmp_path / "foto"
    for name, message in (("a.pdf", r"a\.pdf: a sheet ends in \.html or \.png, not in '\.pdf'"), ("a", "not in ''"),
                          ("foto/dalam/../a.PNG", "inside .*foto, where the next search would find it")):
        (folder / "dalam").mkdir(parents=True, exist_ok=True)
        with pytest.raises(ValueError, match=message):
            check_sheet(tmp_path / name, folder)
    with pytest.raises(FileNotFoundError, match="no is not a folder: make it"):
        check_sheet(tmp_path / "no" / "a.html", folder)
    for name in ("foto/a.html", "a.png", "a.HTML"):
        check_sheet(tmp_path / name, folder)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    check_sheet(tmp_path / "a.html", folder)
    with pytest.raises(ImportError, match=r"needs matplotlib.*\[train\]"):
        check_sheet(tmp_path / "a.png", folder)
