"""Which words of an Indonesian caption are proper nouns: an averaged perceptron (Collins 2002), trained on
UD_Indonesian-GSD by scripts/train_propn.py; its measured figures stand in data/propn.json."""

import functools
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from clipid_utils.paths import DATA

MODEL = DATA / "propn.npz"
SLOTS = 1 << 16  # of weights; a feature's is its CRC-32 modulo this, so that no list of features is kept
WORDS = re.compile(r"\w+(?:[-'’.]\w+)*", re.UNICODE)  # anak-anak, 2.500, Ma'ruf and U.S are one word each
PREFIXES = ("me", "mem", "men", "meng", "meny", "ber", "di", "ter", "ke", "pe", "pem", "pen", "peng", "per", "se")
SUFFIXES = ("kan", "nya", "an", "i", "lah", "kah", "pun", "ku", "mu", "isme", "asi", "wan", "man")


def split_words(caption: str) -> list[str]:
    """The words of a caption, without its punctuation."""
    return WORDS.findall(caption)


def capitals(words: Sequence[str], i: int) -> list[str]:
    """Features of the capital letters and the shape of a word and of its neighbours, beside how the whole is written.

    In a text without capitals, or with one on every word, a capital says nothing: hence the manner in each feature.
    """
    manner = writing(words)
    before, after = (shape(words[j]) if 0 <= j < len(words) else "." for j in (i - 1, i + 1))
    own = shape(words[i])
    return [f"{manner}{own}", f"{manner}{own}{i == 0}", f"{manner}{before}<{own}", f"{manner}{own}>{after}",
            f"{manner}{before}<{own}>{after}"]


def spelling(words: Sequence[str], i: int) -> list[str]:
    """Features of the word itself, in small letters: the word, its first and last letters, its affixes."""
    word = words[i].lower()
    found = [f"w={word}", *(f"p={word[:n]}" for n in range(1, 5)), *(f"s={word[-n:]}" for n in range(1, 5))]
    prefix = max((p for p in PREFIXES if word.startswith(p) and len(word) > len(p) + 2), key=len, default="")
    suffix = max((s for s in SUFFIXES if word.endswith(s) and len(word) > len(s) + 2), key=len, default="")
    return [*found, f"a={prefix}-{suffix}", f"n={min(len(word), 10)}", f"sw={shape(words[i])}{word}"]


PARTS = (capitals, spelling)


def writing(words: Sequence[str]) -> str:
    """How a text is written: "l" without a capital, "U" in capitals alone, "T" with one on each long word, else "m"."""
    long = [word for word in words if len(word) > 3 and word[0].isalpha()] or words
    if not any(word != word.lower() for word in words):
        return "l"
    if all(word == word.upper() for word in long):
        return "U"
    return "T" if all(word[0] != word[0].lower() for word in long) else "m"


def shape(word: str) -> str:
    """The shape of a word in few letters: "Xx" for Bali, "X" for TNI, "xX" for iPhone, "x" for kucing, "0" for 17."""
    letters = re.sub(r"\d+", "0", re.sub(r"[^\W\d_]", lambda m: "x" if m[0] == m[0].lower() else "X", word))
    return re.sub(r"([xX])\1+", r"\1", letters)[:6]


@dataclass(frozen=True)
class Tagger:
    """Tells the proper nouns among the words of a text."""

    weights: Float[np.ndarray, " slots"]
    parts: tuple[Callable, ...] = PARTS
    _list: list[float] = field(init=False, repr=False)  # numbers of Python: each is looked up alone

    def __post_init__(self):
        object.__setattr__(self, "_list", self.weights.astype(np.float64).tolist())

    def tag(self, words: Sequence[str]) -> list[bool]:
        """Whether each of the words, in the order of the text and with its capitals, is a proper noun."""
        return decide(encode(words, self.parts), self._list)

    def share(self, caption: str) -> float:
        """The share of proper nouns among the words of a caption; 0.0 where it has no word."""
        words = split_words(caption)
        return sum(self.tag(words)) / len(words) if words else 0.0


@functools.lru_cache(1)
def load_tagger(path: os.PathLike = MODEL) -> Tagger:
    """The shipped tagger, or another that `save_tagger` wrote."""
    with np.load(path) as stored:
        weights = np.zeros(SLOTS, np.float32)
        weights[stored["slots"]] = stored["weights"]
    return Tagger(weights)


def save_tagger(tagger: Tagger, path: os.PathLike = MODEL) -> None:
    """Writes the weights that are not 0, in half precision; `parts` are not written: they are to be PARTS."""
    slots = np.flatnonzero(tagger.weights.astype(np.float16))
    np.savez_compressed(path, slots=slots.astype(np.uint16), weights=tagger.weights[slots].astype(np.float16))


def encode(words: Sequence[str], parts: Iterable[Callable]) -> list[tuple[list[int], list[int], list[int]]]:
    """For each word the slots of its features, and those of the tag before it: where that is none, where it is one."""
    return [
        ([slot(f"{part.__name__}{text}") for part in parts for text in part(words, i)],
         *([slot(f"after{tag}"), slot(f"after{tag}{shape(word)}"), slot(f"after{tag}{word.lower()[-3:]}")]
           for tag in (False, True)))
        for i, word in enumerate(words)
    ]


def slot(text: str) -> int:
    """The place of a feature's weight."""
    return zlib.crc32(text.encode()) % SLOTS


def decide(encoded: list[tuple], weights: list[float]) -> list[bool]:
    """The tags from left to right, each beside the one before it."""
    tags, before = [], False
    for features, *after in encoded:
        before = sum([weights[s] for s in features]) + sum([weights[s] for s in after[before]]) > 0
        tags.append(before)
    return tags


def train(
    sentences: Sequence[tuple[Sequence[str], Sequence[bool]]], *, seed: int, epochs: int = 6, parts: tuple = PARTS,
    rare: int = 2, drop: float = 0.15,
) -> Tagger:
    """A tagger from sentences (words, which of them are proper nouns); the same seed gives the same one.

    Each sentence is also seen in small letters and with a capital on every word, as captions are often written, so that
    the tagger learns what to go by where the capitals say nothing. So that it leans less on single words, features of
    fewer than `rare` sentences are left out, and at each step a random share `drop` of the others.
    """
    rng = np.random.default_rng(seed)
    encoded = [[(encode(form, parts), tags) for form in forms(words)] for words, tags in sentences]
    known = _common_slots(encoded, rare)
    examples = [([([s for s in features if s in known], *after) for features, *after in words], tags)
                for group in encoded for words, tags in group]
    weights, sums, seen = [0.0] * SLOTS, [0.0] * SLOTS, 0
    for _ in range(epochs):
        for row in rng.permutation(len(examples)):
            before = False
            for (features, *after), gold in zip(*examples[row], strict=True):
                used = features + after[before]
                used = [s for s, drawn in zip(used, rng.random(len(used)), strict=True) if drawn >= drop]
                before, seen = sum([weights[s] for s in used]) > 0, seen + 1
                if before != gold:
                    step = 1.0 if gold else -1.0
                    for s in used:
                        weights[s] += step
                        sums[s] += step * seen
    average = np.array(weights) - np.array(sums) / max(seen, 1)  # of the weights over all steps
    return Tagger(average.astype(np.float32), parts)


def _common_slots(encoded: list[list[tuple]], rare: int) -> set[int]:
    """The slots that features of at least `rare` sentences have."""
    counts = Counter(s for group in encoded for s in {s for words, _ in group for word in words for s in word[0]})
    return {s for s, count in counts.items() if count >= rare}


def forms(words: Sequence[str]) -> list[list[str]]:
    """A text as it is, in small letters, and with a capital on every word."""
    return [list(words), [word.lower() for word in words], [word[:1].upper() + word[1:] for word in words]]
