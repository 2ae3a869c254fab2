"""Finds the proper nouns of an Indonesian caption, by an averaged perceptron (Collins 2002).

scripts/train_propn.py trains it on UD_Indonesian-GSD; the measured figures are in data/propn.json.
"""

import functools
import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float

from clipid_utils.paths import DATA

MODEL = DATA / "propn.npz"
SLOTS = 1 << 16  # weights; the slot of a feature is its CRC-32 modulo this, so no list of features is stored
WORDS = re.compile(r"\w+(?:[-'’.]\w+)*", re.UNICODE)  # anak-anak, 2.500, Ma'ruf and U.S are one word each
PREFIXES = ("me", "mem", "men", "meng", "meny", "ber", "di", "ter", "ke", "pe", "pem", "pen", "peng", "per", "se")
SUFFIXES = ("kan", "nya", "an", "i", "lah", "kah", "pun", "ku", "mu", "isme", "asi", "wan", "man")


def split_words(caption: str) -> list[str]:
    """The words of a caption, without its punctuation."""
    return WORDS.findall(caption)


def capitals(words: Sequence[str], i: int) -> list[str]:
    """Features of the shapes of a word and of its neighbours.

    Each feature also names the writing style of the whole text: in a text without capitals, or with a capital on every
    word, a capital says nothing.
    """
    manner = writing(words)
    before, after = (shape(words[j]) if 0 <= j < len(words) else "." for j in (i - 1, i + 1))
    own = shape(words[i])
    return [f"{manner}{own}", f"{manner}{own}{i == 0}", f"{manner}{before}<{own}", f"{manner}{own}>{after}",
            f"{manner}{before}<{own}>{after}"]


def spelling(words: Sequence[str], i: int) -> list[str]:
    """Features of the word itself in lower case: the word, its first and last letters, its affixes."""
    word = words[i].lower()
    found = [f"w={word}", *(f"p={word[:n]}" for n in range(1, 5)), *(f"s={word[-n:]}" for n in range(1, 5))]
    prefix = max((p for p in PREFIXES if word.startswith(p) and len(word) > len(p) + 2), key=len, default="")
    suffix = max((s for s in SUFFIXES if word.endswith(s) and len(word) > len(s) + 2), key=len, default="")
    return [*found, f"a={prefix}-{suffix}", f"n={min(len(word), 10)}", f"sw={shape(words[i])}{word}"]


PARTS = (capitals, spelling)


def writing(words: Sequence[str]) -> str:
    """The writing style of a text: "l" without capitals, "U" all in capitals, "T" with one on each long word, else
    "m"."""
    long = [word for word in words if len(word) > 3 and word[0].isalpha()] or words
    if not any(word != word.lower() for word in words):
        return "l"
    if all(word == word.upper() for word in long):
        return "U"
    return "T" if all(word[0] != word[0].lower() for word in long) else "m"


def shape(word: str) -> str:
    """The shape of a word in few letters: "Xx" for Bali, "X" for TNI, "xXx" for iPhone, "x" for kucing, "0" for 17."""
    letters = re.sub(r"\d+", "0", re.sub(r"[^\W\d_]", lambda m: "x" if m[0] == m[0].lower() else "X", word))
    return re.sub(r"([xX])\1+", r"\1", letters)[:6]


class Tagger:
    """Finds the proper nouns among the words of a text."""

    def __init__(self, weights: Float[np.ndarray, " slots"], parts: tuple[Callable, ...] = PARTS):
        self.weights, self.parts = weights, parts
        self._list = weights.tolist()  # Python's numbers are faster, one by one

    def tag(self, words: Sequence[str]) -> list[bool]:
        """Whether each of the words, in the order of the text and with its capitals, is a proper noun.

        The tags are decided from left to right; each depends on the tag before it.
        """
        tags, before, weights = [], False, self._list
        for features, *after in encode(words, self.parts):
            before = sum([weights[s] for s in features]) + sum([weights[s] for s in after[before]]) > 0
            tags.append(before)
        return tags

    def share(self, caption: str) -> float:
        """The share of proper nouns among the words of a caption, 0.0 if it has no words."""
        words = split_words(caption)
        return sum(self.tag(words)) / len(words) if words else 0.0


@functools.lru_cache(1)
def load_tagger(path: os.PathLike = MODEL) -> Tagger:
    """The shipped tagger, or one that scripts/train_propn.py wrote."""
    with np.load(path) as stored:
        weights = np.zeros(SLOTS, np.float32)
        weights[stored["slots"]] = stored["weights"]
    return Tagger(weights)


def encode(words: Sequence[str], parts: Iterable[Callable]) -> list[tuple[list[int], list[int], list[int]]]:
    """For each word three lists of slots: its features; the tag before it, if that is False; and if it is True."""
    return [
        ([slot(f"{part.__name__}{text}") for part in parts for text in part(words, i)],
         *([slot(f"after{tag}"), slot(f"after{tag}{shape(word)}"), slot(f"after{tag}{word.lower()[-3:]}")]
           for tag in (False, True)))
        for i, word in enumerate(words)
    ]


def slot(text: str) -> int:
    """The slot of a feature."""
    return zlib.crc32(text.encode()) % SLOTS
