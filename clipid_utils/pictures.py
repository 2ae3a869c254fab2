"""Pictures of any kind: opened as a person sees them, and resized to the square that a model needs.

This is the only code of its kind in the library, so that a broken, turned or transparent picture is handled once.
"""

import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from clipid_utils.files import need

PICTURE_SUFFIXES = frozenset(".jpg .jpeg .png .webp .gif .bmp .tif .tiff .avif .heic .heif".split())
HEIC_KINDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # after "ftyp", at byte 8 of a file


class PictureError(ValueError):
    """A picture that cannot be read; the message says why, and what to do."""


def open_picture(
    source: str | os.PathLike | bytes | dict | Image.Image, *, short_side: int | None = None,
    root: str | os.PathLike | None = None, draft: int | None = None,
) -> Image.Image:
    """A picture of any kind as a person sees it: RGB, upright, on white where transparent (`to_rgb`).

    `source` is a path (a relative one starts at `root`), the bytes of a file, {"bytes", "path"} as `datasets` stores
    pictures, or an open picture. With `short_side`, a larger picture is reduced to it. With `draft`, a JPEG file may be
    decoded at 1/2, 1/4 or 1/8 of its size, at least `draft` pixels, which is several times faster. Raises PictureError
    for anything that cannot be decoded to its end, FileNotFoundError for a missing file.
    """
    source = picture_source(source)
    if source is None:
        raise PictureError("there is no picture, only a null: give its path or its bytes")
    if not isinstance(source, bytes | Image.Image):
        source = Path(root or "", os.path.expanduser(source))
        if not source.exists():
            raise FileNotFoundError(f"{source}: no such picture: correct the path")
    try:
        if isinstance(source, Image.Image):
            return reduce_picture(to_rgb(source), short_side)
        with _opened(source) as image:
            if draft := draft or 2 * (short_side or 0):
                image.draft(None, (draft, draft))
            return reduce_picture(to_rgb(image), short_side)
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, …
        name = f"{source}: " if isinstance(source, Path) else ""
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):  # its text has the name again, or an address in memory
            reason = "its format is not known"
        raise PictureError(f"{name}not a picture that can be read ({reason})") from error


def picture_source(picture: object) -> object:
    """The bytes or the path of a picture that `datasets` stores as {"bytes", "path"}; a different one as it is."""
    if isinstance(picture, dict):
        return picture["bytes"] if picture.get("bytes") is not None else picture.get("path")
    return picture


def _opened(source: Path | bytes) -> Image.Image:
    """Pillow's picture. Its HEIC decoder, a package of its own, is only loaded for a HEIC file."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as opened:
            head = opened.read(12)
        if head[4:8] != b"ftyp" or head[8:12] not in HEIC_KINDS:
            raise
        need("pillow_heif", "heic").register_heif_opener()
        return Image.open(file)


def reduce_picture(image: Image.Image, short_side: int | None) -> Image.Image:
    """The picture with its short side at most `short_side` pixels."""
    if not short_side or min(image.size) <= short_side:
        return image
    size = [max(1, round(side * short_side / min(image.size))) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)


# The seven EXIF orientations other than upright, and the turn that makes such a picture upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a person sees it: RGB, upright, on white where transparent.

    An RGB picture stays as it is. Three differences from transformers' CLIPImageProcessor, which loses the picture:
    - EXIF orientation: there the picture stays on its side, here it is turned upright;
    - 16-bit greys: there all above 255 is white, here 65535 is white (in mode I: the largest value, if above 65535);
    - transparent: its older versions show the hidden colour, mostly black; here, and in its newer versions, white.
    """
    image.load()  # some formats know their orientation and transparency only then
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:  # to flip it is number 0
        image = image.transpose(turn)
        for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
            image.info.pop(key, None)  # otherwise it would be turned again
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits (mode I;16) or of up to 32 (mode I, which also has 8-bit pictures), as 8 bits."""
    values = np.asarray(image).astype(np.int64)  # in this machine's byte order: numpy 2.1 crashes with others below
    top = max(65535, int(values.max())) if image.mode != "I" or values.max() > 255 else 255
    values = np.where(values == image.info.get("transparency", -1), top, values).clip(0)
    return Image.fromarray((values * (255 / top) + 0.5).astype(np.uint8))


MAX_PIXELS = 2**24  # of a picture on its way to a square


def decode_square(
    file: str | os.PathLike | bytes | dict | Image.Image, size: int, *, resize: int | tuple[int, int] | None = None,
    resample: int = Image.Resampling.BICUBIC,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The middle square of a picture after its short side is resized to `size` pixels, like CLIP.

    `resize` is a different length for the short side, or the (height, width) to which the picture is stretched, as for
    ViT; where that is less than `size`, the rest is black. An open RGB picture gives the same bytes as transformers'
    CLIPImageProcessor. A file gives them to one level, since only the square is resized; if it is a JPEG of at least
    twice the size, it is decoded at a fraction of its size, and pixels can differ by a few levels. Raises the errors of
    `open_picture`.
    """
    resize = size if resize is None else resize
    image = open_picture(file, draft=resize if isinstance(resize, int) else max(resize))
    if isinstance(resize, int):
        width, height = (int(side * resize / min(image.size)) for side in image.size)
    else:
        height, width = resize
    left, top = (width - size) // 2, (height - size) // 2
    whole = isinstance(file, Image.Image) and width * height <= MAX_PIXELS
    if whole or left < 0 or top < 0:
        return np.asarray(image.resize((width, height), resample).crop((left, top, left + size, top + size)))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return np.asarray(image.resize((size, size), resample, box=box))
