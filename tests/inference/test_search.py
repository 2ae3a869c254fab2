import sys

import datasets
import numpy as np
import pytest
from colour_model import COLOURS, colour_clip, spot
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from clipid_utils.inference import index as indexing
from clipid_utils.inference import search as searching


@pytest.fixture(scope="module")
def clip():
    return colour_clip()


@pytest.fixture
def folder(tmp_path):
    """Nine good pictures in two folders, and what a real folder holds besides."""
    root = tmp_path / "foto"
    (root / "dalam").mkdir(parents=True)
    for shade, colour in enumerate(list(COLOURS) * 3):
        spot(colour, shade=shade).save(root / ("dalam" if shade > 4 else "") / f"{shade}-{colour}.PNG")
    (root / "catatan.txt").write_text("bukan gambar")
    (root / ".tersembunyi.png").write_bytes(b"")
    (root / "rusak.jpg").write_bytes(b"\xff\xd8\xff bukan JPEG")
    whole = (root / "0-merah.PNG").read_bytes()
    (root / "terpotong.png").write_bytes(whole[: len(whole) // 2])
    return root


def test_a_folder_is_embedded_and_broken_pictures_are_listed(clip, folder):
    index = indexing.build_index(*clip, folder, progress=False)
    assert len(index) == 9 and "dalam/5-biru.PNG" in index.keys
    assert [key for key, _ in index.skipped] == ["rusak.jpg", "terpotong.png"]
    assert all(reason.split(":")[0] in ("UnidentifiedImageError", "OSError") for _, reason in index.skipped)
    np.testing.assert_allclose(np.linalg.norm(index.embeds, axis=1), 1, atol=1e-5)
    assert index.picture(0).size == (32, 32)


def test_queries_by_text_picture_and_both(clip, folder):
    index = indexing.build_index(*clip, folder, progress=False)

    def colours(**query):
        _, rows = searching.search(index, searching.query_embeds(*clip, **query), k=3)
        return {index.keys[row].split("-")[1] for row in rows[0]}

    assert colours(text="merah") == {"merah.PNG"}
    assert colours(image=spot("biru")) == {"biru.PNG"}
    assert colours(text="merah", image=spot("biru"), text_weight=0.8) == {"merah.PNG"}
    assert colours(text="merah", image=spot("biru"), text_weight=0.2) == {"biru.PNG"}
    assert colours(image=folder / "1-hijau.PNG") == {"hijau.PNG"}
    for weight, alone in ((1.0, {"text": "merah"}), (0.0, {"image": spot("biru")})):
        both = searching.query_embeds(*clip, text="merah", image=spot("biru"), text_weight=weight)
        np.testing.assert_allclose(both, searching.query_embeds(*clip, **alone), atol=1e-6)
        assert np.linalg.norm(both) == pytest.approx(1)


def test_query_errors(clip):
    with pytest.raises(ValueError, match="a text, an image, or both"):
        searching.query_embeds(*clip)
    with pytest.raises(ValueError, match="text_weight"):
        searching.query_embeds(*clip, text="merah", text_weight=2)


def test_an_interrupted_run_continues_and_a_second_one_embeds_nothing(clip, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "CHUNK", 3)
    cache, seen, whole = tmp_path / "cache", [], indexing.build_index(*clip, folder, progress=False)
    embed = indexing.embed_images

    def stumbling(model, processor, images, **options):
        seen.append(len(images))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return embed(model, processor, images, **options)

    monkeypatch.setattr(indexing, "embed_images", stumbling)
    with pytest.raises(KeyboardInterrupt):
        indexing.build_index(*clip, folder, cache=cache, progress=False)
    assert len(list(cache.rglob("chunk-*.npz"))) == 2 and not list(cache.rglob("*.part"))
    indexing.build_index(*clip, folder, cache=cache, progress=False)
    assert sum(seen[3:]) == 9 - sum(seen[:2])
    count = len(seen)
    again = indexing.build_index(*clip, folder, cache=cache, progress=False)
    assert len(seen) == count and again.keys == whole.keys and again.skipped == whole.skipped
    np.testing.assert_allclose(again.embeds, whole.embeds, atol=1e-6)


def test_a_changed_picture_and_another_checkpoint_are_embedded_anew(clip, folder, tmp_path):
    cache = tmp_path / "cache"
    first = indexing.build_index(*clip, folder, cache=cache, progress=False)
    spot("biru", box=(0, 0, 20, 20)).save(folder / "0-merah.PNG")
    second = indexing.build_index(*clip, folder, cache=cache, progress=False)
    changed = [not np.allclose(a, b) for a, b in zip(first.embeds, second.embeds, strict=True)]
    assert [key for key, differs in zip(first.keys, changed, strict=True) if differs] == ["0-merah.PNG"]
    other, processor = colour_clip()
    other.table[...] = other.table[...] * 2
    assert indexing.fingerprint(other, processor) != indexing.fingerprint(*clip)
    assert indexing.fingerprint(*colour_clip()) == indexing.fingerprint(*clip)


def test_a_damaged_chunk_is_made_again(clip, folder, tmp_path):
    indexing.build_index(*clip, folder, cache=tmp_path, progress=False)
    (chunk,) = tmp_path.rglob("chunk-*.npz")
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.warns(UserWarning, match="embedded again"):
        assert len(indexing.build_index(*clip, folder, cache=tmp_path, progress=False)) == 9


def test_a_dataset_is_embedded_with_its_names(clip, tmp_path):
    names = ["merah", "hijau", "biru", "merah"]
    rows = {"image": [spot(name, shade=i) for i, name in enumerate(names)], "name_id": names}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    index = indexing.build_index(*clip, dataset, cache=tmp_path, progress=False)
    assert index.labels == names and index.picture(2).getpixel((16, 16))[2] > 200
    chosen = indexing.build_index(*clip, dataset.select([2, 0]), cache=tmp_path, progress=False)
    np.testing.assert_allclose(chosen.embeds, index.embeds[[2, 0]], atol=1e-6)


def test_folders_that_hold_nothing_usable(clip, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        indexing.build_index(*clip, tmp_path / "tidak-ada")
    with pytest.raises(ValueError, match="no pictures found"):
        indexing.build_index(*clip, tmp_path)
    (tmp_path / "rusak.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of the 1 pictures"):
        indexing.build_index(*clip, tmp_path, progress=False)
    with pytest.raises(ValueError, match="2 labels for 1"):
        indexing.build_index(*clip, tmp_path, labels=["a", "b"], progress=False)


def test_pictures_are_opened_on_white_upright_and_small(tmp_path):
    clear = Image.new("RGBA", (10, 20), (0, 0, 0, 0))
    assert indexing.tidy(clear).getpixel((0, 0)) == (255, 255, 255)
    large = Image.new("RGB", (3000, 1500), "red")
    exif = large.getexif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    large.save(tmp_path / "besar.jpg", exif=exif)
    assert indexing.open_picture(tmp_path / "besar.jpg").size == (512, 1024)


def test_an_index_is_saved_and_loaded(clip, folder, tmp_path):
    index = indexing.build_index(*clip, folder, progress=False)
    indexing.save_index(index, tmp_path / "indeks.npz")
    loaded = indexing.load_index(tmp_path / "indeks.npz", source=folder, expect=indexing.fingerprint(*clip))
    np.testing.assert_array_equal(loaded.embeds, index.embeds)
    assert (loaded.keys, loaded.labels, loaded.skipped) == (index.keys, index.labels, index.skipped)
    assert loaded.picture(0).size == (32, 32)
    with pytest.raises(ValueError, match="another|not 0000"):
        indexing.load_index(tmp_path / "indeks.npz", expect="0000")
    with pytest.raises(ValueError, match="without its pictures"):
        indexing.load_index(tmp_path / "indeks.npz").picture(0)


@given(st.integers(1, 5000), st.integers(1, 5), st.integers(1, 30), st.integers(0, 10**6), st.sampled_from([700, 9999]))
@settings(max_examples=60, deadline=None)
def test_top_k_equals_a_full_sort(size, count, k, seed, block):
    rng = np.random.default_rng(seed)
    embeds, queries = rng.normal(size=(size, 8)).astype(np.float32), rng.normal(size=(count, 8)).astype(np.float32)
    scores, rows = searching.top_k(embeds, queries, k, block)
    everything = queries @ embeds.T
    expected = -np.sort(-everything, axis=1)[:, :k]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(everything, rows, 1), expected, atol=1e-5)
    assert all(len(set(row)) == min(k, size) for row in rows.tolist())


def test_equal_scores_come_in_the_order_of_the_rows():
    _, rows = searching.top_k(np.ones((6, 2), np.float32), np.ones((1, 2), np.float32), 6)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3, 4, 5]])


def test_top_k_errors():
    embeds = np.eye(4, dtype=np.float32)
    with pytest.raises((ValueError, TypeError), match="agree in E|queries"):
        searching.top_k(embeds, np.ones((1, 3), np.float32))
    with pytest.raises(ValueError, match="k must be"):
        searching.top_k(embeds, embeds, 0)
    with pytest.raises(ValueError, match="query holds a NaN"):
        searching.top_k(embeds, np.full((1, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match="similarity is NaN"):
        searching.top_k(np.where(embeds > 0, np.nan, 0).astype(np.float32), np.ones((1, 4), np.float32), 1)


def test_faiss_finds_the_same(clip):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(3000, 32)).astype(np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    index = indexing.PictureIndex(embeds, ["x"] * 3000, ["x"] * 3000, np.arange(3000), "")
    _, exact = searching.search(index, embeds[:20], 10)
    _, flat = searching.search(index, embeds[:20], 10, find=searching.faiss_flat(embeds))
    np.testing.assert_array_equal(exact, flat)
    _, graph = searching.search(index, embeds[:20], 10, find=searching.faiss_hnsw(embeds))
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, graph, strict=True)]) > 0.9


def test_a_finder_that_finds_too_few_is_an_error(clip):
    index = searching.PictureIndex(np.eye(3, 4, dtype=np.float32), list("abc"), list("abc"), np.arange(3), "")
    with pytest.raises(ValueError, match="fewer than 3 pictures"):
        searching.search(index, index.embeds[:1], 3, find=lambda queries, k: (np.ones((1, k)), np.array([[0, 1, -1]])))


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        searching.faiss_flat(np.eye(2, dtype=np.float32))


def test_results_as_a_figure_where_widgets_do_not_run(clip, folder):
    index = indexing.build_index(*clip, folder, progress=False)
    assert isinstance(searching.search_figure(index, *clip, text="merah", k=4), Figure)
    assert isinstance(searching.search_figure(index, *clip, text="merah", image=spot("biru"), k=4), Figure)
    assert isinstance(searching.search_widget(index, *clip, query="biru", k=4), Figure)


def test_the_widget_answers_and_shows_its_errors(clip, folder):
    ipywidgets = pytest.importorskip("ipywidgets")
    index = indexing.build_index(*clip, folder, progress=False)

    def draw(text, image, weight):
        if text == "gagal":
            raise ValueError("tidak bisa")
        return searching.search_figure(index, *clip, text or None, image, weight, k=3)

    box = searching._controls(ipywidgets, draw, "merah", searching._png(draw("merah", None, 1.0)))
    (text, _, _, note), results = box.children[0].children, box.children[1]
    before = results.value
    text.value = "biru"
    assert bytes(results.value) != bytes(before) and bytes(results.value[1:4]) == b"PNG" and note.value == ""
    text.value = "gagal"
    assert "tidak bisa" in note.value


def test_uploads_of_both_ipywidgets_versions(folder):
    content = memoryview((folder / "0-merah.PNG").read_bytes())
    assert searching._uploaded(()) is None and searching._uploaded({}) is None
    assert searching._uploaded(({"name": "a.png", "content": content},)).size == (32, 32)
    assert searching._uploaded({"a.png": {"content": bytes(content)}}).size == (32, 32)
