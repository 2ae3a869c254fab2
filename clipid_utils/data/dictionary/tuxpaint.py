"""Tux Paint's stamps: cut-out photographs and drawings with captions that people translated."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from clipid_utils.data.dictionary.artists import look_up

FLAT_SHARE = 0.5  # a drawing has at least this share: see stamp_kind


def read_stamps(package: Path, groups: dict, kinds: dict) -> list[dict]:
    """The rows of all stamps with an Indonesian caption: without the picture, but with `drawing`, its path.

    Left out are stamps without an `id.utf8=` line, or with one that equals the English caption (not translated), and a
    PNG beside an SVG of the same name (the same drawing, unless the SVG needs fonts).
    """
    folder = next(package.rglob("tuxpaint/stamps"))
    stamps = []
    for path in sorted([*folder.rglob("*.svg"), *folder.rglob("*.png")]):
        english, indonesian = read_captions(path.with_suffix(".txt"))
        svg = _text(path.with_suffix(".svg"))
        use_svg = svg != "" and ("<path" in svg or "<text" not in svg)  # text alone depends on the machine's fonts
        if use_svg != (path.suffix == ".svg") or not english or indonesian in ("", english):
            continue
        source = path.relative_to(folder).as_posix()
        group = look_up(groups["tuxpaint"], source)
        stamps.append({
            "source": source, "drawing": path, "group": group, "kind": stamp_kind(path, source, kinds),
            "concept": "tuxpaint:" + re.sub(r"\W+", "-", english.lower()).strip("-"),
            "name_id": as_name(indonesian, english), "keywords_id": [],
            "name_en": as_name(english, english), "keywords_en": [],
            "has_text": group in ("letters", "flags") or "nomirror" in _text(path.with_suffix(".dat")).split(),
        })
    return stamps


def read_captions(path: Path) -> tuple[str, ...]:
    """The captions in a stamp's .txt: English (its first line) and Indonesian, "" if missing; no final punctuation."""
    lines = _text(path).splitlines()
    indonesian = [line.partition("=")[2] for line in lines if line.startswith("id.utf8=")]
    return tuple(" ".join(" ".join(found).split()).rstrip(".,;: ") for found in (lines[:1], indonesian[-1:]))


def as_name(caption: str, english: str) -> str:
    """A caption with a small first letter, like the names of emoji, if the English one begins with an article.

    "Kucing putih" for "A white kitten" -> "kucing putih". Names stay: "Neptunus" for "Neptune", "VW".
    """
    common = re.match(r"(A|An|The) ", english) and not caption[1:2].isupper()
    return caption[0].lower() + caption[1:] if common else caption


def stamp_kind(path: Path, source: str, kinds: dict) -> str:
    """ "photograph" or "drawing". The package does not say. A rule decides, with corrections by eye in
    data/stamp_kinds.json.

    SVGs, files in a folder `cartoon`, and symbols other than coins are drawings. Another PNG is a photograph if less
    than FLAT_SHARE of its pairs of neighbouring opaque pixels have exactly the same colour: a camera leaves noise
    everywhere, a drawing has areas of one colour.
    """
    for kind, listed in kinds.items():
        if source in listed:
            return kind
    parts = Path(source).parts
    symbol = parts[0] == "symbols" and "coins" not in parts and "japanese" not in parts
    if path.suffix == ".svg" or "cartoon" in parts or symbol:
        return "drawing"
    return "drawing" if flat_share(Image.open(path)) >= FLAT_SHARE else "photograph"


def flat_share(image: Image.Image) -> float:
    """The share of horizontal pairs of opaque pixels with exactly the same colour; 1.0 if nothing is opaque."""
    rgba = np.asarray(image.convert("RGBA"))  # [H, W, 4]
    opaque = rgba[..., 3] > 250
    pairs = opaque[:, 1:] & opaque[:, :-1]
    equal = (rgba[:, 1:, :3] == rgba[:, :-1, :3]).all(-1)
    return float(equal[pairs].mean()) if pairs.any() else 1.0


def _text(path: Path) -> str:
    """The text of a file, "" if there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
