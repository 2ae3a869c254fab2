"""The proper-noun tagger: what it learns, what it goes by, and the shipped one's recorded figures."""

import json

import numpy as np
import pytest
import train_propn
from hypothesis import given
from hypothesis import strategies as st
from train_propn import forms, save_tagger, train

from clipid_utils.data.cleaning import proper_nouns as propn
from clipid_utils.data.cleaning.proper_nouns import MODEL, Tagger, load_tagger, shape, split_words, writing
from clipid_utils.paths import DATA

NAMES, PLACES = ("Joko", "Siti", "Budi", "Dewi", "Agus"), ("Bali", "Jakarta", "Bandung")
SENTENCES = [
    ([name, "pergi", "ke", place, "membawa", thing], [True, False, False, True, False, False])
    for name in NAMES for place in PLACES for thing in ("payung", "kucing", "buku")
]  # fmt: skip


def test_words_of_a_caption():
    assert split_words("Anak-anak, di Ma'ruf (2.500 m)!") == ["Anak-anak", "di", "Ma'ruf", "2.500", "m"]
    assert split_words(" … ") == []


def test_shapes_and_manners_of_writing():
    assert [shape(word) for word in ("Bali", "TNI", "iPhone", "kucing", "17", "B-52")] == \
        ["Xx", "X", "xXx", "x", "0", "X-0"]
    texts = ("kucing di Bali", "kucing di kota", "Kucing di Bali", "KUCING DI KOTA", "Bali", "2 3")
    assert [writing(text.split()) for text in texts] == ["m", "l", "T", "U", "T", "l"]


@given(st.lists(st.text(min_size=1, max_size=8), max_size=8))
def test_any_words_get_one_tag_each(words):
    tags = load_tagger().tag(words)
    assert len(tags) == len(words) and all(isinstance(tag, bool) for tag in tags)
    assert 0 <= load_tagger().share(" ".join(words)) <= 1


def test_it_learns_names_also_in_small_letters_and_gives_the_same_again():
    tagger = train(SENTENCES, seed=1)
    for words, tags in SENTENCES[::7]:
        for form in forms(words):
            assert tagger.tag(form) == tags
    assert (train(SENTENCES, seed=1).weights == tagger.weights).all()
    assert (train(SENTENCES, seed=2).weights != tagger.weights).any()
    assert tagger.share("Siti pergi, ke Bali") == 0.5 and tagger.share("...") == 0


def test_the_average_is_of_the_weights_after_each_word(monkeypatch):
    """The lazy average against one that adds up all weights at each step."""
    monkeypatch.setattr(propn, "SLOTS", 512)
    monkeypatch.setattr(train_propn, "SLOTS", 512)
    sentences, rng = SENTENCES[:4], np.random.default_rng(5)
    tagger = train(sentences, seed=5, epochs=2, rare=1, drop=0.0)
    examples = [(propn.encode(form, propn.PARTS), tags) for words, tags in sentences for form in forms(words)]
    weights, total, steps = np.zeros(512), np.zeros(512), 0
    for _ in range(2):
        for row in rng.permutation(len(examples)):
            before = False
            for (features, *after), gold in zip(*examples[row], strict=True):
                used = features + after[before]
                rng.random(len(used))
                before = bool(weights[used].sum() > 0)
                total, steps = total + weights, steps + 1
                np.add.at(weights, used, (float(gold) - float(before)))
    assert np.abs(tagger.weights - total / steps).max() < 1e-5


def test_rare_features_are_not_learned():
    slots = {propn.slot(f"spellingw={name.lower()}") for name in ("Zulkifli", "pergi")}
    sentences = [*SENTENCES, (["Zulkifli", "pergi"], [True, False])]
    weights = train(sentences, seed=0, rare=2).weights
    assert weights[propn.slot("spellingw=zulkifli")] == 0 and weights[sorted(slots)].any()


def test_a_stored_tagger_decides_the_same(tmp_path):
    tagger = train(SENTENCES, seed=0)
    save_tagger(tagger, tmp_path / "propn.npz")
    again = load_tagger(tmp_path / "propn.npz")
    assert np.abs(again.weights - tagger.weights).max() < 1e-2
    assert all(again.tag(words) == tags for words, tags in SENTENCES)


def test_captions_of_names_are_told_from_captions_of_things():
    tagger = load_tagger()
    assert tagger.share("Joko Widodo, Jakarta, Indonesia") == 1.0
    for caption in ("seekor kucing hitam tidur di atas kursi", "Dua anak bermain bola di lapangan"):
        assert tagger.share(caption) < 0.3



def test_the_shipped_tagger_is_small_and_beats_the_rules_it_was_measured_beside():
    assert MODEL.stat().st_size < 100_000
    report = json.loads((DATA / "propn.json").read_text(encoding="utf-8"))
    used = report["taggers"][report["used"]]
    assert report["used"] == train_propn.USED
    for rule in report["rules"].values():
        for form, figures in rule["words"].items():
            assert used["words"][form]["f1"] > figures["f1"]


def test_sentences_of_conllu_are_read_without_punctuation_and_ranges(tmp_path):
    lines = ["# text = Budi, namanya", "1\tBudi\tbudi\tPROPN", "2\t,\t,\tPUNCT", "3-4\tnamanya\t_\t_",
             "3\tnama\tnama\tNOUN", "4\tnya\tnya\tPRON", "4.1\tx\tx\tNOUN"]  # fmt: skip
    (tmp_path / "a.conllu").write_text("\n".join(lines) + "\n\n# text = !\n1\t!\t!\tPUNCT\n\n", encoding="utf-8")
    assert train_propn.read_sentences(tmp_path / "a.conllu") == [(["Budi", "nama", "nya"], [True, False, False])]


def test_agreement_counts_words():
    found = train_propn.agreement([True, True, False, False], [True, False, True, True])
    assert found == {"precision": 0.5, "recall": 0.333, "f1": 0.4, "gold": 3}
    assert train_propn.agreement([False], [True])["f1"] == 0.0


@pytest.mark.parametrize("rule, expected", [(train_propn.capital, [True, False, True]),
                                            (train_propn.capital_inside, [False, False, True])])
def test_the_rules_of_capitals(rule, expected):
    assert rule(["Kota", "di", "Bali"]) == expected


def test_the_decision_is_measured_on_cuts_of_a_sentence():
    words = ["Siti", "Dewi", "Budi", "Agus", "pergi", "ke", "kota", "besar"]
    report = train_propn.measure_decision(train_propn.capital, [(words, [True] * 4 + [False] * 4)])
    assert report["captions"] == 4  # two of 4 words, one of 6, one of 8
    assert report["as written"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "gold": 1}
    assert Tagger(np.zeros(propn.SLOTS, np.float32)).tag(words) == [False] * 8
