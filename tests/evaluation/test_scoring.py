"""Ranks in both directions, block by block, against `metrics.ranks` of the whole matrix."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_array

from clipid_utils import metrics
from clipid_utils.evaluation import scoring
from clipid_utils.evaluation.scoring import ranks_both_ways

EMBED = 3


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "ROWS", 4)
        patch.setattr(scoring, "COLUMNS", 8)
        yield


def whole(texts, pictures, right):
    """Both ranks by the matrix of all similarities."""
    similarity = texts.astype(np.float64) @ pictures.T.astype(np.float64)
    return metrics.ranks(similarity, right), metrics.ranks(similarity.T, right.T)


def with_a_partner(right, rng):
    """Positives of which each text and each picture has one at least."""
    count, width = right.shape
    right[np.arange(count), rng.integers(width, size=count)] = True
    right[rng.integers(count, size=width), np.arange(width)] = True
    return right


def unit(rng, rows: int, width: int = EMBED):
    vectors = rng.normal(size=(rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def drawn(texts: int, pictures: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return unit(rng, texts), unit(rng, pictures), with_a_partner(rng.random((texts, pictures)) < 0.1, rng)


def assert_ranks(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("texts, pictures", [(1, 1), (1, 20), (4, 8), (5, 9), (3, 17), (13, 30), (30, 3)])
def test_blocks_give_the_ranks_of_the_whole_matrix(texts, pictures):
    rows, columns, right = drawn(texts, pictures)
    found = ranks_both_ways(rows, columns, csr_array(right))
    assert_ranks(found, whole(rows, columns, right))
    assert texts == 1 or pictures == 1 or any(ranks.any() for ranks in found)


@settings(max_examples=40)
@given(st.data())
def test_any_vectors_of_whole_numbers_many_of_which_tie(data):
    """Products of small whole numbers have no rounding: a tie is one in both."""
    texts, pictures = (data.draw(arrays(np.int8, (data.draw(st.integers(1, most)), EMBED),
                                        elements=st.integers(-1, 1))).astype(np.float32) for most in (9, 18))
    right = data.draw(arrays(np.bool_, (len(texts), len(pictures))))
    right = with_a_partner(right, np.random.default_rng(data.draw(st.integers(0, 9))))
    assert_ranks(ranks_both_ways(texts, pictures, csr_array(right)), whole(texts, pictures, right))


def test_equal_vectors_count_against_the_model():
    """One that gives everything the same vector finds nothing."""
    same = np.repeat(unit(np.random.default_rng(0), 1), 20, axis=0)
    found = ranks_both_ways(same[:10], same, csr_array(np.tile(np.eye(10, dtype=np.bool_), 2)))
    assert_ranks(found, (np.full(10, 18), np.full(20, 9)))


def test_a_copy_of_the_right_picture_is_a_tie_in_spite_of_rounding():
    """Twelve texts have one right picture each, whose copy, in a different block, belongs to the thirteenth text."""
    rng = np.random.default_rng(1)
    texts, pictures = unit(rng, 13, 512), unit(rng, 12, 512)
    nearly = (1 + 1e-7 * rng.choice([-1, 1], (12, 1))).astype(np.float32)  # the last bit
    pictures = np.concatenate([pictures, pictures[::-1] * nearly])
    right = np.zeros((13, 24), np.bool_)
    right[np.arange(12), np.arange(12)] = right[12, 12:] = True
    found, _ = ranks_both_ways(texts, pictures, csr_array(right))
    similarity = texts[:12].astype(np.float64) @ pictures.T
    similarity[:, 12:] = similarity[:, 11::-1]  # exact ties
    np.testing.assert_array_equal(found[:12], metrics.ranks(similarity, right[:12]))
    assert (found[:12] > 0).all()


def test_the_order_of_texts_and_of_pictures_does_not_matter():
    texts, pictures, right = drawn(11, 21, seed=2)
    rng = np.random.default_rng(3)
    rows, columns = rng.permutation(11), rng.permutation(21)
    found = ranks_both_ways(texts[rows], pictures[columns], csr_array(right[np.ix_(rows, columns)]))
    expected = ranks_both_ways(texts, pictures, csr_array(right))
    assert_ranks(found, (expected[0][rows], expected[1][columns]))


def test_the_other_direction_is_the_transposed_one():
    texts, pictures, right = drawn(11, 21, seed=4)
    assert_ranks(ranks_both_ways(pictures, texts, csr_array(right.T))[::-1],
                 ranks_both_ways(texts, pictures, csr_array(right)))


def changed(array, place, value):
    array = array.copy()
    array[place] = value
    return array


@pytest.mark.parametrize("change, message", [
    (lambda t, p, right: (changed(t, (2, 1), np.nan), p, right), "vector of text 2 has a NaN"),
    (lambda t, p, right: (t, changed(p, (7, 0), np.inf), right), "vector of picture 7 has a NaN or an infinity"),
    (lambda t, p, right: (t, p, changed(right, 4, False)), "text 4 has no positive"),
    (lambda t, p, right: (t, p, changed(right, np.s_[:, 9], False)), "picture 9 has no positive"),
    (lambda t, p, right: (t, p, right.T), r"shape \(12, 5\), and there are 5 texts and 12 pictures"),
    (lambda t, p, right: (t[:4], p, right), "there are 4 texts"),
    (lambda t, p, right: (t[:0], p, right[:0]), "there are 0 texts"),
    (lambda t, p, right: (t, p[:0], right[:, :0]), "and 0 pictures"),
])
def test_bad_input_is_named_with_its_row(change, message):
    texts, pictures, right = change(*drawn(5, 12, seed=5))
    with pytest.raises(ValueError, match=message):
        ranks_both_ways(texts, pictures, csr_array(right))


def test_only_blocks_are_in_memory(monkeypatch):
    """A matrix of single bytes for all texts and pictures would need more than the peak."""
    count, seen = scoring._count, []

    def spy(*blocks):
        seen.extend(np.size(block) for block in blocks)
        return count(*blocks)

    monkeypatch.setattr(scoring, "ROWS", 256)
    monkeypatch.setattr(scoring, "COLUMNS", 512)
    monkeypatch.setattr(scoring, "_count", spy)
    rng = np.random.default_rng(6)
    texts, pictures = unit(rng, 4000), unit(rng, 3000)
    owners = rng.permutation(4000) % 3000
    positives = csr_array((np.ones(4000, np.bool_), (np.arange(4000), owners)), shape=(4000, 3000))
    tracemalloc.start()
    try:
        found, _ = ranks_both_ways(texts, pictures, positives)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert max(seen) == 256 * 512 and len(seen) == 5 * 16 * 6 and peak < 4000 * 3000 / 4
    similarity = texts[:9].astype(np.float64) @ pictures.T
    own = similarity[np.arange(9), owners[:9], None]
    np.testing.assert_array_equal(found[:9], (similarity >= own).sum(axis=1) - 1)
