"""Captions as training sees them: drawn anew for each picture and epoch from its name and its keywords."""

import re

import numpy as np

from clipid_utils.wording import fill, load_wording

# How often a caption is the name alone, keywords alone, the name with keywords, or the name in a template.
CAPTION_SHARES = {"name": 0.4, "keywords": 0.1, "both": 0.2, "template": 0.3}
TEMPLATES = (*load_wording()["plain"], *load_wording()["templates"])  # without and with a classifier
# What a mirrored picture would make untrue: left and right, the points of the compass, the way a clock turns.
SIDES = re.compile(r"\b(kiri|kanan|timur|barat|tenggara|jarum jam|left|right|east|west|clockwise)\b", re.IGNORECASE)


def sample_caption(
    name: str, keywords: list[str], rng: np.random.Generator, group: str | None = None, templates=TEMPLATES
) -> str:
    """Draws one caption for a picture: what training sees.

    By CAPTION_SHARES it is the name ("kucing"), two to four keywords in any order ("peliharaan, hewan"), the name with
    one to three keywords ("kucing, hewan"), or the name in one of `templates` ("gambar kucing", "foto seekor kucing":
    `group`, the English slug, helps to choose the classifier). A picture with fewer than two keywords takes the name
    where its turn is keywords alone (one word, such as "bendera", would fit too many others), one with none takes it in
    place of both. Raises ValueError where the name is empty.
    """
    name = " ".join(name.split())
    if not name:
        raise ValueError("empty caption: the picture's name is empty; leave the picture out or name it.")
    form = str(rng.choice(list(CAPTION_SHARES), p=list(CAPTION_SHARES.values())))
    if form == "template":
        return fill(templates[rng.integers(len(templates))], name, group)
    if form == "keywords" and len(keywords) >= 2:
        return ", ".join(draw(keywords, int(rng.integers(2, 5)), rng))
    if form == "both" and keywords:
        return ", ".join([name, *draw(keywords, int(rng.integers(1, 4)), rng)])
    return name


def draw(keywords: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """At most `count` different keywords in a random order."""
    return [keywords[i] for i in rng.permutation(len(keywords))[:count]]


def flip_allowed(name: str, keywords: list[str], has_text: bool) -> bool:
    """Whether a picture may be mirrored in training: not where its caption says kiri or kanan (or another word of
    SIDES), and not where it holds letters, digits or anything else that reads wrong in a mirror (`has_text`)."""
    return not has_text and not any(SIDES.search(text) for text in (name, *keywords))
