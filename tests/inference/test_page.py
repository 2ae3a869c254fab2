"""The folder of the page: whole, small, without an address of another machine, with the library's vectors and ids."""

import json
import re
import shutil

import numpy as np
import pytest
from colour_model import COLOURS, spot
from PIL import Image
from tiny import short_clip
from tokenizers import Tokenizer, normalizers

pytest.importorskip("onnx")

from clipid_utils.data.captions import write_captions  # noqa: E402
from clipid_utils.files import read_json  # noqa: E402
from clipid_utils.inference import page  # noqa: E402
from clipid_utils.inference.index import build_index  # noqa: E402
from clipid_utils.inference.page import FILES, write_page  # noqa: E402
from clipid_utils.inference.zeroshot import classifier_weights  # noqa: E402
from clipid_utils.model.pretrained.load import load_clip  # noqa: E402
from clipid_utils.model.pretrained.save import save_clip  # noqa: E402
from clipid_utils.paths import DATA  # noqa: E402

NAMES = ["kucing", "mobil merah", "bunga"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_clip(*short_clip(), folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foto")
    (folder / "dalam").mkdir()
    for number, colour in enumerate(COLOURS):
        spot(colour).resize((900, 600)).save(folder / ("dalam" if number else "") / f"{colour}.png")
    write_captions([{"image_path": "merah.png", "captions": ["kotak merah", "Kotak merah di kertas putih."],
                     "credit": "Ani, https://example.org/1", "licence": "CC0-1.0"}], folder / "captions.jsonl")
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Three labels, a cache of its own, and a registry that has the files of the libraries, with their names."""
    def fetch(name, pin, cache):
        folder = cache / name
        for member in pin["members"]:
            path = folder / "package" / member
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "fetch_npm", fetch)
        patch.setattr(page, "class_names", lambda: NAMES)
        patch.setattr(page, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def written(settings, model, pictures, tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("web") / "halaman", model, pictures)


def test_the_folder_has_all_files_and_is_small(written):
    files = {path.relative_to(written).as_posix(): path.stat().st_size for path in written.rglob("*") if path.is_file()}
    assert set(files) == {
        "index.html", "app.js", "style.css", "LICENCES.txt", "page.json",
        *(f"library/{name}" for name in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "LICENSE",
                                         "ort-wasm-simd-threaded.wasm", "tokenizers.min.mjs")),
        *(f"model/{name}" for name in ("image_encoder.onnx", "text_encoder.onnx", "tokenizer.json",
                                       "tokenizer_config.json", "preprocessor_config.json")),
        *(f"pictures/0000{row}.webp" for row in range(3)), "vectors/pictures.bin", "vectors/labels.bin"}
    assert 0 < min(files.values()) and sum(files.values()) < 1e6
    listed = read_json(written / "page.json")
    assert listed["size"] == files["model/image_encoder.onnx"] + files["model/text_encoder.onnx"]


def test_pictures_are_reduced_and_have_captions_or_paths(written):
    listed = read_json(written / "page.json")["pictures"]
    assert [picture["name"] for picture in listed] == ["dalam/biru.png", "dalam/hijau.png", "kotak merah"]
    assert listed[2]["alt"] == "Kotak merah di kertas putih." and listed[2]["licence"] == "CC0-1.0"
    assert "credit" not in listed[0] and listed[2]["credit"].startswith("Ani")
    for picture in listed:
        with Image.open(written / picture["file"]) as image:
            assert image.size == (picture["width"], picture["height"]) == (480, 320) and image.format == "WEBP"


def test_bad_records_are_left_out_with_one_warning(settings, model, pictures, tmp_path):
    """A path may begin with "./"; the others have a caption that is no list, a path that is none, and no picture."""
    shutil.copytree(pictures, tmp_path / "foto")
    lines = ['{"image_path": "./merah.png", "captions": ["kotak"], "credit": {"name": "Ani"}}',
             '{"image_path": "dalam/biru.png", "captions": "biru"}', '{"image_path": 3, "captions": ["hijau"]}', "{"]
    (tmp_path / "foto" / "captions.jsonl").write_text("\n".join(lines))
    with pytest.warns(UserWarning, match=r"3 records of .*captions.jsonl are left out .*:2: captions is 'biru'"):
        written = write_page(tmp_path / "halaman", model, tmp_path / "foto")
    listed = read_json(written / "page.json")["pictures"]
    assert [picture["name"] for picture in listed] == ["dalam/biru.png", "dalam/hijau.png", "kotak"]
    assert listed[2]["credit"] == "{'name': 'Ani'}"


def test_vectors_are_the_librarys(written, model, pictures):
    clip, processor = load_clip(model)
    expected = {"pictures": build_index(clip, processor, pictures, progress=False).embeds,
                "labels": classifier_weights(clip, processor, NAMES)}
    for name, vectors in expected.items():
        rows = np.frombuffer((written / "vectors" / f"{name}.bin").read_bytes(), np.int8).reshape(3, -1).astype(float)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        assert np.abs((rows * vectors).sum(axis=1)).min() > 0.9998
    assert read_json(written / "page.json")["scale"] == pytest.approx(float(clip.scale()))


def test_labels_are_kept_for_the_next_page(written, settings, model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "classifier_weights", None)  # a second call would fail
    again = write_page(tmp_path / "lagi", model, pictures)
    assert (again / "vectors/labels.bin").read_bytes() == (written / "vectors/labels.bin").read_bytes()


def test_all_addresses_are_relative_and_of_files_that_are_there(written):
    html, script = ((written / name).read_text(encoding="utf-8") for name in ("index.html", "app.js"))
    for text in (html, script, (written / "style.css").read_text(encoding="utf-8")):
        assert not re.search(r"""(?<!xmlns=')https?://|["'(]//|["'(]/\w""", text)
    named = re.findall(r'(?:src|href)="([^"#:]+)"', html) + re.findall(r'from "\./([^"]+)"', script)
    named += re.findall(r'(?:fetch(?:All|Json)|load)\("([^"]+)"\)', script)
    assert len(named) > 8 and all((written / name).is_file() for name in named)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    sources = {word for part in policy.split(";") for word in part.split()[1:]}
    assert sources == {"'none'", "'self'", "'wasm-unsafe-eval'", "blob:", "data:"}


def test_every_text_of_the_script_is_there_in_both_languages():
    html, script = ((FILES / name).read_text(encoding="utf-8") for name in ("index.html", "app.js"))
    texts = json.loads(re.search(r'id="texts">(.+?)</script>', html, re.DOTALL)[1])
    used = set(re.findall(r'"([a-z_]+)"', script)) & set(texts)
    assert used == set(texts)
    for key, (indonesian, english) in texts.items():
        assert re.findall(r"\{\w+\}", indonesian) == re.findall(r"\{\w+\}", english) or key in ("sorted", "huge"), key
        assert indonesian != english
    assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= set(re.findall(r'id="([\w-]+)"', html))


def test_the_script_is_one_short_file():
    lines = (FILES / "app.js").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400 and max(map(len, lines)) <= 120


def test_the_replacements_of_nmt_give_the_same_letters():
    letters = [chr(code) for code in range(1, 0x11000) if not 0xD800 <= code < 0xE000]
    stored = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "Nmt"}]}
    with_nmt, without = (Tokenizer.from_str(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": None, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    })).normalizer for normalizer in (stored, page.without_nmt(stored)))
    assert "Nmt" not in json.dumps(page.without_nmt(stored)) and isinstance(with_nmt, normalizers.Sequence)
    assert all(with_nmt.normalize_str(f"a{c}b") == without.normalize_str(f"a{c}b") for c in letters)
    assert page.without_nmt(None) is None


def test_a_folder_with_files_is_left_alone(settings, model, pictures, tmp_path):
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada/catatan.txt").write_text("penting")
    with pytest.raises(FileExistsError, match="ada exists: name a new folder"):
        write_page(tmp_path / "ada", model, pictures)
    assert [path.name for path in (tmp_path / "ada").iterdir()] == ["catatan.txt"]


def test_a_folder_without_pictures_is_named(settings, model, tmp_path):
    with pytest.raises(FileNotFoundError, match="hilang is not a folder"):
        write_page(tmp_path / "halaman", model, tmp_path / "hilang")
    (tmp_path / "kosong").mkdir()
    with pytest.raises(ValueError, match="no pictures in .*kosong"):
        write_page(tmp_path / "halaman", model, tmp_path / "kosong")
    assert not (tmp_path / "halaman").exists()


def test_an_interruption_leaves_no_half_page(settings, model, pictures, tmp_path, monkeypatch):
    def interrupted(index, folder):
        assert (folder / "model/text_encoder.onnx").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(page, "_pictures", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_page(tmp_path / "halaman", model, pictures)
    assert not list(tmp_path.iterdir())


def test_a_filter_that_the_page_lacks_is_named(settings, pictures, tmp_path):
    clip, processor = short_clip()
    processor.resample = Image.Resampling.LANCZOS
    save_clip(clip, processor, tmp_path / "model")
    with pytest.raises(ValueError, match="filter 1"):
        write_page(tmp_path / "halaman", tmp_path / "model", pictures)


def test_the_libraries_are_pinned():
    pins = read_json(DATA / "sources.json")["page"]
    assert set(pins) == {"onnxruntime-web", "@huggingface/tokenizers"}
    for pin in pins.values():
        assert pin["integrity"].startswith("sha512-") and re.fullmatch(r"\d+\.\d+\.\d+", pin["version"])
