"""Machine captions: each translation is in its column, and a row's name is a text that passed the checks."""

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow

from clipid_utils.data.report import Report
from clipid_utils.data.translation.machine_captions import (
    MAX_OF_A_TITLE,
    caption_checks,
    in_indonesian,
    named,
    with_good_captions,
    with_good_pictures,
)
from clipid_utils.data.translation.translate import Translation

WORDS = {"red": "merah", "car": "mobil", "cat": "kucing", "two": "dua", "animals": "hewan", "pet": "peliharaan",
         "a": "sebuah", "on": "di atas", "sleeps": "tidur", "table": "meja", "the": "itu", "sleeping": "sedang tidur",
         "signs": "tanda", "and": "dan", "symbols": "simbol", "arrow": "panah"}
FEATURES = Features({"image": Image(), "title_en": Value("string"), "description_en": Value("string"),
                     "keywords_en": List(Value("string")), "group": Value("string")})


class Dictionary:
    """Translates word by word, and counts the texts."""

    def __init__(self, **instead):
        self.texts, self.instead = [], instead

    def __call__(self, texts):
        self.texts += texts
        return [Translation(self.instead.get(text, " ".join(WORDS.get(word, word) for word in text.split())))
                for text in texts]


def rows(*titles, description="", keywords=("pet",), group="animals", images=None) -> Dataset:
    rng = np.random.default_rng(0)
    images = images or [Pillow.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in titles]
    return Dataset.from_dict({"image": images, "title_en": titles, "description_en": [description] * len(titles),
                              "keywords_en": [list(keywords)] * len(titles), "group": [group] * len(titles)},
                             features=FEATURES)


def test_titles_become_names_and_empty_ones_go():
    found = named(rows("RedCar_04.svg", "...", "a cat", group="logos"))
    assert found["name_en"][:] == ["Red Car", "...", "a cat"] and found["has_text"][:] == [True] * 3
    assert named(rows("_", "a cat"))["name_en"][:] == ["a cat"]


def test_each_text_is_translated_once_into_its_own_column():
    translate = Dictionary()
    found = in_indonesian(named(rows("red car", "cat", "cat", description="the cat sleeps", keywords=("cat", ""))),
                          translate)
    assert found["name_id"][:] == ["mobil merah".split()[1] + " mobil", "kucing", "kucing"]
    assert found["description_id"][:] == ["itu kucing tidur"] * 3
    assert found["keywords_id"][:] == [["kucing", ""]] * 3 and found["group_id"][:] == ["hewan"] * 3
    assert len(translate.texts) == len(set(translate.texts))


def test_human_columns_are_replaced_and_the_rest_stays():
    human = named(rows("red car")).add_column("name_id", ["mobil merah"]).add_column("concept", ["1f697"])
    found = in_indonesian(human.remove_columns("description_en"), Dictionary())
    assert found["name_id"][:] == ["merah mobil"] and found["concept"][:] == ["1f697"]
    assert "description_id" not in found.column_names


def test_a_row_without_a_good_name_takes_its_description_or_goes():
    drawings = rows("two red cats", "the red car", "R2", description="a cat on the table")
    found = in_indonesian(named(drawings), Dictionary(**{"two red cats": "kucing merah"}))  # a number lost
    report = Report()
    kept = with_good_captions(found, caption_checks(found), report)
    assert kept["name_id"][:] == ["sebuah kucing di atas itu meja", "itu merah mobil", "sebuah kucing di atas itu meja"]
    assert report.dropped == {"numbers": 1, "English: its length": 1} and report.kept == 4
    lone = in_indonesian(named(rows("two red cats")), Dictionary(**{"two red cats": "kucing merah"}))
    assert len(with_good_captions(lone, caption_checks(lone), Report())) == 0


def test_a_text_that_the_translator_marked_does_not_pass():
    def gives_up(texts):
        return [Translation(text, "loops") if text == "Froggy" else Translation("kodok") for text in texts]

    found = in_indonesian(named(rows("Froggy", "frog")), gives_up)
    assert found["name_mark"][:] == ["loops", ""]
    report = Report()
    assert with_good_captions(found, caption_checks(found), report)["name_id"][:] == ["kodok"]
    assert report.dropped == {"not translated: loops": 1} and report.read == 2


def test_keywords_that_stayed_english_go():
    found = in_indonesian(named(rows("red car", keywords=("pet", "froggy", "Pet"))), Dictionary(Pet="peliharaan"))
    assert with_good_captions(found, caption_checks(found), Report())["keywords_id"][:] == [["peliharaan"]]


@pytest.mark.parametrize("title, reason", [
    ("il gatto della nonna sopra la tavola", "English: another language"),
    ("red car", "English: the title of a series"),
    ("a sleeping zebra crossing", "copy"),
])
def test_each_kind_of_bad_caption_has_its_check(title, reason):
    count = MAX_OF_A_TITLE + 1 if "series" in reason else 1
    found = in_indonesian(named(rows(*[title] * count)), Dictionary(**{"a sleeping zebra crossing": "zebra crossing"}))
    report = Report()
    assert len(with_good_captions(found, caption_checks(found), report)) == 0 and set(report.dropped) == {reason}


def test_pictures_that_repeat_or_show_nothing_go_under_their_names():
    rng = np.random.default_rng(1)
    one = Pillow.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8))
    white = Pillow.new("RGB", (64, 64), "white")
    found = in_indonesian(named(rows("red car", "cat", "arrow", images=[one, one, white])), Dictionary())
    report = Report()
    assert with_good_pictures(found, report)["name_id"][:] == ["merah mobil"]
    assert report.dropped == {"a repeated picture": 1, "nearly one colour": 1}
    assert report.examples["nearly one colour"] == ["panah"]
