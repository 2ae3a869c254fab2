"""The contact sheet of one search: a web page that needs no other file, or a figure."""

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from clipid_utils.files import need, whole_file
from clipid_utils.inference.index import SHOWN_SIDE, PictureIndex
from clipid_utils.inference.search import found_figure
from clipid_utils.pictures import open_picture

SIDE = 320  # the long side of a picture on the page, in pixels
PAGE = """<!doctype html>
<html lang="id">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; font-family: system-ui, sans-serif; }}
body {{ margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }}
main {{ display: grid; gap: 1.5rem 1rem; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }}
figure {{ margin: 0; }}
img {{ border-radius: .3rem; height: 11rem; object-fit: contain; width: 100%; }}
figcaption {{ font-size: .85rem; overflow-wrap: anywhere; text-align: center; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{count}</p>
<main>
{figures}
</main>
</body>
</html>
"""


def check_sheet(path: Path, folder: Path) -> None:
    """Raises an error if no sheet of a search in `folder` can be written to `path`, before the minutes of indexing."""
    suffix = path.suffix.lower()
    if suffix not in (".html", ".png"):
        raise ValueError(f"{path}: a sheet ends in .html or .png, not in {suffix!r}: change the name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: make it, or name a different file for the sheet")
    if suffix == ".png":
        if path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is inside {folder}, where the next search would find it: name a file elsewhere")
        need("matplotlib", "train")


def write_sheet(
    path: Path, index: PictureIndex, scores: Float[np.ndarray, " k"], rows: Int[np.ndarray, " k"],
    text: str | None = None, image: Path | None = None,
) -> None:
    """Writes the pictures in `rows` of the index, with their similarities, to `path`, whole or not at all.

    The query, by `text`, by `image` or by both, is the title. A name in .png gives a figure, every other name a page in
    HTML, with the pictures inside. Raises PictureError or FileNotFoundError for a picture that is not there any more.
    """
    with whole_file(path) as file:
        if path.suffix.lower() == ".png":
            found_figure(index, scores, rows, text, image).savefig(file, format="png", dpi=150)
        else:
            file.write(_page(index, scores, rows, text, image).encode(errors="replace"))  # a name may be no UTF-8


def _page(index: PictureIndex, scores: np.ndarray, rows: np.ndarray, text: str | None, image: Path | None) -> str:
    """The whole page."""
    figures = [] if image is None else [
        _figure(open_picture(image, short_side=SHOWN_SIDE), f"Gambar acuan: {image}", "Gambar acuan")]
    for place, (score, row) in enumerate(zip(scores, rows, strict=True), 1):
        label = index.labels[row]
        figures.append(_figure(index.picture(row), f"Gambar {place}: {label}", f"{score:.3f}  {label}"))
    like = "" if image is None else f"{', seperti' if text else 'Seperti'} {image.name}"
    where = f" di {index.source}" if isinstance(index.source, Path) else ""
    return PAGE.format(title=escape((text or "") + like), figures="\n".join(figures),
                       count=escape(f"{len(rows)} gambar paling cocok dari {len(index)} gambar{where}"))


def _figure(picture: Image.Image, alt: str, caption: str) -> str:
    """One picture with its caption; the picture's bytes are in the address."""
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    address = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img src="{address}" alt="{escape(alt)}"><figcaption>{escape(caption)}</figcaption></figure>'
