"""The sentences that the small translator learns from: none is held out, and each made pair is a translation."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from translator_corpus import ADJECTIVES, Corpus, Maker, bare, ibm1, mutual, plural, read_corpus, swapped, word_by_word

from clipid_utils.data.translation.checks import CHECKS, words


def concept(concept, name_en, name_id, group="animals", keywords_en=(), keywords_id=()):
    return {"concept": concept, "name_en": name_en, "name_id": name_id, "group": group,
            "keywords_en": list(keywords_en), "keywords_id": list(keywords_id)}


ANIMALS = {"cat": "kucing", "dog": "anjing", "horse": "kuda", "cow": "sapi", "duck": "bebek", "tiger": "harimau",
           "goat": "kambing", "rabbit": "kelinci", "bird": "burung", "bee": "lebah", "frog": "katak", "snake": "ular"}


def dictionary() -> DatasetDict:
    train = [concept(en, en, ind, "animals", ["animal", "nature"], ["hewan", "alam"]) for en, ind in ANIMALS.items()]
    train += [concept("tuxpaint:a-fox", "A fox.", "Rubah.", "animals")]  # its name is held out, as "fox"
    train += [concept("x", "thing", "benda", "objects", ["fox", "thing"], ["rubah", "benda"])]
    splits = {"train": train, "unseen_concept": [concept("fox", "fox", "rubah")]}
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return read_corpus(dictionary())


def test_nothing_held_out_is_trained_on(corpus):
    assert corpus.names["test"] == [("fox", "rubah")]
    shown = [*corpus.names["train"], *corpus.captions["train"]]
    for side in (0, 1):
        hidden = {bare(pair[side]) for pair in (*corpus.names["test"], *corpus.captions["test"])}
        assert not hidden & {bare(pair[side]) for pair in shown}
        assert not hidden & {bare(word) for keywords in corpus.keywords for word in keywords[side]}
    assert not set(corpus.names["validation"]) & set(corpus.names["train"]) and len(shown) > 1000
    assert not set(corpus.captions["validation"]) & set(corpus.captions["train"])


def test_what_each_half_holds_out_is_trained_on_without_the_other():
    held_out = []
    for half in (0, 1):
        corpus = read_corpus(dictionary(), half)
        names = {bare(english) for english, _ in corpus.names["test"]}
        assert not names & {bare(english) for english, _ in (*corpus.names["train"], *corpus.captions["train"])}
        assert not names & {bare(word) for english, _ in corpus.keywords for word in english}
        held_out.append(names - {"fox"})
    assert held_out[0] | held_out[1] == {*ANIMALS, "thing"} and not held_out[0] & held_out[1]


def test_words_that_stand_for_each_other_are_found_in_bags():
    rng = np.random.default_rng(0)
    names = sorted(ANIMALS)
    bags = []
    for _ in range(200):
        drawn = rng.choice(names, 3, replace=False)
        bags.append(([*drawn, "the"], [*rng.permutation([ANIMALS[name] for name in drawn])]))
    assert mutual(bags, 0.3) == ANIMALS
    table = ibm1(bags)
    assert all(sum(row.values()) == pytest.approx(1, abs=0.01) for row in table.values())
    assert mutual(bags[:1], 0.3) == {}  # seen once: not enough


@pytest.fixture(scope="module")
def maker(corpus) -> Maker:
    return Maker(corpus, np.random.default_rng(0))


def test_templates_keep_every_noun_colour_and_number(maker):
    back = {ind: en for en, ind in [*ANIMALS.items(), ("thing", "benda")]}
    for _ in range(300):
        english, indonesian = maker.template()
        found = [back[word] for word in words(indonesian) if word in back]
        assert found and sorted(found) == sorted(
            word for word in re.sub(r"(?<=[a-z])s\b", "", english.lower()).split() if word in back.values()), english
        assert not CHECKS["numbers"]([(english, indonesian)])[0] and not CHECKS["colours"]([(english, indonesian)])[0]


def test_swaps_change_both_sides_alike(maker):
    changed = 0
    for _ in range(300):
        english, indonesian = maker.swap()
        changed += (english, indonesian) not in maker.captions
        assert not CHECKS["numbers"]([(english, indonesian)])[0], (english, indonesian)
        assert not re.search(r"\b(a (?=[aeio][a-z]+ )(?!one|uni|eu)|an (?=[bcdfgjklmnpqrstvwxyz]))", english), english
    assert changed > 200


def test_a_word_that_nobody_knows_is_the_same_on_both_sides(maker):
    for _ in range(200):
        english, indonesian = maker.copied()
        strange = [word for word in words(indonesian) if word not in maker.known]
        stems = [word[:-1] for word in strange]  # plural("x" + "y") may end in "ies"
        assert strange and any(stem in english.lower() for stem in stems), (english, indonesian)


def test_how_a_swap_is_written():
    assert swapped("A Cat and a catfish", "cat", "dog") == "A Dog and a catfish"
    assert swapped("kucing-kucing", "kuc", "x") == "kucing-kucing"
    assert [plural(noun) for noun in ("cat", "fox", "berry", "toy", "bus", "peach")] == [
        "cats", "foxes", "berries", "toys", "buses", "peaches"]
    assert all(len(item.split(" ", 1)) == 2 for line in ADJECTIVES.values() for item in line.split(", "))


@given(st.integers(0, 10**6))
def test_another_case_says_the_same(maker, seed):
    maker = SimpleNamespace(rng=np.random.default_rng(seed), cased=Maker.cased)
    pair = ("a red Cat", "Kucing merah")
    made = Maker.cased(maker, pair)
    assert [side.lower().rstrip(".") for side in made] == [side.lower() for side in pair]
    assert made[0].endswith(".") == made[1].endswith(".")


def test_the_baseline_takes_the_longest_phrase_it_knows(corpus):
    translate = word_by_word(corpus)
    assert translate("cat") == "kucing" and translate("Cat") == "Kucing"
    assert translate("Zanzibar!") == "Zanzibar!"
    english, indonesian = next(pair for pair in corpus.captions["train"]
                               if pair[0].count(" ") == 3 and pair[0].lower() == bare(pair[0]))
    assert translate(english).lower() == bare(indonesian)
