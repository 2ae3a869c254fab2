"""The lists that were written for this project: names of ImageNet's classes, captions of sample photographs."""

from collections import Counter

from clipid_utils.files import json_lines
from clipid_utils.paths import DATA


def records(name: str) -> list[dict]:
    found = list(json_lines(DATA / name))
    assert not [problem for _, _, problem in found if problem]
    return [record for _, record, _ in found]


def test_each_class_has_names_of_its_own_and_a_description():
    rows = records("class_names.jsonl")
    assert [row["class"] for row in rows] == list(range(1000))
    names = Counter(name for row in rows for name in row["indonesian"])
    assert max(names.values()) == 1 and all(1 <= len(row["indonesian"]) <= 3 for row in rows)
    texts = [*names, *(row["description"] for row in rows)]
    assert not [text for text in texts if text != " ".join(text.split()) or "(" in text]
    for row in rows:
        assert 8 <= len(row["description"].split()) <= 20 and row["description"][-1] == "."
        assert row["english"]
    assert Counter(row["kind"] for row in rows) == {"own": 690, "loan": 306, "doubt": 4}  # data/README.md says so


def test_each_sample_photograph_has_captions_a_licence_and_a_credit():
    rows = records("sample_photographs.jsonl")
    assert len({row["path"] for row in rows}) == len(rows) == 89
    assert len({row["path"].rpartition("/")[2].lower() for row in rows}) == 89  # one folder has them all
    assert len({caption for row in rows for caption in row["captions"]}) == 178
    for row in rows:
        phrase, sentence = row["captions"]
        assert sentence[0].isupper() and sentence[-1] == "." and phrase[-1] != "." and row["credit"]
        assert row["licence"] in ("Public Domain", "CC0-1.0", "CC-BY-SA 4.0", "CC-BY 2.0")
