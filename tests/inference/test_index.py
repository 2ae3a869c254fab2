"""An index of pictures: its contents, its cache, and the file that it is saved to."""

import os
import sys

import datasets
import numpy as np
import pytest
from colour_model import colour_clip, picture_folder, spot
from PIL import Image

from clipid_utils.inference.index import build_index, fingerprint, load_index, save_index
from clipid_utils.model.processor import CLIPProcessor


@pytest.fixture(scope="module")
def clip():
    return colour_clip()


@pytest.fixture
def folder(tmp_path):
    return picture_folder(tmp_path / "foto")


@pytest.fixture
def decoded(monkeypatch):
    """The pictures that the processor decodes, the fingerprint's probe left out."""
    seen, decoder = [], CLIPProcessor.decoder

    def counting(self):
        return lambda picture: seen.append(picture) or decoder.fget(self)(picture)

    monkeypatch.setattr(CLIPProcessor, "decoder", property(counting))
    return lambda: [picture for picture in seen if getattr(picture, "size", None) != (30, 40)]


def test_a_folder_is_embedded_and_broken_pictures_are_counted(clip, folder, capsys):
    index = build_index(*clip, folder, progress=False)
    assert index.keys[:2] == ["0-merah.PNG", "1-hijau.PNG"] and index.keys[-1] == "dalam/8-biru.PNG"
    assert len(index) == 9 and index.labels == index.keys
    assert [key for key, _ in index.skipped] == ["rusak.jpg", "terpotong.png"]
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("2 of 11 pictures could not be read: rusak.jpg (")
    assert "terpotong.png (" in line and "OSError" in line
    np.testing.assert_allclose(np.linalg.norm(index.embeds, axis=1), 1, atol=1e-5)
    assert index.picture(0).size == (32, 32) and index.picture(8).getpixel((16, 16))[2] > 200


def test_the_cache_embeds_only_the_new_pictures(clip, folder, tmp_path, decoded):
    whole = build_index(*clip, str(folder), progress=False)
    count = len(decoded())
    build_index(*clip, folder, cache=tmp_path / "cache", progress=False)
    assert len(decoded()) == 2 * count == 22
    again = build_index(*clip, folder, cache=tmp_path / "cache", progress=False)
    assert [path.name for path in decoded()[22:]] == ["rusak.jpg", "terpotong.png"]  # tried again
    assert again.keys == whole.keys and again.skipped == whole.skipped
    np.testing.assert_array_equal(again.embeds, whole.embeds)
    spot("merah", shade=30).save(folder / "dalam" / "baru.png")
    assert "dalam/baru.png" in build_index(*clip, folder, cache=tmp_path / "cache", progress=False).keys
    assert [path.name for path in decoded()[24:]] == ["baru.png", "rusak.jpg", "terpotong.png"]


def test_a_changed_picture_is_embedded_again(clip, folder, tmp_path):
    first = build_index(*clip, folder, cache=tmp_path, progress=False)
    spot("biru", box=(0, 0, 20, 20)).save(folder / "0-merah.PNG")
    second = build_index(*clip, folder, cache=tmp_path, progress=False)
    changed = [key for key, a, b in zip(first.keys, first.embeds, second.embeds, strict=True) if not np.allclose(a, b)]
    assert changed == ["0-merah.PNG"]


def test_a_rewrite_of_the_same_size_is_noticed_by_its_time(clip, tmp_path):
    """A bitmap has its upper rows last: size, path and first bytes stay."""
    image, path = Image.new("RGB", (128, 128), "white"), tmp_path / "foto" / "a.bmp"
    path.parent.mkdir()
    for colour, place in (("red", 0), ("blue", 2)):
        image.paste(colour, (0, 0, 128, 40))
        image.save(path)
        os.utime(path, ns=(10**18, 10**18 + place))
        index = build_index(*clip, path.parent, cache=tmp_path / "cache", progress=False)
        assert index.embeds[0].argmax() == place


@pytest.mark.parametrize(("name", "value"), [
    ("resize", (32, 40)), ("resample", Image.Resampling.NEAREST), ("image_mean", (0.1, 0.0, 0.0)),
    ("image_std", (1.0, 1.0, 2.0)),
])
def test_every_setting_for_pictures_has_vectors_of_its_own(clip, folder, tmp_path, name, value):
    model, processor = colour_clip()
    setattr(processor, name, value)
    assert fingerprint(model, processor) != fingerprint(*clip)
    first, second = (build_index(*pair, folder, cache=tmp_path, progress=False) for pair in (clip, (model, processor)))
    assert first.fingerprint == fingerprint(*clip) and second.fingerprint == fingerprint(model, processor)
    assert len(list(tmp_path.glob("embeds-*"))) == 2


def test_a_dataset_is_embedded_with_its_names_and_known_by_its_content(clip, tmp_path, decoded):
    names = ["merah", "hijau", "biru", "merah"]
    rows = {"image": [spot(name, shade=i) for i, name in enumerate(names)], "name_id": names}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    index = build_index(*clip, dataset, cache=tmp_path, progress=False)
    assert index.labels == names and index.picture(2).getpixel((16, 16))[2] > 200 and len(decoded()) == 4
    chosen = build_index(*clip, dataset.select([2, 0]), cache=tmp_path, progress=False)
    np.testing.assert_array_equal(chosen.embeds, index.embeds[[2, 0]])
    assert len(decoded()) == 4 and chosen.labels == [names[2], names[0]] and chosen.keys == ["0", "1"]


def test_a_broken_row_of_a_dataset_is_skipped(clip, capsys):
    rows = datasets.Dataset.from_dict({"image": [{"bytes": b"x", "path": None}, spot("merah")]},
                                      features=datasets.Features(image=datasets.Image()))
    index = build_index(*clip, rows, progress=False)
    assert index.keys == ["1"] and index.labels == ["1"] and [key for key, _ in index.skipped] == ["0"]
    assert index.picture(0).size == (32, 32)
    assert "1 of 2 pictures could not be read: row 0 (" in capsys.readouterr().err


def test_folders_without_a_usable_picture(clip, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        build_index(*clip, tmp_path / "tidak-ada")
    (tmp_path / "logo.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match=r"no pictures in .*\.heic"):
        build_index(*clip, tmp_path)
    (tmp_path / "rusak.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of 1 pictures in .* can be read; the first is rusak.png: not a picture"):
        build_index(*clip, tmp_path, progress=False)


def test_heic_without_pillow_heif_says_what_to_install(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    spot("merah").save(tmp_path / "a.png")
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (_, reason), = build_index(*clip, tmp_path, progress=False).skipped
    assert "needs pillow_heif" in reason and "pip install" in reason and "[heic]" in reason


def test_heic_is_read(clip, tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    Image.new("RGB", (64, 64), (220, 20, 20)).save(tmp_path / "a.heic")
    index = build_index(*clip, tmp_path, progress=False)
    assert index.embeds[0].argmax() == 0 and index.picture(0).size == (64, 64)


def test_a_shown_picture_is_upright_and_small(clip, tmp_path):
    large = Image.new("RGB", (3000, 1500), "red")
    exif = large.getexif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    large.save(tmp_path / "besar.jpg", exif=exif)
    assert build_index(*clip, tmp_path, progress=False).picture(0).size == (512, 1024)


def test_an_index_is_saved_and_loaded(clip, folder, tmp_path):
    index = build_index(*clip, folder, progress=False)
    save_index(index, tmp_path / "indeks.npz")
    loaded = load_index(tmp_path / "indeks.npz", source=str(folder), expect=fingerprint(*clip))
    np.testing.assert_array_equal(loaded.embeds, index.embeds)
    for name in ("keys", "labels", "skipped", "fingerprint", "source"):
        assert getattr(loaded, name) == getattr(index, name), name
    assert loaded.picture(0).size == (32, 32)
    with pytest.raises(ValueError, match="made by checkpoint .*, not 0000"):
        load_index(tmp_path / "indeks.npz", expect="0000")
    with pytest.raises(ValueError, match="without its pictures"):
        load_index(tmp_path / "indeks.npz").picture(0)
