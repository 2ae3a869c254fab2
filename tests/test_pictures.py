"""Pictures of every kind: as a person sees them, reduced, cut to a square, and named when they cannot be read."""

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipid_utils.pictures import PICTURE_SUFFIXES, PictureError, decode_square, open_picture


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
    with pytest.raises(PictureError, match=r"a\.heic: not a picture .*ImportError: this needs pillow_heif, .*\[heic\]"):
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
