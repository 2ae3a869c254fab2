"""Minimal pairs in Indonesian: a picture with a right and a wrong caption that differ in one thing, such as kiri/kanan.

All words are in `data/minimal_pairs.jsonl`, one contrast a line: `captions` are two, and the first is true of the first
of `pictures`, the second of the second. So a contrast of two pictures gives two pairs, in which each caption is right
once: a model that reads the captions without looking is right in half of the pairs. A contrast of one picture (the
phenomenon "classifier") gives one pair, whose first caption is right. `halves` name a part of the phenomenon for each
picture: "register" sets a colloquial caption against a formal one. `cluster` is the contrast's key where the line names
none. A picture is a layout of drawings, named by their emoji, or a photograph, named by its file:

    {"one": "🐈"}                               one drawing
    {"row": ["🐈", "🐕"], "sizes": [1, 0.5]}    side by side, from the left
    {"column": ["🍎", "🍌"]}                    one above the other, from the top
    {"scatter": "🐈", "count": 3}               the same drawing several times
    {"on": ["🐒", "🐘"]}                        the first stands on the second
    {"overlap": ["📦", "⚽"], "front": 0}        the first covers a part of the second; with 1, the second of the first
    {"pull": ["🚜", "🚗"]}                       the first, on the left, is tied to the second with a rope
    {"photo": "cow"}                            a photograph of `foto contoh`

`turn` turns the hues of the drawings by degrees, and `mirrored` mirrors a photograph.
"""

from collections.abc import Callable, Iterator
from functools import cache as remember
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageOps

from clipid_utils.data import photographs
from clipid_utils.data.dictionary.artists import concept_id
from clipid_utils.data.dictionary.build import load_picture_dictionary
from clipid_utils.data.dictionary.fetch import FetchError
from clipid_utils.data.dictionary.splits import UNSEEN_ARTIST, share
from clipid_utils.files import json_lines
from clipid_utils.paths import DATA

FILE = DATA / "minimal_pairs.jsonl"
FEATURES = Features({
    "image": Image(mode="RGB"), "right": Value("string"), "wrong": Value("string"), "phenomenon": Value("string"),
    "key": Value("string"), "cluster": Value("string"), "source": Value("string"),
})  # fmt: skip
SIDE = 256  # pixels of a composed picture
GROUND = 190  # where the drawings of a row stand
ALONE, BESIDE, SCATTERED, STACKED, COVERING, TIED = 220, 116, 76, 126, 160, 104  # the long sides of drawings
WHITE = 20  # pixels with less ink, of 255, are background where white reaches them from outside
ROPE = "#7a5230"

Number = int | float
Placed = list[tuple[PillowImage.Image, Number, Number]]  # drawings from back to front, each with its left and top


def load_minimal_pairs(cache: Path | None = None) -> Dataset:
    """The minimal pairs, in the order of their file; each call makes the same pairs again, in a few seconds.

    Columns: FEATURES. `key` names a pair and stays when others are added; pairs that share a drawing or a photograph
    within a phenomenon have the same `cluster`, so that a bootstrap can draw clusters. `source` is "noto", whose
    drawings no shipped model was trained on, or "foto-contoh". The right caption is colloquial in
    "register/colloquial", formal in "register/formal": their mean is for the content, their difference for the
    register. Needs the picture dictionary and the sample photographs, which the first call fetches. Contrasts whose
    photographs are missing are left out, and each call then prints one line. Raises ValueError that names the line,
    FetchError if the dictionary is not available.
    """
    unseen = load_picture_dictionary(cache)["unseen_artist"]
    rows, photos = dict(zip(unseen["concept"], range(len(unseen)), strict=True)), _photographs(cache)

    @remember
    def drawing(emoji: str) -> PillowImage.Image:
        concept = concept_id("-".join(f"{ord(character):x}" for character in emoji))
        if concept not in rows:
            raise ValueError(f"the split unseen_artist has no {emoji} ({concept}): take another drawing")
        return _trim(unseen[rows[concept]]["image"])

    pairs, missing = [], 0
    for number, line, problem in json_lines(FILE):
        if problem:
            raise ValueError(f"{FILE}:{number}: {problem}")
        if any(picture.get("photo", "") not in photos for picture in line["pictures"]):
            missing += 1
            continue
        try:
            pairs += _pairs(line, drawing, photos)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{FILE}:{number}: {error}: correct the line") from None
    if missing:
        print(f"The minimal pairs lack {missing} contrasts: their photographs are not here.")
    return Dataset.from_list(pairs, features=FEATURES)


def _photographs(cache: Path | None) -> dict[str, str]:
    """The path of each photograph that is there, by the name of its file; "" stands for a composed picture."""
    try:
        images = photographs.load_sample_photographs(cache).cast_column("image", Image(decode=False))["image"]
    except FetchError as error:
        print(error)
        images = []
    return {"": ""} | {Path(image["path"]).stem: image["path"] for image in images}


def _pairs(line: dict, drawing: Callable[[str], PillowImage.Image], photos: dict[str, str]) -> Iterator[dict]:
    first, second = line["captions"]
    for place, picture in enumerate(line["pictures"]):
        right, wrong = (second, first) if place else (first, second)
        path = photos[picture.get("photo", "")]
        if picture.get("mirrored"):
            image = ImageOps.mirror(PillowImage.open(path).convert("RGB"))
        else:
            image = path or compose(picture, drawing, line["key"])
        half = f"/{line['halves'][place]}" if "halves" in line else ""
        yield {"image": image, "right": right, "wrong": wrong, "phenomenon": line["phenomenon"] + half,
               "key": f"{line['phenomenon']}/{line['key']}/{place + 1}", "cluster": line.get("cluster", line["key"]),
               "source": photographs.NAME if path else UNSEEN_ARTIST}


def compose(picture: dict, drawing: Callable[[str], PillowImage.Image], key: str = "") -> PillowImage.Image:
    """Draws a layout of drawings on white: RGB, SIDE x SIDE. `drawing` gives the drawing of an emoji, trimmed.

    `key` decides the places of a scatter. Raises ValueError for an unknown layout.
    """
    layout = next((name for name in LAYOUTS if name in picture), None)
    if layout is None:
        raise ValueError(f"no layout among {', '.join(picture)}: use one of {', '.join(LAYOUTS)}")
    names = [picture[layout]] if isinstance(picture[layout], str) else picture[layout]
    turns = picture.get("turn", [0] * len(names))
    things = []
    for name, turn in zip(names, [turns] if isinstance(turns, int) else turns, strict=True):
        things.append(_turn(drawing(name), turn) if turn else drawing(name))
    canvas = PillowImage.new("RGB", (SIDE, SIDE), "white")
    for thing, left, top in LAYOUTS[layout](things, picture, key):
        canvas.paste(thing, (round(left), round(top)), thing if thing.mode == "RGBA" else None)
    if layout == "pull":
        ImageDraw.Draw(canvas).line([(TIED, GROUND - 22), (SIDE - TIED, GROUND - 22)], ROPE, 5)
    return canvas


# Layouts: from the drawings and the line's settings to the places

def _one(things: list[PillowImage.Image], picture: dict, key: str) -> Placed:
    return [_centred(_fit(things[0], ALONE), SIDE / 2, SIDE / 2)]


def _row(things: list[PillowImage.Image], picture: dict, key: str) -> Placed:
    fitted = [_fit(thing, BESIDE * size)
              for thing, size in zip(things, picture.get("sizes", [1] * len(things)), strict=True)]
    return [(thing, SIDE * (place + 0.5) / len(things) - thing.width / 2, GROUND - thing.height)
            for place, thing in enumerate(fitted)]


def _column(things: list[PillowImage.Image], picture: dict, key: str) -> Placed:
    return [_centred(_fit(thing, BESIDE), SIDE / 2, SIDE * (place + 0.5) / len(things))
            for place, thing in enumerate(things)]


def _scatter(things: list[PillowImage.Image], picture: dict, key: str) -> Placed:
    """In cells of 3 x 3 that the key draws, so that a number has no fixed pattern."""
    cells = sorted(range(9), key=lambda cell: share(f"{key} {cell}"))[: picture["count"]]
    return [_centred(_fit(things[0], SCATTERED), SIDE * (cell % 3 + 0.5) / 3, SIDE * (cell // 3 + 0.5) / 3)
            for cell in cells]


def _on(things: list[PillowImage.Image], picture: dict, key: str) -> Placed:
    """The first is let down on the second until they touch."""
    upper, lower = (_fit(_cut_out(thing), STACKED) for thing in things)
    left, below = (SIDE - upper.width) // 2, (SIDE - lower.width) // 2
    columns = range(max(left, below), min(left + upper.width, below + lower.width))
    feet, backs = np.asarray(upper)[..., 3] > 127, np.asarray(lower)[..., 3] > 127
    gaps = [backs[:, x - below].argmax() + feet[::-1, x - left].argmax() for x in columns
            if backs[:, x - below].any() and feet[:, x - left].any()]
    touch = min(gaps) + 5 - upper.height  # of the upper one's top, from the lower one's
    top = (SIDE - (lower.height - touch)) / 2 - touch
    return [(lower, below, top), (upper, left, top + touch)]


def _overlap(things: list[PillowImage.Image], picture: dict, key: str) -> Placed:
    first, second = (_fit(_cut_out(thing), COVERING) for thing in things)
    placed = [_centred(first, 96, 156), _centred(second, 160, 100)]
    return placed[::-1] if picture["front"] == 0 else placed


def _pull(things: list[PillowImage.Image], picture: dict, key: str) -> Placed:
    first, second = (_fit(thing, TIED) for thing in things)
    return [(first, TIED - first.width, GROUND - first.height), (second, SIDE - TIED, GROUND - second.height)]


LAYOUTS = {"one": _one, "row": _row, "column": _column, "scatter": _scatter, "on": _on, "overlap": _overlap,
           "pull": _pull}


# Drawings

def _centred(image: PillowImage.Image, x: Number, y: Number) -> tuple[PillowImage.Image, Number, Number]:
    return image, x - image.width / 2, y - image.height / 2


def _trim(image: PillowImage.Image) -> PillowImage.Image:
    """Without the white margins."""
    return image.crop(_ink(image).point(lambda value: 255 * (value > 8)).getbbox())


def _ink(image: PillowImage.Image) -> PillowImage.Image:
    return ImageOps.invert(image.convert("L"))


def _fit(image: PillowImage.Image, side: Number) -> PillowImage.Image:
    scale = side / max(image.size)
    return image.resize([max(1, round(length * scale)) for length in image.size], PillowImage.Resampling.LANCZOS)


def _turn(image: PillowImage.Image, degrees: int) -> PillowImage.Image:
    """With all hues turned: white, grey and black stay."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point(lambda level: (level + round(degrees * 256 / 360)) % 256)
    return PillowImage.merge("HSV", (hue, saturation, value)).convert("RGB")


def _cut_out(image: PillowImage.Image) -> PillowImage.Image:
    """RGBA, transparent where white reaches the edge."""
    background = _ink(image).point(lambda value: 255 * (value < WHITE))
    background = ImageOps.expand(background, 1, 255)
    ImageDraw.floodfill(background, (0, 0), 127)
    alpha = background.crop((1, 1, image.width + 1, image.height + 1)).point(lambda value: 255 * (value != 127))
    return PillowImage.merge("RGBA", (*image.split(), alpha))
