"""The minimal pairs: their words, their balance against models that only read, their layouts, and the true set."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from zlib import crc32

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from clipid_utils.data import minimal_pairs
from clipid_utils.data.dictionary.artists import concept_id
from clipid_utils.data.dictionary.build import load_picture_dictionary, recipe_number
from clipid_utils.data.dictionary.fetch import FetchError
from clipid_utils.data.minimal_pairs import FILE, LAYOUTS, SIDE, compose, load_minimal_pairs
from clipid_utils.files import json_lines, write_json_lines
from clipid_utils.paths import CACHE, DATA
from clipid_utils.wording import classifier_for, load_wording

LINES = [line for _, line, _ in json_lines(FILE)]
PAIRS = [(line["phenomenon"], line["captions"][place], line["captions"][1 - place])
         for line in LINES for place in range(len(line["pictures"]))]  # phenomenon, right, wrong
PHENOMENA = {"kiri/kanan", "atas/bawah", "number", "colour", "size", "negation", "reduplication", "me-/di-",
             "classifier", "register", "noun"}


def accuracy(pairs: list[tuple[str, str, str]], score: Callable[[str], float]) -> dict[str, float]:
    """For each phenomenon, how often the right caption has the higher score; an equal one counts half."""
    found = defaultdict(list)
    for phenomenon, right, wrong in pairs:
        found[phenomenon].append(0.5 + 0.5 * np.sign(score(right) - score(wrong)))
    return {phenomenon: float(np.mean(scores)) for phenomenon, scores in found.items()}


def words(text: str) -> list[str]:
    return re.findall(r"[\w-]+", text.lower())


def weight(text: str) -> int:
    """A number that looks random, the same for the same text."""
    return crc32(text.encode())


def picture_parts(line: dict) -> set[str]:
    """The drawings and photographs of a line."""
    names = [picture[key] for picture in line["pictures"] for key in (*LAYOUTS, "photo") if key in picture]
    return {part for name in names for part in ([name] if isinstance(name, str) else name)}


# The words

def test_each_phenomenon_has_enough_pairs_and_each_line_its_own_key():
    counts = Counter(phenomenon for phenomenon, _, _ in PAIRS)
    assert set(counts) == PHENOMENA and min(counts.values()) >= 40 and sum(counts.values()) == 596
    assert max(Counter((line["phenomenon"], line["key"]) for line in LINES).values()) == 1


@pytest.mark.parametrize("score", [
    len, lambda text: -len(text), weight, lambda text: sum(map(weight, words(text))),
    lambda text: sum(weight(" ".join(pair)) for pair in pairwise(words(text))),
], ids=["long", "short", "the whole caption", "words", "pairs of words"])
def test_a_model_that_only_reads_is_right_in_half_of_the_pairs(score):
    found = accuracy(PAIRS, score)
    del found["classifier"]
    assert set(found.values()) == {0.5}


def test_each_caption_is_right_as_often_as_wrong_against_the_same_one():
    pairs = Counter(pair for pair in PAIRS if pair[0] != "classifier")
    assert all(pairs[phenomenon, wrong, right] == count for (phenomenon, right, wrong), count in pairs.items())


def test_classifiers_are_balanced_by_word_but_who_knows_the_noun_needs_no_picture():
    """No picture decides between seekor kucing and sebuah kucing, so that reading alone can solve it."""
    pairs = [pair for pair in PAIRS if pair[0] == "classifier"]
    assert accuracy(pairs, lambda text: sum(map(weight, words(text)))) == {"classifier": 0.5}
    assert accuracy(pairs, len) == {"classifier": 0.5}
    assert accuracy(pairs, lambda text: classifiers(text)[0][0] == classifiers(text)[0][1]) == {"classifier": 1.0}


def test_each_half_of_register_has_its_register_on_the_right_side():
    lines = [line for line in LINES if line["phenomenon"] == "register"]
    assert all(line["halves"] == ["colloquial", "formal"] for line in lines)
    colloquial = r"\b(lagi|nih|lho|tuh|doang|cuma|nggak|gede|cewek|cowok|duit|aja|ceweknya)\b"
    assert all(re.search(colloquial, line["captions"][0].lower()) for line in lines)
    assert not [line for line in lines if re.search(colloquial, line["captions"][1].lower())]


def classifiers(text: str) -> list[tuple[str, str]]:
    """Each counted noun of a caption: the classifier that it has, as se-, and the one of its noun ("" if unknown)."""
    known = "|".join(name.removeprefix("se") for name in load_wording()["classifiers"] if name)
    numbers = "se|dua |tiga |empat |lima |enam |tujuh |delapan "
    found = re.finditer(rf"\b(?:{numbers})({known}) ([\w -]+)", text.lower())
    return [("se" + match[1], classifier_for(re.split(r" (?:di|dan|itu|ber\w+) ", match[2])[0])) for match in found]


def test_right_captions_have_the_classifiers_of_their_nouns():
    found = [pair for _, right, _ in PAIRS for pair in classifiers(right) if pair[1]]
    assert len(found) > 200
    assert not {(has, known) for has, known in found if has != known}


def test_captions_are_tidy_and_those_of_a_pair_differ_in_few_words():
    for phenomenon, right, wrong in PAIRS:
        assert right != wrong and right == " ".join(right.split())
        assert right[0].isupper() == (right[-1] == ".")  # a sentence, or a phrase
        if phenomenon != "register":
            assert (Counter(words(right)) - Counter(words(wrong))).total() <= 2
            assert abs(len(words(right)) - len(words(wrong))) <= 1


def test_clusters_of_a_phenomenon_share_no_drawing_and_no_photograph():
    for phenomenon in PHENOMENA:
        clusters = defaultdict(set)
        for line in LINES:
            if line["phenomenon"] == phenomenon:
                clusters[line.get("cluster", line["key"])] |= picture_parts(line)
        shared = {part: count for part, count in Counter(
            part for parts in clusters.values() for part in parts).items() if count > 1}
        assert len(clusters) >= 16 and not shared, phenomenon


# The layouts, with drawings of one colour each

RED, BLUE = (220, 0, 0), (0, 0, 220)
COLOURS = {"r": Image.new("RGB", (60, 40), RED), "b": Image.new("RGB", (40, 60), BLUE)}


def picture(**layout) -> np.ndarray:
    return np.asarray(compose(layout, COLOURS.__getitem__, "key"))


def centre(pixels: np.ndarray, colour: tuple) -> tuple[float, float]:
    """The mean x and y of a colour."""
    y, x = np.nonzero((pixels == colour).all(-1))
    return x.mean(), y.mean()


def test_a_row_goes_from_the_left_and_a_column_from_the_top():
    assert centre(picture(row=["r", "b"]), RED)[0] < SIDE / 2 < centre(picture(row=["r", "b"]), BLUE)[0]
    assert centre(picture(row=["b", "r"]), BLUE)[0] < SIDE / 2 < centre(picture(row=["b", "r"]), RED)[0]
    assert centre(picture(column=["r", "b"]), RED)[1] < SIDE / 2 < centre(picture(column=["r", "b"]), BLUE)[1]


def test_sizes_decide_which_drawing_is_larger():
    pixels = picture(row=["r", "b"], sizes=[1, 0.5])
    red, blue = ((pixels == colour).all(-1).sum() for colour in (RED, BLUE))
    assert red == pytest.approx(4 * blue, rel=0.05)


def test_a_scatter_has_as_many_drawings_as_it_says_all_of_one_size():
    areas = [(picture(scatter="r", count=count) == RED).all(-1).sum() for count in range(1, 10)]
    assert (np.array(areas) == areas[0] * np.arange(1, 10)).all()
    places = {compose({"scatter": "r", "count": 3}, COLOURS.__getitem__, key).tobytes() for key in "abcdef"}
    assert len(places) > 3


def test_the_first_stands_on_the_second_and_touches_it():
    pixels = picture(on=["r", "b"])
    red, blue = (np.nonzero((pixels == colour).all(-1))[0] for colour in (RED, BLUE))
    assert red.min() < blue.min() and 0 < blue.min() - red.max() < 3


def test_the_front_one_of_an_overlap_covers_the_other():
    first, second = picture(overlap=["r", "b"], front=0), picture(overlap=["r", "b"], front=1)
    crossing = ((first == RED) & (second == BLUE)).all(-1)
    assert crossing.sum() > 1000
    assert ((first == second).all(-1) | crossing)[::8, ::8].mean() > 0.99  # the rest stays, but for soft edges


def test_who_pulls_is_tied_to_the_other_with_a_rope():
    pixels = picture(pull=["r", "b"])
    rope = (pixels == (0x7A, 0x52, 0x30)).all(-1).any(0)
    red, blue = ((pixels == colour).all(-1).any(0) for colour in (RED, BLUE))
    assert np.flatnonzero(red).max() + 1 >= np.flatnonzero(rope).min() > 0
    assert np.flatnonzero(rope).max() + 1 >= np.flatnonzero(blue).min() > np.flatnonzero(red).max() + 20


def test_a_turn_of_hues_makes_red_green_and_leaves_white():
    pixels = picture(one="r", turn=120).reshape(-1, 3)
    assert {tuple(colour) for colour in np.unique(pixels, axis=0).tolist()} >= {(255, 255, 255)}
    middle = pixels[SIDE * SIDE // 2 + SIDE // 2]
    assert middle[1] > 200 and middle[0] < 10 and middle[2] < 10


def test_a_cut_out_keeps_white_inside_and_drops_it_outside():
    ring = Image.new("RGB", (30, 30), "white")
    ring.paste(RED, (5, 5, 25, 25))
    ring.paste("white", (10, 10, 20, 20))
    alpha = np.asarray(minimal_pairs._cut_out(ring))[..., 3]
    assert alpha[15, 15] == 255 and alpha[7, 7] == 255 and alpha[1, 1] == 0 and (alpha > 0).sum() == 400


# Errors, with a miniature dictionary

@pytest.fixture
def written(tmp_path, monkeypatch):
    """Loads the pairs of some lines, with a cat, a dog and no photographs."""
    cats = Dataset.from_dict({"concept": ["1f408", "1f415"], "image": list(COLOURS.values())})

    def no_photographs(cache):
        raise FetchError("no network")

    def load(text: str) -> Dataset:
        (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
        return load_minimal_pairs()

    monkeypatch.setattr(minimal_pairs, "FILE", tmp_path / "pairs.jsonl")
    monkeypatch.setattr(minimal_pairs, "load_picture_dictionary", lambda cache: {"unseen_artist": cats})
    monkeypatch.setattr(minimal_pairs.photographs, "load_sample_photographs", no_photographs)
    return load


LINE = '{"phenomenon": "noun", "key": "k", "captions": ["kucing", "anjing"], "pictures": [%s, {"one": "🐕"}]}\n'


def test_a_contrast_gives_two_pairs_and_one_picture_gives_one(written):
    pairs = written(LINE % '{"one": "🐈"}' + LINE.replace(', {"one": "🐕"}', "") % '{"one": "🐈"}')
    assert pairs["right"] == ["kucing", "anjing", "kucing"] and pairs["wrong"] == ["anjing", "kucing", "anjing"]
    assert pairs["key"] == ["noun/k/1", "noun/k/2", "noun/k/1"] and set(pairs["source"]) == {"noto"}
    assert centre(np.asarray(pairs[0]["image"]), RED) == pytest.approx((SIDE / 2, SIDE / 2), abs=1)


def test_a_contrast_without_its_photograph_is_left_out_whole_and_a_line_says_so(written, capsys):
    pairs = written(LINE % '{"photo": "cow"}' + LINE % '{"one": "🐈"}')
    assert len(pairs) == 2 and "lack 1 contrasts" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "message"), [
    (LINE % '{"one": "🦄"}', r"pairs.jsonl:1: the split unseen_artist has no 🦄 \(1f984\)"),
    ("\n" + LINE % '{"heap": ["🐈"]}', "pairs.jsonl:2: no layout among heap: use one of one, row"),
    (LINE % '{"scatter": "🐈"}', "pairs.jsonl:1: 'count'"),
    ("{", "pairs.jsonl:1: not valid JSON"),
])
def test_an_error_names_the_line(written, text, message):
    with pytest.raises(ValueError, match=message):
        written(text)


# The true set, where the dictionary is prepared (`make test` does so first)

PREPARED = CACHE / f"picture_dictionary-{recipe_number('groups.json', 'stamp_kinds.json')}"
true_one = pytest.mark.skipif(not PREPARED.is_dir(), reason="the true dictionary is not prepared: make test does so")


@true_one
def test_drawings_are_of_the_unseen_artist_and_need_no_debian_package():
    """Each concept is in training by an artist from npm, which is the condition for the split unseen_artist."""
    dictionary = load_picture_dictionary()
    unseen = dict(zip(dictionary["unseen_artist"]["concept"], dictionary["unseen_artist"]["name_id"], strict=True))
    trained = {name.lower() for split in ("train", "validation") for name, artist in zip(
        dictionary[split]["name_id"], dictionary[split]["artist"], strict=True) if artist in ("openmoji", "twemoji")}
    drawn = {part for line in LINES for part in picture_parts(line)} - photographs()
    concepts = {concept_id("-".join(f"{ord(character):x}" for character in emoji)) for emoji in drawn}
    assert len(concepts) > 150 and concepts <= set(unseen)
    assert {unseen[concept].lower() for concept in concepts} <= trained


def photographs() -> set[str]:
    rows = [row for _, row, _ in json_lines(DATA / "sample_photographs.jsonl")]
    return {row["path"].rpartition("/")[2].rpartition(".")[0] for row in rows}


def test_photographs_are_of_the_collection():
    named = {picture["photo"] for line in LINES for picture in line["pictures"] if "photo" in picture}
    assert len(named) >= 30 and named <= photographs()


@true_one
@pytest.mark.slow
@pytest.mark.skipif(not (CACHE / "foto-contoh").is_dir(), reason="the sample photographs are not prepared")
def test_the_true_set_is_balanced_and_the_same_at_each_call(tmp_path, monkeypatch):
    there, pairs = {path.stem for path in (CACHE / "foto-contoh").iterdir()}, load_minimal_pairs()
    lines = [line for line in LINES if all(picture.get("photo") in {None, *there} for picture in line["pictures"])]
    keys = [f"{line['phenomenon']}/{line['key']}/{place}"
            for line in lines for place in range(1, len(line["pictures"]) + 1)]
    assert pairs["key"] == keys and len(set(keys)) == len(keys)
    phenomena = [phenomenon if phenomenon in PHENOMENA else phenomenon.partition("/")[0]  # register/formal
                 for phenomenon in pairs["phenomenon"]]
    found = accuracy([*zip(phenomena, pairs["right"], pairs["wrong"], strict=True)], weight)
    assert {name for name, value in found.items() if value != 0.5} <= {"classifier"}

    write_json_lines(tmp_path / "some.jsonl", lines[::9])
    monkeypatch.setattr(minimal_pairs, "FILE", tmp_path / "some.jsonl")
    again, rows = load_minimal_pairs(), {key: row for row, key in enumerate(pairs["key"])}
    for pair in again:
        first = pairs[rows[pair["key"]]]
        assert first.pop("image").tobytes() == pair.pop("image").tobytes() and first == pair
