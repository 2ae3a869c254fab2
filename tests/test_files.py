"""Files: whole or not at all after an error or a kill, JSON lines as people save them, pictures of every kind."""

import gzip
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipid_utils import files
from clipid_utils.files import (
    PICTURE_SUFFIXES,
    PictureError,
    decode_square,
    file_identity,
    input_files,
    json_lines,
    need,
    open_picture,
    read_json,
    read_json_lines,
    whole_file,
    whole_folder,
    write_json,
    write_json_lines,
)

# Writing

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as file:
        file.write(b"old")
        assert not path.exists()
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_file(path) as file:
            file.write(b"half")
            raise error
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["a.txt"]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    for content in ("old", "new"):
        with whole_folder(tmp_path / "a") as folder:
            assert not os.listdir(folder)
            (folder / content).touch()
    assert os.listdir(tmp_path / "a") == ["new"]
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "a") as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "a") == ["new"] and os.listdir(tmp_path) == ["a"]


def test_a_kill_leaves_the_older_files_and_does_no_harm(tmp_path):
    program = f"""
import os, runpy, signal
files = runpy.run_path("{files.__file__}")  # without the package, which takes long to import
with files["whole_file"]("a.jsonl") as file, files["whole_folder"]("b") as folder:
    file.write(b"half")
    (folder / "half").touch()
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "a.jsonl").write_text("old")
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, timeout=120).returncode == -9
    left = set(os.listdir(tmp_path)) - {"a.jsonl"}
    assert len(left) == 2 and all(name.endswith(".partial") for name in left)
    assert input_files(tmp_path) == input_files(tmp_path / "a*") == [tmp_path / "a.jsonl"]
    assert (tmp_path / "a.jsonl").read_text() == "old"
    with whole_file(tmp_path / "a.jsonl") as file:
        file.write(b"new")
    assert (tmp_path / "a.jsonl").read_text() == "new"


def test_json_is_written_as_it_is_read(tmp_path):
    value = {"kucing": ["é", 1.5, None]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value and "é".encode() in (tmp_path / "a.json").read_bytes()
    write_json_lines(tmp_path / "a.jsonl", [value, {"a": "b\nc"}])
    assert list(read_json_lines(tmp_path / "a.jsonl")) == [(1, value), (2, {"a": "b\nc"})]
    with pytest.raises(UnicodeEncodeError):
        write_json_lines(tmp_path / "a.jsonl", [{}, {"a": "\ud83d"}])
    assert len(list(read_json_lines(tmp_path / "a.jsonl"))) == 2 and len(os.listdir(tmp_path)) == 2


# Reading

@pytest.mark.parametrize("content, message", [
    (b"\xef\xbb\xbf{\n\"a\": }", r"a\.json:2: not valid JSON"), (b'{"a": "\xe9"}', r"a\.json: byte 8 is not UTF-8"),
])
def test_bad_json_names_the_file_and_the_place(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_json_lines_as_people_save_them(tmp_path):
    lines = [b'{"a": 1}', b"", b"  ", b'{"a": "\\ud83d"}', b"3", b'{"a": "\xe9"}', b"[" * 200_000, b"{", b'{"a": 2}']
    content = b"\xef\xbb\xbf" + b"\r\n".join(lines)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("a.jsonl", "a.jsonl.gz"):
        found = list(json_lines(tmp_path / name))
        assert [(number, record) for number, record, _ in found] == [
            (1, {"a": 1}), (4, {"a": "\ud83d"}), (5, None), (6, None), (7, None), (8, None), (9, {"a": 2})]
        problems = [problem for _, _, problem in found]
        for problem, words in zip(problems[2:6], ("'3' is not a record", "byte 8 of the line is not UTF-8",
                                                  "JSON that cannot be read", "not valid JSON"), strict=True):
            assert words in problem
        assert problems[:2] == [None, None] and problems[6] is None
        with pytest.raises(ValueError, match=rf"^{name}:5: '3' is not a record"):
            list(read_json_lines(tmp_path / name))


@pytest.mark.parametrize("cut", [slice(0, -6), slice(5, None)])
def test_gzip_that_is_cut_off_is_a_problem_of_its_line(tmp_path, cut):
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(50)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[cut])
    *_, (_, record, problem) = json_lines(tmp_path / "a.jsonl.gz")
    assert record is None and problem.startswith("not gzip, or cut off (") and "fetch the file again" in problem


def test_inputs_are_a_file_a_folder_or_a_glob(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["b.jsonl", "a.parquet", ".hidden.jsonl", "c.jsonl.7.partial", "d.txt", "[x].jsonl"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.jsonl").mkdir()
    assert [path.name for path in input_files("~/")] == ["[x].jsonl", "a.parquet", "b.jsonl"]
    assert input_files("~/d.txt") == [tmp_path / "d.txt"]
    assert input_files(tmp_path / "[x].jsonl") == [tmp_path / "[x].jsonl"]  # a file's name before a glob
    assert [path.name for path in input_files("~/*.*")] == ["[x].jsonl", "a.parquet", "b.jsonl", "d.txt"]
    assert input_files(tmp_path, (".txt",)) == [tmp_path / "d.txt"]
    with pytest.raises(ValueError, match=r"folder\.jsonl: no file here ends in \.jsonl or \.parquet: name a file"):
        input_files(tmp_path / "folder.jsonl")
    with pytest.raises(ValueError, match="e*.txt: no such file or folder, and no file fits it as a glob: correct"):
        input_files(tmp_path / "e*.txt")


def test_a_files_identity_changes_with_its_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"a" * files.HEAD + b"b")
    os.utime(path, ns=(1, 1))
    identities = [file_identity(path)]
    assert file_identity(path) == identities[0] and len(identities[0]) == 16
    for content, time in ((b"a" * files.HEAD + b"c", 2), (b"a" * files.HEAD + b"bb", 1), (b"b" * files.HEAD + b"b", 1)):
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        identities.append(file_identity(path))
    assert len(set(identities)) == 4


def test_an_absent_dependency_is_named_with_its_extra():
    assert need("json", "train") is json
    with pytest.raises(ImportError, match=r"this needs not_there, .*: pip install .*\[train\]"):
        need("not_there", "train")


# Pictures

def encoded(image: Image.Image, kind: str, **options) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def halves(mode: str, top, bottom, size: int = 16) -> Image.Image:
    image = Image.new(mode, (size, size), top)
    image.paste(bottom, (0, size // 2, size, size))
    return image


def corners(image: Image.Image) -> list:
    return [image.getpixel((1, 1)), image.getpixel((1, image.height - 2))]


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(0, (0, 8, 16, 16))
    image.info["transparency"] = 0
    return image


RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)
KINDS = {
    "png": (encoded(halves("RGB", RED, WHITE), "PNG"), [RED, WHITE]),
    "transparent": (encoded(halves("RGBA", RED, (0, 0, 0, 0)), "PNG"), [RED, WHITE]),
    "palette": (encoded(palette_with_transparency(), "PNG", transparency=0), [RED, WHITE]),
    "gif": (encoded(palette_with_transparency(), "GIF", transparency=0), [RED, WHITE]),
    "grey": (encoded(halves("L", 0, 255), "PNG"), [(0, 0, 0), WHITE]),
    "one bit": (encoded(halves("1", 0, 1), "PNG"), [(0, 0, 0), WHITE]),
    "16 bits": (encoded(Image.fromarray(np.array([[0] * 16] * 8 + [[0x8000] * 16] * 8, np.uint16)), "PNG"),
                [(0, 0, 0), (128, 128, 128)]),
    "tiff": (encoded(halves("RGB", RED, BLUE), "TIFF"), [RED, BLUE]),
    "bmp": (encoded(halves("RGB", RED, BLUE), "BMP"), [RED, BLUE]),
    "webp": (encoded(halves("RGB", RED, BLUE), "WEBP", lossless=True), [RED, BLUE]),
    "cmyk": (encoded(halves("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), "JPEG", quality=100), [RED, WHITE]),
    "upside down": (encoded(halves("RGB", BLUE, RED), "JPEG", quality=100, exif=struct.pack(
        "<6s2sHIHHHIHHI", b"Exif\0\0", b"II", 42, 8, 1, 0x0112, 3, 1, 3, 0, 0)), [RED, BLUE]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_every_kind_are_as_a_person_sees_them(tmp_path, kind):
    content, expected = KINDS[kind]
    (tmp_path / "a.picture").write_bytes(content)
    for source, options in ((content, {}), (tmp_path / "a.picture", {}), ("a.picture", {"root": tmp_path}),
                            ({"bytes": content, "path": "gone"}, {}), (Image.open(io.BytesIO(content)), {}),
                            ({"bytes": None, "path": str(tmp_path / "a.picture")}, {"short_side": 99})):
        image = open_picture(source, **options)
        assert image.mode == "RGB" and image.size == (16, 16)
        assert np.abs(np.array(corners(image)) - expected).max() < 8, corners(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :10] = 255  # the upper left corner of the scene
    stored = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1),
              6: np.rot90(pixels), 7: pixels[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(pixels, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_picture(encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(image), pixels)
    np.testing.assert_array_equal(np.asarray(open_picture(image)), pixels)  # not turned again


@pytest.mark.parametrize("size, expected", [((300, 200), (96, 64)), ((200, 300), (64, 96)), ((64, 90), (64, 90)),
                                            ((9000, 100), (5760, 64)), ((40, 30), (40, 30))])
def test_a_larger_picture_is_reduced_to_the_short_side(size, expected):
    image = Image.new("RGB", size, RED)
    assert open_picture(encoded(image, "JPEG"), short_side=64).size == expected
    assert open_picture(image, short_side=64).size == expected


@pytest.mark.parametrize("content", [
    b"", b"\xff\xd8\xff", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"not", bytes(99), KINDS["png"][0][:60],
    encoded(Image.effect_noise((99, 99), 9), "JPEG")[:-300],
])
def test_a_broken_picture_says_why(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(PictureError, match=rf"^{path}: not a picture that can be read \(.+\)$"):
        open_picture(path)
    with pytest.raises(PictureError, match=r"^not a picture that can be read \(.+\)$") as error:
        open_picture(content)
    assert "0x" not in str(error.value)  # an address in memory, which differs from run to run


def test_a_picture_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x/a\.jpg: no such picture: correct the path"):
        open_picture("a.jpg", root=tmp_path / "x")
    with pytest.raises(PictureError, match="there is no picture"):
        open_picture({"bytes": None, "path": None})
    with pytest.raises(PictureError, match="IsADirectory"):
        open_picture(tmp_path)


def smooth(width: int, height: int) -> Image.Image:
    blocks = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def squared(image: Image.Image, size: int) -> np.ndarray:
    """The middle square as CLIP's paper code makes it: the whole picture resized, then cropped."""
    width, height = (int(side * size / min(image.size)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size))).astype(int)


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (33, 24), (24, 24), (20, 90)])
def test_a_square_is_resized_and_cropped(tmp_path, size):
    smooth(*size).save(tmp_path / "a.png")
    expected = squared(smooth(*size), 24)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        assert abs(decode_square(source, 24) - expected).max() <= 1


def test_a_large_jpeg_is_decoded_smaller(monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, *args, **options: (
        sizes.append(image.size) or resize(image, *args, **options)))
    content = encoded(smooth(400, 300), "JPEG", quality=95)
    square = decode_square(content, 70)
    assert sizes[-1] == (100, 75)  # a quarter: an eighth would be less than 70
    assert abs(square - squared(Image.open(io.BytesIO(content)), 70)).mean() < 2


@pytest.fixture
def heic(monkeypatch):
    """A HEIC file; Pillow does not know the format when the test starts."""
    pillow_heif = pytest.importorskip("pillow_heif")
    content = io.BytesIO()
    pillow_heif.from_pillow(halves("RGB", RED, BLUE, 64)).save(content, quality=90)
    for table in ("ID", "OPEN"):
        known = getattr(Image, table)
        monkeypatch.setattr(Image, table, [name for name in known if name != "HEIF"] if table == "ID" else {
            name: opener for name, opener in known.items() if name != "HEIF"})
    return content.getvalue()


@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "a.jpg"])
def test_heic_is_read_where_its_decoder_is_installed(tmp_path, heic, name):
    (tmp_path / name).write_bytes(heic)
    for source in (tmp_path / name, heic):
        image = open_picture(source)
        assert image.size == (64, 64) and np.abs(np.array(corners(image)) - [RED, BLUE]).max() < 12


def test_heic_without_its_decoder_says_what_to_install(tmp_path, heic, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(heic)
    with pytest.raises(PictureError, match=r"^.*a\.heic: a HEIC picture: this needs pillow_heif, .*\[heic\]"):
        open_picture(tmp_path / "a.heic")
    assert open_picture(KINDS["png"][0]).size == (16, 16)


def test_a_jpeg_with_a_heic_ending_needs_no_decoder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.heic", "JPEG")
    assert open_picture(tmp_path / "a.heic").size == (9, 9)


def test_every_ending_that_is_listed_can_be_read():
    assert ".svg" not in PICTURE_SUFFIXES and {".heic", ".heif", ".jpg"} <= PICTURE_SUFFIXES
    known = Image.registered_extensions()
    assert all(suffix in known for suffix in PICTURE_SUFFIXES - {".heic", ".heif"})
    assert all(Path(f"a{suffix}").suffix == suffix == suffix.lower() for suffix in PICTURE_SUFFIXES)
