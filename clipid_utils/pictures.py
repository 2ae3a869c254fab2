"""From a picture file to upright RGB pixels, for training data and for the model's processor alike."""

import io
import os

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

# The seven ways to hold a camera other than upright, by EXIF orientation, and how to turn such a picture upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a person sees it: RGB, upright, on white where transparent.

    An RGB picture is left alone. What transformers' CLIPImageProcessor does otherwise, in each case losing the picture:
    - EXIF orientation: it stays on its side there and is turned upright here;
    - 16-bit greys: all above 255 is white there; here 65535 is white (in mode I: the largest value, if above 65535);
    - transparent: its older versions show the colour that was hidden, mostly black; white here and in its newer ones.
    """
    image.load()  # some formats know their orientation and transparency only then
    if turn := TURNS.get(image.getexif().get(ExifTags.Base.Orientation)):
        image = image.transpose(turn)
        for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
            image.info.pop(key, None)  # lest it be turned again
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits (mode I;16) or of up to 32 (mode I, which holds 8-bit pictures too), brought to 8."""
    values = np.asarray(image).astype(np.int64)  # of this machine's byte order: numpy 2.1 dies of others below
    top = max(65535, int(values.max())) if image.mode != "I" or values.max() > 255 else 255
    values = np.where(values == image.info.get("transparency", -1), top, values).clip(0)
    return Image.fromarray((values * (255 / top) + 0.5).astype(np.uint8))


def decode_square(file: str | os.PathLike | bytes, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The middle square of a picture file, its short side brought to `size` pixels (bicubic), as CLIP does.

    What the processor makes of the same picture, to a rounding: here only the square is resized. A JPEG of at least
    twice the size is decoded at 1/2, 1/4 or 1/8 of its own, the least that is not below `size`, which is several times
    faster; its pixels then differ by a few levels. Raises what Pillow raises for a file that is no picture.
    """
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        image.draft(None, (size, size))
        image = to_rgb(image)
    width, height = (int(side * size / min(image.size)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
