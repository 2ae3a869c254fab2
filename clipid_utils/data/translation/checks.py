"""Checks of translated captions: each stops pairs of English and Indonesian that probably do not mean the same.

A check takes the pairs and returns a text for each: what is wrong with the pair, or "" if it passes. No check needs a
reference translation, and none proves that a translation is right. They find the mistakes of machines that can be
counted.

    report = Report()
    kept = list(filter_pairs(pairs, CHECKS, report))
    print(report)                                      # the count of each check, with examples
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from clipid_utils.data.report import Report
from clipid_utils.files import need, read_json
from clipid_utils.paths import DATA

Pair = tuple[str, str]  # English, Indonesian
PairCheck = Callable[[list[Pair]], list[str]]
INDONESIAN = frozenset({"id", "ms", "jv", "su"})  # and the languages it is mistaken for: Malay, Javanese, Sundanese
LEAST_WORDS = 5  # the language of a shorter text is not checked, since it is recognised too badly
MAX_RATIO = 2.0  # of the lengths in letters, after 8 is added to both: 11 of the dictionary's 2,691 pairs exceed it
# The words of the checks. "may_mean": words that may stand for a number of the other side, and need not. "also_…" of a
# colour: words that may stand for the other side's colour, as garlic is bawang putih and sunglasses are kacamata hitam.
WORDS = read_json(DATA / "translation_words.json")
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
# One to four words at least three times in a row, or two to eight letters at least five times
_LOOP = re.compile(r"(?<!\S)(\S+(?:\s+\S+){0,3}?)(?:[\s,]+\1){2,}(?!\S)|(\S{2,8}?)\2{4,}")


def words(text: str) -> list[str]:
    """The words of a text in small letters; "kupu-kupu" is one word."""
    return _WORD.findall(text.lower())


def loops(text: str, source: str = "") -> bool:
    """Whether a translation repeats one thing over and over, as a stuck model does, and its source does not.

    That is one to four words three times in a row, or a few letters five times ("kukukukuku").
    """
    return bool(_LOOP.search(text.lower())) and not _LOOP.search(source.lower())


def pair_by_pair(check: Callable[[str, str], str]) -> PairCheck:
    """The check of a list of pairs that a check of one pair makes."""
    return lambda pairs: [check(english, indonesian) for english, indonesian in pairs]


def filter_pairs(
    pairs: Iterable[Pair], checks: dict[str, PairCheck], report: Report, chunk: int = 1000
) -> Iterator[tuple[int, str, str]]:
    """The pairs that pass all checks, each after its place in `pairs`, as a stream.

    The report counts a pair that does not pass under the first check that stops it, in the order of `checks`.
    """
    numbered = enumerate(pairs)
    while rows := list(islice(numbered, chunk)):
        for name, check in checks.items():
            problems = check([pair for _, pair in rows]) if rows else []
            for (_, (english, indonesian)), problem in zip(rows, problems, strict=True):
                if problem:
                    report.drop(name, f"{english} → {indonesian} ({problem})")
            rows = [row for row, problem in zip(rows, problems, strict=True) if not problem]
        for number, (english, indonesian) in rows:
            report.keep()
            yield number, english, indonesian


# --- The checks -------------------------------------------------------------------------------------------------------


def check_language(english: str, indonesian: str) -> str:
    """Stops a translation of at least LEAST_WORDS words that py3langid recognises as a language not in INDONESIAN.

    Words that are also in the English do not count: they are names, or `check_copy` finds them.
    """
    own = [word for word in words(indonesian) if word not in words(english)]
    if len(own) < LEAST_WORDS:
        return ""
    language = need("py3langid", "data").classify(" ".join(own))[0]
    return "" if language in INDONESIAN else f"taken for {language!r}"


def check_length(english: str, indonesian: str) -> str:
    """Stops an empty translation, and one that is more than MAX_RATIO times as long or as short as the English."""
    if not indonesian.strip():
        return "empty"
    ratio = (len(indonesian) + 8) / (len(english) + 8)
    return "" if 1 / MAX_RATIO <= ratio <= MAX_RATIO else f"{ratio:.1f} times as long"


def check_copy(english: str, indonesian: str) -> str:
    """Stops a translation that is still English.

    It has a word that only English has, or it copies all of two or more words, or more than half of the longer words.
    Names may be copied, that is, words with a capital letter inside the English text. So may a single word: a robot is
    a robot in both languages.
    """
    found, source = words(indonesian), words(english)
    foreign = set(WORDS["english_only"].split()).intersection(found)
    if foreign:
        return f"{min(foreign)!r} is English"
    names = {word.lower() for word in _WORD.findall(english)[1:] if word[0].isupper()}
    plain = [word for word in found if word not in names]
    if len(plain) > 1 and found == source:
        return "copied whole"
    copied = [word for word in plain if len(word) > 2 and word in source]
    return f"copied: {' '.join(copied)}" if len(copied) >= 2 and 2 * len(copied) > len(plain) else ""


def check_repetition(english: str, indonesian: str) -> str:
    """Stops a translation that `loops`, or has eight words or more with fewer than half different, unlike its English.
    """
    if loops(indonesian, english):
        return "loops"
    found, source = words(indonesian), words(english)
    few = len(found) >= 8 and 2 * len(set(found)) < len(found)
    return "few different words" if few and 2 * len(set(source)) >= len(source) else ""


# --- Numbers ----------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"\d+(?:[.,]\d{3})*(?!\d)|[^\W\d_]+")
_NO_COUNT = re.compile(r"\b(?:kaki lima|segi (?:tiga|empat|lima|enam|delapan))\b")  # street vendors; polygons
_HOURS = "satu,dua,tiga,empat,lima,enam,tujuh,delapan,sembilan,sepuluh,sebelas,dua belas".split(",")
_HALF_PAST = re.compile(rf"\b(?:jam|pukul) setengah ({'|'.join(_HOURS[::-1])})\b")  # setengah dua is 1.30, not 2.30


def numbers(text: str) -> tuple[set[int], set[int]]:
    """The numbers from two on that a text of either language says in digits or words, and the numbers it may mean.

    A text may mean a number with "second", "kedua" or "sepasang". One is left out: a, an, one, se- and satu stand for
    each other, and a translation may leave them out.
    """
    said: list[int] = []
    loose: set[int] = set()
    begun = False  # whether the next word may belong to the last number
    text = _HALF_PAST.sub(lambda found: f"{_HOURS.index(found[1]) or 12} 30", _NO_COUNT.sub("", text.lower()))
    for token in _TOKEN.findall(text):
        if token in WORDS["numbers"]:
            value = WORDS["numbers"][token]
            step = 10 ** len(str(value))
            if begun and said[-1] % step == 0 and (value > 9 or said[-1] % 100 != 10):
                said[-1] += value
            else:
                said.append(value)
            begun = True
        elif begun and token in WORDS["scales"]:
            base, scale = WORDS["scales"][token]
            said[-1] += said[-1] % base * (scale - 1)
        elif begun and token == "belas":
            said[-1] += 10
        elif begun and token == "and" and said[-1] % 100 == 0:
            continue  # two hundred and five
        else:
            begun = token[0].isdecimal()
            if begun:
                said.append(int(re.sub(r"[.,]", "", token)[:18]))
            elif token in WORDS["may_mean"]:
                loose.add(WORDS["may_mean"][token])
    return set(said) - {0, 1}, loose


def check_numbers(english: str, indonesian: str) -> str:
    """Stops a pair if one side says a number that the other side does not."""
    (said_en, loose_en), (said_id, loose_id) = numbers(english), numbers(indonesian)
    lost, added = said_en - said_id - loose_id, said_id - said_en - loose_en
    return f"without {min(lost)}" if lost else f"with {min(added)}" if added else ""


# --- Colours ----------------------------------------------------------------------------------------------------------

_COLOURS = [{key: frozenset(text.split()) for key, text in colour.items()} for colour in WORDS["colours"]]
# sebiru: as blue as, kebiruan: bluish, birunya: its blue
_SHADE = re.compile(rf"^(?:ke|se)?({'|'.join(sorted(set().union(*(c['indonesian'] for c in _COLOURS))))})(?:an|nya)?$")


def check_colours(english: str, indonesian: str) -> str:
    """Stops a pair if one side names a colour that the other side does not; a word that both share is a name."""
    en = set(words(english.replace("-", " ")))
    ind = {_SHADE.sub(r"\1", word) for word in words(indonesian)}
    en, ind = en - ind, ind - en
    for colour in _COLOURS:
        if colour["english"] & en and not ind & (colour["indonesian"] | colour["also_indonesian"]):
            return f"without {min(colour['english'] & en)}"
        if colour["indonesian"] & ind and not en & (colour["english"] | colour["also_english"]):
            return f"with {min(colour['indonesian'] & ind)}"
    return ""


# --- There and back ---------------------------------------------------------------------------------------------------


def round_trip_check(back: Callable[[list[str]], list[str]], least: float = 30.0) -> PairCheck:
    """Stops a translation if its translation back to English is not similar to the English: chrF below `least` of 100.

    `back` translates Indonesian texts into English, as a Translator does whose model has that direction. Letters are
    compared in small form (chrF: Popović 2015). A translation that passes may still be wrong, since both models can
    make the same mistake.
    """
    chrf = need("sacrebleu.metrics", "translate").CHRF()

    def check(pairs: list[Pair]) -> list[str]:
        problems = []
        returned = back([indonesian for _, indonesian in pairs])
        for (english, _), again in zip(pairs, returned, strict=True):
            score = chrf.sentence_score(again.lower(), [english.lower()]).score
            problems.append("" if score >= least else f"comes back as {again!r}, chrF {score:.0f}")
        return problems

    return check


CHECKS: dict[str, PairCheck] = {name: pair_by_pair(check) for name, check in (
    ("length", check_length), ("copy", check_copy), ("repetition", check_repetition), ("numbers", check_numbers),
    ("colours", check_colours), ("language", check_language),
)}
