"""Picture search: queries, exact and approximate search, and the search box."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
from colour_model import colour_clip, picture_folder, spot
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from clipid_utils.inference import search as searching
from clipid_utils.inference.index import build_index


@pytest.fixture(scope="module")
def clip():
    return colour_clip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("search") / "foto")


@pytest.fixture(scope="module")
def index(clip, folder):
    return build_index(*clip, folder, progress=False)


def test_queries_by_text_picture_and_both(clip, folder, index):
    def colours(**query):
        vector = searching.query_embeds(*clip, **query)
        assert np.linalg.norm(vector) == pytest.approx(1)
        _, rows = searching.search(index, vector, k=3)
        return {index.keys[row].split("-")[1] for row in rows[0]}

    assert colours(text="merah") == {"merah.PNG"}
    assert colours(image=spot("biru")) == {"biru.PNG"}
    assert colours(text="merah", image=spot("biru"), text_weight=0.8) == {"merah.PNG"}
    assert colours(text="merah", image=spot("biru"), text_weight=0.2) == {"biru.PNG"}
    assert colours(image=folder / "1-hijau.PNG") == colours(image=str(folder / "1-hijau.PNG")) == {"hijau.PNG"}


def test_a_query_by_both_is_the_unit_vector_of_the_weighted_sum(clip):
    text, image = (searching.query_embeds(*clip, **one) for one in ({"text": "merah"}, {"image": spot("biru")}))
    for weight in (0.0, 0.3, 1.0):
        both = searching.query_embeds(*clip, "merah", spot("biru"), weight)
        expected = weight * text + (1 - weight) * image
        np.testing.assert_allclose(both, expected / np.linalg.norm(expected), atol=1e-6)
    np.testing.assert_array_equal(searching.query_embeds(*clip, "merah", spot("biru")),
                                  searching.query_embeds(*clip, "merah", spot("biru"), 0.5))


def test_a_query_picture_has_the_pixels_of_the_index(clip, index):
    """A large picture, too: neither side is reduced before the processor gets it."""
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    expected = clip[0].encode_image(clip[1](images=[picture])["pixel_values"])
    np.testing.assert_allclose(searching.query_embeds(*clip, image=picture), expected, atol=1e-6)


@pytest.mark.parametrize(("query", "message"), [
    ({}, "a text, an image, or both"), ({"text": "merah", "text_weight": 2}, "text_weight"),
    ({"text": "merah", "text_weight": -0.1}, "text_weight"), ({"text": " "}, "the query is empty"),
    ({"text": "merah \udcff"}, r"'merah \\udcff' is not valid Unicode"),
])
def test_query_errors(clip, query, message):
    with pytest.raises(ValueError, match=message):
        searching.query_embeds(*clip, **query)


def test_a_query_that_the_tokenizer_does_not_know_warns(clip, recwarn):
    searching.query_embeds(*clip, text="merah 🐈")
    assert not recwarn
    with pytest.warns(UserWarning, match="knows no part of '🐈 xyz'"):
        searching.query_embeds(*clip, text="🐈 xyz")


@given(st.integers(1, 5000), st.integers(1, 5), st.integers(1, 30), st.integers(0, 10**6), st.sampled_from([700, 9999]))
@settings(max_examples=60, deadline=None)
def test_top_k_equals_a_full_sort(size, count, k, seed, block):
    rng = np.random.default_rng(seed)
    embeds, queries = rng.normal(size=(size, 8)).astype(np.float32), rng.normal(size=(count, 8)).astype(np.float32)
    with mock.patch.object(searching, "BLOCK", block):
        scores, rows = searching.top_k(embeds, queries, k)
    everything = queries @ embeds.T
    expected = -np.sort(-everything, axis=1)[:, :k]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(everything, rows, 1), expected, atol=1e-5)
    assert all(len(set(row)) == min(k, size) for row in rows.tolist())


def test_top_k_of_negative_scores():
    """The last group of a block is not full: its missing places must not count as 0."""
    rng = np.random.default_rng(0)
    embeds, queries = -rng.random((2500, 8), np.float32), rng.random((3, 8), np.float32)
    scores, _ = searching.top_k(embeds, queries, 20)
    np.testing.assert_allclose(scores, -np.sort(-(queries @ embeds.T), axis=1)[:, :20], atol=1e-6)


def test_equal_scores_come_in_the_order_of_the_rows():
    _, rows = searching.top_k(np.ones((6, 2), np.float32), np.ones((1, 2), np.float32), 6)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3, 4, 5]])


def test_top_k_errors():
    embeds = np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match="k must be"):
        searching.top_k(embeds, embeds, 0)
    with pytest.raises(ValueError, match="similarity is NaN"):
        searching.top_k(embeds, np.full((1, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match="similarity is NaN"):
        searching.top_k(np.where(embeds > 0, np.nan, 0).astype(np.float32), np.ones((1, 4), np.float32), 1)


def test_k_is_at_most_the_size_of_the_index(index):
    asked = []

    def find(queries, k):
        asked.append(k)
        return searching.top_k(index.embeds, queries, k)

    for finder in (None, find):
        scores, rows = searching.search(index, index.embeds[:1], 50, find=finder)
        assert scores.shape == rows.shape == (1, len(index))
    assert asked == [len(index)]


def test_a_finder_that_finds_too_few_is_an_error(index):
    with pytest.raises(ValueError, match="fewer than 3 pictures"):
        searching.search(index, index.embeds[:1], 3, find=lambda *_: (np.ones((1, 3)), np.array([[0, 1, -1]])))


def test_results_as_a_figure_where_widgets_do_not_run(clip, index):
    figure = searching.search_figure(index, *clip, text="merah", image=spot("biru"), text_weight=0.2, k=3, columns=2)
    assert isinstance(figure, Figure) and len(figure.axes) == 4
    titles = [axis.get_title() for axis in figure.axes]
    assert all("biru.PNG" in title for title in titles[1:])  # at 0.5 it would be merah
    assert isinstance(searching.search_widget(index, *clip, query="biru", k=4), Figure)


def test_a_dollar_in_a_figure_is_no_formula(clip, index):
    labels = [f"$x^$ {label}" for label in index.labels]
    scores, rows = np.ones(2, np.float32), np.array([0, 1])
    figure = searching.found_figure(dataclasses.replace(index, labels=labels), scores, rows, "merah $x^$")
    assert searching._png(figure)  # to draw a broken formula is an error
    assert all(axis.title.get_text().count(r"\$") == 2 for axis in figure.axes)


def test_the_widget_answers_and_shows_its_warnings_and_errors(clip, index):
    ipywidgets = pytest.importorskip("ipywidgets")

    def draw(text, image, weight):
        return searching.search_figure(index, *clip, text, image, weight, k=3)

    box = searching._controls(ipywidgets, draw, "merah", searching._png(draw("merah", None, 1.0)))
    (text, _, _, note), results = box.children[0].children, box.children[1]
    before = results.value
    text.value = "biru"
    assert bytes(results.value) != bytes(before) and bytes(results.value[1:4]) == b"PNG" and note.value == ""
    text.value = "🐈"
    assert "knows no part" in note.value
    text.value = ""
    assert note.value == 'Gagal: the query is empty: write what the picture shows, for example "kucing tidur"'


def test_uploads_of_both_ipywidgets_versions(folder):
    content = memoryview((folder / "0-merah.PNG").read_bytes())
    assert searching._uploaded(()) is None and searching._uploaded({}) is None
    assert searching._uploaded(({"name": "a.png", "content": content},)).size == (32, 32)
    assert searching._uploaded({"a.png": {"content": bytes(content)}}).size == (32, 32)
