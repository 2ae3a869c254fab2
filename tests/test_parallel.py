"""The parallel captions: their form, numbers on both sides, no English left in the Indonesian, splits far apart."""

import re
import unicodedata
from collections import Counter

import pytest

from clipid_utils import paths

FILE = paths.DATA / "parallel" / "captions.tsv"
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
NEAREST = 0.46  # the largest share of words, shared by two lines out of those of both, across two splits

NUMBERS = "dua tiga empat lima enam tujuh delapan sembilan sepuluh sebelas".split()
ENGLISH_NUMBERS = dict(zip("two three four five six seven eight nine ten eleven".split(), NUMBERS, strict=True))
# What else may stand for an Indonesian number: ordinals, what comes in twos, and words with a number in them.
OTHER_WORDS = {
    "dua": "both either second half twice twins newly-weds parents",
    "tiga": "third triplets tricycle",
    "empat": "quarters",
    "lima": "seller vendors",  # pedagang kaki lima
    "enam": "hexagon",
    "sebelas": "eleventh",
}
# Frequent in captions, and no Indonesian word (cat is: paint).
ENGLISH = set(
    "the of and with on an is are at by for from to his her their its in front behind under between man men woman "
    "women boy boys girl girls people child children dog dogs cats bird birds horse car street house tree water "
    "red blue green white black yellow brown sitting standing holding playing walking running wearing riding eating "
    "looking drawing picture photo cartoon outline illustration sign group two three four five".split()
)


def words(text: str) -> set[str]:
    return set(re.findall(r"[\w']+(?:-\w+)*", text.lower()))


def numbers_missing(en: str, id_: str) -> set[str]:
    """Digits and number words, two to twelve, that stand on one side only."""
    digits = Counter(re.findall(r"\d+", en))
    digits.subtract(Counter(re.findall(r"\d+", id_)))
    missing = {number for number, difference in digits.items() if difference}
    given, said = set(re.findall(r"\w+(?:-weds)?", en.lower())), id_.lower()
    if ("twelve" in given) != ("dua belas" in said):
        missing.add("dua belas")
    said = set(re.findall(r"\w+", said.replace("dua belas", "")))
    for english, number in ENGLISH_NUMBERS.items():
        heard = bool(said & {number, f"ke{number}", f"ber{number}"})
        if (english in given) != heard and not (heard and given & set(OTHER_WORDS.get(number, "").split())):
            missing.add(number)
    return missing


def ending(text: str) -> str:
    return text[-1] if text[-1] in ".?!" else ""


def faults(en: str, id_: str) -> list[str]:
    """The fault of a pair, in words; nothing for a good one."""
    found = []
    for text in (en, id_):
        if not text or text != " ".join(text.split()) or unicodedata.normalize("NFC", text) != text:
            return ["empty, odd space or not NFC"]
        if re.search(r"[^\w .,:?!'+=-]|_", text):
            found.append("odd character")
    if en[0].islower() != id_[0].islower():
        found.append("capital")
    if ending(en) != ending(id_):
        found.append("full stop")
    if numbers_missing(en, id_):
        found.append("number")
    if words(id_) & ENGLISH:
        found.append("English")
    if re.search(r"\b(di|ke)(atas|bawah|depan|belakang|samping|antara|dalam|tengah|kiri|kanan|dekat)\b", id_.lower()):
        found.append("di or ke written together")
    return found


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    text = FILE.read_bytes().decode("utf-8")
    assert "\r" not in text and text.endswith("\n")
    header, *lines = text.removesuffix("\n").split("\n")
    assert header == "split\ten\tid"
    return [line.split("\t") for line in lines]


@pytest.mark.parametrize(
    ("en", "id_", "expected"),
    [
        ("Two cats", "Dua ekor kucing", []),
        ("Both cats", "Kedua kucing", []),
        ("Twelve roses at 7.30", "Dua belas mawar pukul 7.30", []),
        ("A cat ", "Seekor kucing", ["empty, odd space or not NFC"]),
        ("A cat", "Seekor\u00a0kucing", ["empty, odd space or not NFC"]),
        ("A cafe\u0301", "Sebuah kafe", ["empty, odd space or not NFC"]),
        ("A cat", "", ["empty, odd space or not NFC"]),
        ("A “cat”", "Seekor kucing", ["odd character"]),
        ("A cat", "seekor kucing", ["capital"]),
        ("A cat sleeps.", "Seekor kucing tidur", ["full stop"]),
        ("Two cats", "Kucing", ["number"]),
        ("Cats", "Tiga kucing", ["number"]),
        ("Two roses", "Dua belas mawar", ["number"]),
        ("Number 12", "Nomor 21", ["number"]),
        ("A cat on the roof", "Seekor kucing di the atap", ["English"]),
        ("A cat on the roof", "Seekor kucing diatas atap", ["di or ke written together"]),
    ],
)
def test_faults_are_seen(en, id_, expected):
    assert faults(en, id_) == expected


def test_three_columns_and_no_line_twice(rows):
    assert {len(row) for row in rows} == {3}
    assert {row[0] for row in rows} == set(SHARES)
    for column in (1, 2):
        texts = Counter(row[column].lower().rstrip(".?!") for row in rows)
        assert [text for text, times in texts.items() if times > 1] == []


def test_every_pair_is_sound(rows):
    assert {tuple(row): found for row in rows if (found := faults(row[1], row[2]))} == {}


def test_shares_are_those_of_the_readme(rows):
    counts = Counter(row[0] for row in rows)
    readme = (FILE.parent / "README.md").read_text(encoding="utf-8")
    for split, share in SHARES.items():
        assert counts[split] / len(rows) == pytest.approx(share, abs=0.01)
        assert f"| `{split}` | {counts[split]:,} |" in readme
    assert f"{len(rows):,} pairs" in readme and f"at most {NEAREST}" in readme


@pytest.mark.parametrize("column", [1, 2], ids=["en", "id"])
def test_splits_are_far_apart(rows, column):
    splits = {split: [(words(row[column]), row[column]) for row in rows if row[0] == split] for split in SHARES}
    for one, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        near = [
            (text, known)
            for bag, text in splits[one]
            for seen, known in splits[other]
            if len(bag & seen) > NEAREST * len(bag | seen)
        ]
        assert near == [], f"{one} and {other}"


def test_what_the_captions_cover(rows):
    """A model that sees no "seekor" cannot learn it: each of these is in training and is asked for in the test."""
    for split in ("train", "test"):
        text = " ".join(f" {row[2].lower()} " for row in rows if row[0] == split)
        for word in "seekor seorang sebuah sehelai sedang yang di ke dari tanpa tidak dan gambar kartun kiri".split():
            assert f" {word} " in text, f"{word!r} is not in {split}"
        assert re.search(r" (\w{3,})-\1 ", text), f"no reduplication in {split}"
