"""Captions drawn from names and keywords, the pictures that may be mirrored, and the numbers of equal captions."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipid_utils.data.captions import CAPTION_SHARES, TEMPLATES, caption_ids, flip_allowed, sample_caption
from clipid_utils.wording import fill

WORDS = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)


def drawn(name, keywords, count=4000, **options):
    rng = np.random.default_rng(0)
    return Counter(sample_caption(name, keywords, rng, **options) for _ in range(count))


def test_each_form_comes_as_often_as_its_share_says():
    keywords = ["hewan", "meong", "rumah", "bulu", "kumis"]
    captions = drawn("kucing", keywords)
    templated = {fill(template, "kucing") for template in TEMPLATES} - {"kucing"}
    shares, counts = Counter(), {"both": set(), "keywords": set()}
    for caption, count in captions.items():
        words = caption.split(", ")
        form = ("name" if caption == "kucing" else "template" if caption in templated
                else "both" if words[0] == "kucing" else "keywords")
        shares[form] += count
        if form in counts:
            words = words[form == "both":]
            counts[form].add(len(words))
            assert len(set(words)) == len(words) and set(words) <= set(keywords)
    assert counts == {"both": {1, 2, 3}, "keywords": {2, 3, 4}}
    assert sum(CAPTION_SHARES.values()) == pytest.approx(1)
    for form, share in CAPTION_SHARES.items():
        assert shares[form] / 4000 == pytest.approx(share, abs=0.03)


def test_a_lone_keyword_is_not_a_caption_but_may_follow_the_name():
    captions = drawn("bendera Indonesia", ["bendera"])
    assert "bendera" not in captions
    assert captions["bendera Indonesia, bendera"] > 0


def test_without_keywords_only_names_and_templates_are_left():
    assert set(drawn("singa", [])) == {"singa", *(fill(template, "singa") for template in TEMPLATES)}


def test_templates_have_the_right_classifier():
    captions = drawn("singa", [])
    assert captions["foto singa"] > 0 and captions["foto seekor singa"] > 0 and captions["seekor singa"] > 0
    assert not [caption for caption in captions if "sebuah singa" in caption]
    for group, counted in (("animals", "seekor okapi"), ("objects", "sebuah okapi"), (None, "okapi")):
        assert counted in drawn("okapi", [], group=group)


def test_other_templates_can_be_given():
    assert set(drawn("singa", [], templates=("potret {name}",))) == {"singa", "potret singa"}


@given(WORDS, st.lists(WORDS, unique=True, max_size=6), st.integers(0, 2**32))
def test_a_caption_says_only_what_was_given_and_the_same_again_for_the_same_seed(name, keywords, seed):
    caption = sample_caption(name, keywords, np.random.default_rng(seed), templates=("gambar {name}",))
    assert caption == sample_caption(name, keywords, np.random.default_rng(seed), templates=("gambar {name}",))
    assert set(caption.removeprefix("gambar ").split(", ")) <= {name, *keywords}


@pytest.mark.parametrize("name", ["", "  ", "\n"])
def test_an_empty_name_is_an_error(name):
    with pytest.raises(ValueError, match="empty caption"):
        sample_caption(name, ["hewan"], np.random.default_rng(0))


SIDES = """kiri, kanan, timur, barat, tenggara, timur laut, barat laut, barat daya, searah jarum jam, kidal, left,
right, east, west, northeast, southwest, clockwise, counterclockwise, anti-clockwise, di kirinya, tangan Kananmu"""
BOTH_WAYS = """kucing, kirim surat, kanangan, utara, selatan, laut, daya, jarum, jam, north, south, bright, lefty,
timuran, upright, baratan, tenggaraan"""


@pytest.mark.parametrize("text, allowed", [(text.strip(), allowed) for texts, allowed in (
    (SIDES, False), (BOTH_WAYS, True)) for text in texts.split(",")])
def test_a_picture_is_not_mirrored_if_a_caption_would_become_false(text, allowed):
    assert flip_allowed(text, ["hewan"], False) is allowed
    assert flip_allowed("gambar", ["hewan", f"panah {text.upper()}!"], False) is allowed
    assert not flip_allowed(text, [], True)  # letters read wrong in a mirror


def test_equal_captions_have_equal_numbers():
    same = ["Seekor  kucing ", "seekor\tKUCING", "seekor ｋucing"]
    ids = caption_ids([*same, "seekor anjing", "seekorkucing", "\ud83d"])
    assert ids.shape == (6, 2) and ids.dtype == np.int32 and caption_ids([]).shape == (0, 2)
    assert (ids[:3] == ids[0]).all()
    assert all((one != other).all() for one, other in itertools.combinations(ids[2:], 2))  # both halves tell them apart
    assert caption_ids(["seekor kucing"]).tolist() == [[-558223253, -1553758838]]  # the same on every machine
