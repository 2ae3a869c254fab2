"""Drawings and cut-out photographs as square RGB pictures on white. As a script it is a process of `drawing.draw`."""

import io
import pickle
import signal
import sys
from pathlib import Path

from PIL import Image

SIZE = 128  # pixels; more than any model of the course looks at
MARGIN = 4  # white pixels around a stamp; emoji have margins of their own


def render_svg(svg: str | Path) -> Image.Image:
    """Rasterises an SVG (its text, or its file) with resvg to RGB, SIZE x SIZE, blended onto white, centred."""
    return _centred(_resvg(svg, SIZE, background="#ffffff").convert("RGB"))


def render_png(path: Path) -> Image.Image:
    """Scales a square PNG with alpha to RGB, SIZE x SIZE, on white."""
    with Image.open(path) as image:
        return fit_on_white(image.convert("RGBA"), SIZE)


def render_stamp(path: Path) -> Image.Image:
    """Rasterises a stamp (PNG or SVG of any shape, cut out by its alpha) to RGB, SIZE x SIZE, centred on white."""
    # SVGs are drawn at twice the size, so that cropping to the drawing keeps it sharp.
    image = _resvg(path, 2 * SIZE) if path.suffix == ".svg" else Image.open(path).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        raise ValueError(f"{path}: the picture is empty (its alpha is 0 everywhere).")
    return fit_on_white(image.crop(box), SIZE - 2 * MARGIN)


def fit_on_white(image: Image.Image, side: int) -> Image.Image:
    """Blends an RGBA picture onto white, scales it (LANCZOS) to fit `side`, and centres it on SIZE x SIZE.

    Blending comes first: scaling straight alpha would let the colour of invisible pixels bleed into the edges.
    """
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    scale = side / max(flat.size)
    flat = flat.resize([max(1, round(length * scale)) for length in flat.size], Image.Resampling.LANCZOS)
    return _centred(flat)


def png_bytes(image: Image.Image) -> bytes:
    """A picture as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def is_blank(png: bytes) -> bool:
    """Whether nothing of a picture is visible on white (a white stamp)."""
    with Image.open(io.BytesIO(png)) as image:
        return min(low for low, _ in image.convert("RGB").getextrema()) > 240


def _centred(image: Image.Image) -> Image.Image:
    if image.size == (SIZE, SIZE):
        return image
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return square


def _resvg(svg: str | Path, side: int, background: str | None = None) -> Image.Image:
    import resvg_py  # only the preparation needs it, not the readers of a prepared dictionary

    source = {"svg_path": str(svg)} if isinstance(svg, Path) else {"svg_string": svg}
    # No system fonts: the fonts of a machine must not change the pictures.
    # dpi: without it, sizes in pt, cm or mm count as nothing.
    options = {"width": side, "height": side, "background": background, "skip_system_fonts": True, "dpi": 96}
    png = resvg_py.svg_to_bytes(**source, **options)
    return Image.open(io.BytesIO(bytes(png)))


def _drawn(render: str, source: str | Path) -> bytes | None:
    try:
        return png_bytes(globals()[render](source))
    except ValueError:  # empty, or not an SVG
        return None
    except BaseException as error:  # resvg's panic is not an Exception
        raise SystemExit(f"{str(source)[:200]}: {error!r}") from error


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    sys.stdout.buffer.write(pickle.dumps([_drawn(*task) for task in pickle.load(sys.stdin.buffer)]))
