"""What training sees: captions drawn from names and keywords, and which pictures may be mirrored."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipid_utils.data.captions import CAPTION_SHARES, TEMPLATES, flip_allowed, sample_caption
from clipid_utils.wording import fill

WORDS = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)


def drawn(name, keywords, count=4000, **options):
    rng = np.random.default_rng(0)
    return Counter(sample_caption(name, keywords, rng, **options) for _ in range(count))


def test_each_form_comes_as_often_as_its_share_says():
    captions = drawn("kucing", ["hewan", "meong"])
    templated = {fill(template, "kucing") for template in TEMPLATES} - {"kucing"}
    shares = Counter()
    for caption, count in captions.items():
        if caption == "kucing":
            shares["name"] += count
        elif caption in templated:
            shares["template"] += count
        else:
            shares["both" if caption.startswith("kucing, ") else "keywords"] += count
    assert sum(CAPTION_SHARES.values()) == pytest.approx(1)
    for form, share in CAPTION_SHARES.items():
        assert shares[form] / 4000 == pytest.approx(share, abs=0.03)


def test_a_lone_keyword_is_no_caption_but_may_follow_the_name():
    captions = drawn("bendera Indonesia", ["bendera"])
    assert "bendera" not in captions
    assert captions["bendera Indonesia, bendera"] > 0


def test_without_keywords_only_names_and_templates_are_left():
    assert set(drawn("singa", [])) == {"singa", *(fill(template, "singa") for template in TEMPLATES)}


def test_templates_carry_the_right_classifier():
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
    assert len(set(caption.split(", "))) == len(caption.split(", ")) or name in keywords


@pytest.mark.parametrize("name", ["", "  ", "\n"])
def test_an_empty_name_is_an_error(name):
    with pytest.raises(ValueError, match="empty caption"):
        sample_caption(name, ["hewan"], np.random.default_rng(0))


@pytest.mark.parametrize(
    "name, keywords, has_text, allowed",
    [
        ("kucing", ["hewan"], False, True),
        ("kucing", ["hewan"], True, False),
        ("tanda panah kiri", [], False, False),
        ("wanita berlari: menghadap kanan", [], False, False),
        ("tangan", ["Kanan"], False, False),
        ("tanda panah searah jarum jam", [], False, False),
        ("kirim surat", ["kanangan"], False, True),  # only as a whole word
    ],
)
def test_no_mirror_where_the_caption_names_a_side_or_the_picture_holds_letters(name, keywords, has_text, allowed):
    assert flip_allowed(name, keywords, has_text) is allowed
