"""From drawings and cut-out photographs to square RGB pictures on white."""

import io
import os
import pickle
import sys
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

SIZE = 128  # pixels; more than any model of the course looks at
MARGIN = 4  # pixels left white around a stamp; emoji bring their own margins


def render_svg(svg: str | Path) -> Image.Image:
    """Rasterises one SVG (its text, or its file) to RGB, SIZE x SIZE, blended onto white by resvg, centred."""
    return _centred(_resvg(svg, SIZE, background="#ffffff").convert("RGB"))


def render_png(path: Path) -> Image.Image:
    """Scales a square PNG with alpha to RGB, SIZE x SIZE, on white."""
    with Image.open(path) as image:
        return fit_on_white(image.convert("RGBA"), SIZE)


def render_stamp(path: Path) -> Image.Image:
    """Rasterises a stamp (PNG or SVG of any shape, cut out by its alpha) to RGB, SIZE x SIZE, centred on white."""
    # Twice the size for SVGs, so that cropping to what is drawn does not cost sharpness.
    image = _resvg(path, 2 * SIZE) if path.suffix == ".svg" else Image.open(path).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        raise ValueError(f"{path}: the picture is empty (its alpha is 0 everywhere).")
    return fit_on_white(image.crop(box), SIZE - 2 * MARGIN)


def fit_on_white(image: Image.Image, side: int) -> Image.Image:
    """Blends an RGBA picture onto white, then scales it (LANCZOS) to fit `side` and centres it on SIZE x SIZE.

    Blending comes first: scaling straight alpha would let the colour of invisible pixels bleed into the edges.
    """
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    scale = side / max(flat.size)
    flat = flat.resize([max(1, round(length * scale)) for length in flat.size], Image.Resampling.LANCZOS)
    return _centred(flat)


def png_bytes(image: Image.Image) -> bytes:
    """Encodes a picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pixels(png: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes PNG bytes to RGB pixels."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def _centred(image: Image.Image) -> Image.Image:
    if image.size == (SIZE, SIZE):
        return image
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return square


def _resvg(svg: str | Path, side: int, background: str | None = None) -> Image.Image:
    import resvg_py  # only the preparation needs it, not the readers of a prepared dictionary

    source = {"svg_path": str(svg)} if isinstance(svg, Path) else {"svg_string": svg}
    # No system fonts: what a machine has installed must not change the pictures.
    # dpi: without one, sizes in pt, cm or mm count as nothing.
    options = {"width": side, "height": side, "background": background, "skip_system_fonts": True, "dpi": 96}
    png = resvg_py.svg_to_bytes(**source, **options)
    return Image.open(io.BytesIO(bytes(png)))


def _serve() -> None:
    """A process of `drawing.Drawers`: draws what comes on standard input, until that closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else is printed goes to standard error
    while True:
        try:
            render, source = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            drawn = png_bytes(globals()[render](source))
        except (ValueError, OSError) as error:
            drawn = error
        except BaseException as error:  # a panic of resvg's is no Exception
            drawn = RuntimeError(f"{str(source)[:200]}: {error!r}")
        pickle.dump(drawn, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
