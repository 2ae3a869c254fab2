"""The small models of data/translator and data/translator-back are as their cards say."""

import json

import pytest

from clipid_utils.data.translation.translate import SHIPPED, Translator
from clipid_utils.paths import DATA

BACK = DATA / "translator-back"


@pytest.mark.parametrize("folder", [SHIPPED, BACK], ids=["there", "back"])
def test_it_is_small_and_its_figures_stand_beside_a_baselines(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for systems in metrics["test"].values():
        assert set(systems) == {"model", "word_by_word"}
        assert all(figures["signatures"] and figures["BLEU"] > 0 for figures in systems.values())


def test_it_says_what_its_figures_were_computed_from():
    metrics = json.loads((SHIPPED / "metrics.json").read_text(encoding="utf-8"))
    translate = Translator()
    for example in metrics["examples"]["captions"]["good"]:
        assert translate([example["source"]])[0].text == example["found"]


def test_there_and_back():
    there, back = Translator(), Translator(BACK)
    [indonesian] = there(["a red car"])
    assert indonesian.mark == "" and {"mobil", "merah"} <= set(indonesian.text.lower().split())
    assert "red car" in back([indonesian.text])[0].text.lower()
