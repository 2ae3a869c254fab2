"""The callbacks of the page in the browser, and the page itself without a browser."""

import io
import socket

import numpy as np
import pytest
from colour_model import colour_clip, picture_folder, spot
from PIL import Image

gr = pytest.importorskip("gradio")

from clipid_utils.inference import demo  # noqa: E402
from clipid_utils.inference.index import build_index  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("demo") / "foto")


@pytest.fixture(scope="module")
def answers(folder):
    clip = colour_clip()
    return demo.Answers(build_index(*clip, folder, progress=False), *clip)


@pytest.fixture(scope="module")
def dropped(tmp_path_factory):
    """A picture of one colour, as gradio gives it to a callback."""
    def drop(colour: str) -> dict:
        path = tmp_path_factory.mktemp("dropped") / f"{colour}.png"
        spot(colour).save(path)
        return {"path": str(path), "meta": {"_type": "gradio.FileData"}}

    return drop


def captions(gallery: gr.Gallery) -> list[str]:
    return [item["caption"] for item in gallery.value]


def test_search_by_text_picture_and_both(answers, dropped):
    red = answers.find(" merah ", None, 0.7, 3)
    assert red.label == "Hasil untuk “merah”" and len(captions(red)) == 3
    assert all(caption.endswith("merah.PNG") and caption.startswith("0,9") for caption in captions(red))
    blue = answers.find("", dropped("biru"), 0.7, 3)
    assert blue.label == "Hasil untuk gambar" and all(caption.endswith("biru.PNG") for caption in captions(blue))
    for weight, colour in ((0.8, "merah"), (0.2, "biru")):
        both = answers.refresh("merah", dropped("biru"), weight, 2)
        assert both.label == "Hasil untuk “merah” dan gambar"
        assert all(caption.endswith(f"{colour}.PNG") for caption in captions(both)) and len(captions(both)) == 2


def test_a_slider_without_a_query_changes_nothing(answers, recwarn):
    assert answers.refresh(" ", None, 0.5, 12) == gr.skip()
    assert not recwarn


def test_mistakes_are_messages(answers, dropped, tmp_path):
    broken = tmp_path / "rusak.jpg"
    broken.write_bytes(b"\xff\xd8\xff no picture")
    broken, red = {"path": str(broken)}, dropped("merah")
    for answer, message in (
        (lambda: answers.find(" ", None, 0.7, 12), "Tulis kata yang dicari"),
        (lambda: answers.find("merah", broken, 0.7, 12), "tidak dapat dibaca"),
        (lambda: answers.label(None, ""), "Letakkan sebuah gambar dulu"),
        (lambda: answers.label(broken, "merah, biru"), "tidak dapat dibaca"),
        (lambda: answers.label(red, "merah, ,merah,"), "dua label"),
        (lambda: answers.heat(red, " ", demo.OCCLUSION), "tulis frasanya"),
        (lambda: answers.heat(None, "merah", demo.OCCLUSION), "tulis frasanya"),
        (lambda: answers.heat(broken, "merah", demo.PATCHES), "tidak dapat dibaca"),
    ):
        with pytest.warns(UserWarning, match=message):
            assert answer() == gr.skip()


def test_a_query_that_the_model_does_not_know_has_results_and_a_message(answers):
    with pytest.warns(UserWarning, match="Model tidak mengenal “xyz”"):
        assert len(captions(answers.find("xyz", None, 0.7, 4))) == 4


def test_labels_of_the_user(answers, dropped):
    chances = answers.label(dropped("hijau"), "merah, hijau ,biru,")
    assert list(chances) == ["merah", "hijau", "biru"] and max(chances, key=chances.get) == "hijau"
    assert sum(chances.values()) == pytest.approx(1)


def test_class_names_are_encoded_once(answers, dropped, monkeypatch):
    names = ["ikan", "merah", "hewan", "biru", "buah"]
    monkeypatch.setattr(demo, "class_names", lambda: names)
    monkeypatch.setattr(demo, "PART", 2)
    chances = answers.label(dropped("biru"), "")
    assert list(chances) == names and max(chances, key=chances.get) == "biru"
    monkeypatch.setattr(demo, "classifier_weights", None)  # a second call would fail
    chances = answers.label(dropped("merah"), " , ")
    assert max(chances, key=chances.get) == "merah"


def test_the_class_names_are_those_of_the_file():
    names = demo.class_names()
    assert len(names) == len(set(names)) == 1000 and names[1] == "ikan mas koki"


@pytest.mark.parametrize("way", [demo.OCCLUSION, demo.PATCHES])
def test_heat_maps_show_the_square_with_the_map_over_it(answers, tmp_path, way):
    wide = Image.new("RGB", (64, 32), "white")
    wide.paste(spot("merah", (0, 0, 8, 8)), (16, 0))  # the middle square has the red in its corner
    wide.save(tmp_path / "lebar.png")
    figure = answers.heat({"path": str(tmp_path / "lebar.png")}, "merah", way)
    picture, overlay = (axis.get_images() for axis in figure.axes[:2])
    height, width = picture[0].get_array().shape[:2]
    assert height == width >= demo.SHOWN_SIDE and figure.axes[1].get_title() == "merah"
    assert tuple(picture[0].get_array()[5, 5]) != (255, 255, 255)  # red
    heat = np.asarray(overlay[1].get_array())
    assert heat.shape == (4, 4) and np.unravel_index(heat.argmax(), heat.shape) == (0, 0)
    figure.savefig(io.BytesIO(), format="png")


def test_the_page_answers_on_this_machine_only(answers):
    page = demo.build(answers.index, answers.model, answers.processor)
    assert page.analytics_enabled is False
    texts = str(page.get_config_file())
    assert "9 gambar dapat dicari" in texts and all(query in texts for query in demo.QUERIES)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, **demo.LOOK)
        assert page.local_url == f"http://127.0.0.1:{port}/"
    finally:
        page.close(verbose=False)


def test_a_port_that_is_taken_is_named(monkeypatch, folder, answers):
    monkeypatch.setattr(demo, "load_clip", lambda name: (answers.model, answers.processor))
    monkeypatch.setattr(demo, "build_index", lambda *_, **options: answers.index)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} .* --port"):
            demo.serve(folder, model="mini", port=port)
