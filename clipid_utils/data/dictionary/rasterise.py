"""Drawings and cut-out photographs as square RGB pictures on white, kept in parts."""

import functools
import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import loky
import pyarrow
import pyarrow.parquet
import resvg_py
from datasets import Dataset, Features
from PIL import Image
from tqdm.auto import tqdm

from clipid_utils.files import usable_cores, whole_file

SIZE = 128  # pixels; more than any model of the course looks at
MARGIN = 4  # white pixels around a stamp; emoji have margins of their own
PART = 400  # drawings that are saved together: an interrupted run repeats at most so many
FEW = 50  # drawings that one process draws alone


def draw_rows(rows: list[dict], render: Callable[[str | Path], Image.Image], folder: Path, name: str) -> Iterator[dict]:
    """The rows with their `png`: their `drawing`, a path or the text of an SVG, drawn by one of the functions below.

    `png` is None for an empty drawing or one that cannot be drawn. The pictures are kept in `folder` in parts, so an
    interrupted run continues.
    """
    for start in tqdm(range(0, len(rows), PART), desc=f"drawing {name}"):
        part = rows[start : start + PART]
        # Named by its drawings: the same parts of other rows have other names
        named = "\n".join([render.__name__, *(row["source"] for row in part)])
        path = folder / f"{hashlib.sha256(named.encode()).hexdigest()[:12]}.parquet"
        if not path.exists():
            table = pyarrow.table({"png": pyarrow.array(_draw_all(render, [row["drawing"] for row in part]), "binary")})
            with whole_file(path) as file:
                pyarrow.parquet.write_table(table, file)
        pngs = pyarrow.parquet.read_table(path)["png"].to_pylist()
        yield from (row | {"png": png} for row, png in zip(part, pngs, strict=True))


def _draw_all(render: Callable[[str | Path], Image.Image], drawings: list[str | Path]) -> list[bytes | None]:
    """The PNGs of some drawings: many are drawn on all cores, in processes, since resvg keeps Python's lock."""
    if len(drawings) < FEW:  # starting processes would take longer
        return [draw(render, drawing) for drawing in drawings]
    pool = loky.get_reusable_executor(usable_cores())
    return list(pool.map(functools.partial(draw, render), drawings, chunksize=20))


def to_dataset(rows: list[dict], features: Features) -> Dataset:
    """Rows with a `png` as a Dataset of pictures with the other features."""
    rows = [row | {"image": {"bytes": row["png"], "path": None}} for row in rows]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)


def draw(render: Callable[[str | Path], Image.Image], drawing: str | Path) -> bytes | None:
    """The PNG of a drawing, or None if it is empty or cannot be drawn."""
    file = io.BytesIO()
    try:
        render(drawing).save(file, "PNG")
    except ValueError:
        return None
    return file.getvalue()


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


def is_blank(png: bytes) -> bool:
    """Whether nothing of a picture is visible on white (a white stamp)."""
    with Image.open(io.BytesIO(png)) as image:
        return min(low for low, _ in image.convert("RGB").getextrema()) > 240


def _centred(image: Image.Image) -> Image.Image:
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return square


def _resvg(svg: str | Path, side: int, background: str | None = None) -> Image.Image:
    source = {"svg_path": str(svg)} if isinstance(svg, Path) else {"svg_string": svg}
    # No system fonts: the fonts of a machine must not change the pictures.
    # dpi: without it, sizes in pt, cm or mm count as nothing.
    options = {"width": side, "height": side, "background": background, "skip_system_fonts": True, "dpi": 96}
    png = resvg_py.svg_to_bytes(**source, **options)
    return Image.open(io.BytesIO(bytes(png)))
