"""The 200 careful translations: their form, their classifiers, what the checks of translations say of them."""

import json
import re
from collections import Counter

import pytest

from clipid_utils import paths, wording
from clipid_utils.data.report import Report
from clipid_utils.data.translation import checks

FILE = paths.DATA / "parallel_captions.jsonl"
NEAREST = 0.5
KEYS = ["english", "indonesian", "hard", "source", "licence"]
# What the table of classifiers says otherwise: two people of a wedding, and a whole loaf, not a piece of bread
EXCEPTIONS = {("sepasang", "pengantin"), ("sebuah", "roti")}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    lines = FILE.read_bytes().decode("utf-8")
    assert "\r" not in lines and lines.endswith("\n")
    return [json.loads(line) for line in lines.splitlines()]


def test_form(rows):
    assert len(rows) == 200
    for row in rows:
        assert list(row) == KEYS and (row["source"], row["licence"]) == ("clip-indonesian", "Apache-2.0")
        for text in (row["english"], row["indonesian"]):
            assert text == " ".join(text.split()) and text[0].isupper() and re.search(r"[^.]\.$", text), text
        assert row["english"] != row["indonesian"]
        assert 8 <= len(row["english"].split()) <= 14, row["english"]
        assert 5 <= len(row["indonesian"].split()) <= 14, row["indonesian"]
    for key in ("english", "indonesian"):
        assert max(Counter(row[key].lower() for row in rows).values()) == 1
    assert 20 <= sum(bool(row["hard"]) for row in rows) <= 60


def test_far_from_what_the_translator_has_learnt(rows):
    """Of the words of a caption and of a training line, at most half are common to both."""
    bag = lambda text: set(re.findall(r"[\w']+", text.lower()))  # noqa: E731
    lines = (paths.DATA / "parallel" / "captions.tsv").read_text(encoding="utf-8").splitlines()
    learnt = [bag(line.split("\t")[1]) for line in lines if line.startswith("train")]
    for row in rows:
        words = bag(row["english"])
        assert max(len(words & other) / len(words | other) for other in learnt) <= NEAREST, row["english"]


def test_all_checks_pass(rows):
    """Notebook 02 says that they stop none of the 200."""
    report = Report()
    list(checks.filter_pairs([(row["english"], row["indonesian"]) for row in rows], checks.CHECKS, report))
    assert not report.dropped, str(report)


def test_classifiers_are_those_of_the_table(rows):
    known = sorted(set(wording.load_wording()["classifiers"]) - {""}, key=len, reverse=True)
    pattern = re.compile(rf"\b({'|'.join(known)}) ((?:[\w-]+ ?){{1,4}})")
    found = [match.groups() for row in rows for match in pattern.finditer(row["indonesian"].lower())]
    asked = [(classifier, phrase, wording.classifier_for(phrase.strip())) for classifier, phrase in found]
    assert len(found) > 150
    assert {(classifier, phrase.split()[0]) for classifier, phrase, table in asked
            if table and table != classifier} == EXCEPTIONS


def test_spelling_and_sides(rows):
    for row in rows:
        text = row["indonesian"].lower()
        assert not re.search(r"\b(di|ke)(atas|bawah|depan|belakang|samping|antara|dalam|tengah|kiri|kanan)\b", text)
        # a number and then a doubled noun: never "lima botol-botol"
        assert not re.search(r"\b(dua|tiga|empat|lima|enam|tujuh|delapan|sembilan|sepuluh) (\w+)-\2\b", text)
        english = row["english"].lower()
        for side, word in (("right", "kanan"), ("left", "kiri")):
            remaining = side == "left" and "tersisa" in text
            assert bool(re.search(rf"\b{side}\b", english)) == bool(re.search(rf"\b{word}(nya)?\b", text)) or remaining
