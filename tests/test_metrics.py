import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipid_utils import metrics

MISFIT = (ValueError, TypeError)  # where annotations are checked at run time, they speak first, with a TypeError


@st.composite
def retrievals(draw):
    """A similarity matrix with many ties and a positives matrix in which every query has one or more."""
    queries, candidates = draw(st.integers(1, 8)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    similarity = rng.integers(0, draw(st.integers(1, 8)) + 1, (queries, candidates)).astype(np.float32)
    positives = rng.random((queries, candidates)) < 0.3
    positives[np.arange(queries), rng.integers(0, candidates, queries)] = True
    return similarity, positives


def naive_ranks(similarity, positives):
    found = []
    for scores, right in zip(similarity, positives, strict=True):
        best = max(score for score, is_right in zip(scores, right, strict=True) if is_right)
        found.append(sum(score >= best and not is_right for score, is_right in zip(scores, right, strict=True)))
    return np.array(found)


@given(retrievals())
def test_ranks_agree_with_a_double_loop(pair):
    np.testing.assert_array_equal(metrics.ranks(*pair), naive_ranks(*pair))


@given(retrievals())
def test_recall_and_mrr_grow_with_k_and_mrr_stays_below(pair):
    candidates = pair[0].shape[1]
    ks = range(1, candidates + 1)
    recall, rank = metrics.recall_at_k(*pair, ks=ks), metrics.ranks(*pair)
    mrr = {k: metrics.reciprocal_at_k(rank, k).mean() for k in ks}
    assert sorted(recall.values()) == list(recall.values()) and sorted(mrr.values()) == list(mrr.values())
    assert recall[candidates] == 1.0 and mrr[1] == recall[1]
    assert all(mrr[k] <= recall[k] for k in ks)


@given(retrievals(), st.integers(0, 2**32 - 1))
def test_the_order_of_candidates_does_not_matter(pair, seed):
    order = np.random.default_rng(seed).permutation(pair[0].shape[1])
    np.testing.assert_array_equal(metrics.ranks(*pair), metrics.ranks(pair[0][:, order], pair[1][:, order]))


@given(retrievals(), st.integers(1, 3))
@settings(max_examples=30)
def test_chunks_change_nothing(pair, rows):
    whole = metrics.ranks(*pair)
    kept, metrics.CHUNK_BYTES = metrics.CHUNK_BYTES, rows * pair[0].shape[1] * 4
    try:
        np.testing.assert_array_equal(metrics.ranks(*pair), whole)
    finally:
        metrics.CHUNK_BYTES = kept


def test_a_model_that_says_the_same_of_everything_scores_nothing():
    similarity, positives = np.zeros((5, 5)), np.eye(5, dtype=bool)
    assert metrics.recall_at_k(similarity, positives) == {1: 0.0, 5: 1.0, 10: 1.0}
    assert metrics.reciprocal_at_k(metrics.ranks(similarity, positives), 5).mean() == pytest.approx(1 / 5)


def test_known_values_both_ways():
    similarity = np.array([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.3, 0.2, 0.1]])
    positives = np.eye(3, dtype=bool)
    np.testing.assert_array_equal(metrics.ranks(similarity, positives), [0, 1, 2])
    np.testing.assert_array_equal(metrics.ranks(similarity.T, positives.T), [0, 0, 2])
    assert metrics.recall_at_k(similarity, positives, ks=(1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})
    assert metrics.reciprocal_at_k(metrics.ranks(similarity, positives), 2).mean() == pytest.approx((1 + 1 / 2) / 3)


def test_one_right_answer_of_several_is_enough():
    similarity = np.array([[0.1, 0.9, 0.5, 0.4]])
    assert metrics.recall_at_k(similarity, np.array([[True, True, False, False]]), ks=(1,)) == {1: 1.0}


def test_label_ranks():
    scores = np.array([[0.1, 0.9, 0.0], [0.5, 0.3, 0.2]])
    rank = metrics.label_ranks(scores, np.array([1, 2]))
    assert rank.tolist() == [0, 2]
    assert metrics.hits_at_k(rank, 1).tolist() == [1, 0] and metrics.hits_at_k(rank, 3).tolist() == [1, 1]
    with pytest.raises(ValueError, match="query 1 has no positive among 3 candidates"):
        metrics.label_ranks(scores, np.array([1, 3]))
    with pytest.raises(MISFIT, match="labels|of one shape"):
        metrics.label_ranks(scores, np.array([1]))


@pytest.mark.parametrize(
    ("similarity", "positives", "message"),
    [
        (np.array([[1.0, np.nan]]), np.array([[True, False]]), "query 0 has a NaN"),
        (np.ones((2, 3)), np.ones((3, 2), bool), "transpose|positives"),
        (np.ones((2, 2)), np.array([[True, False], [False, False]]), "query 1 has no positive"),
        (np.ones((0, 3)), np.ones((0, 3), bool), "nothing to rank"),
    ],
)
def test_bad_input_is_named(similarity, positives, message):
    with pytest.raises(MISFIT, match=message):
        metrics.ranks(similarity, positives)


def test_positives_must_be_boolean():
    with pytest.raises(TypeError):
        metrics.ranks(np.ones((2, 2)), np.ones((2, 2), int))


def test_bootstrap_is_seeded_and_covers_the_truth():
    per_item = (np.random.default_rng(1).random(400) < 0.4).astype(float)
    low, high = metrics.bootstrap_interval(per_item, seed=3)
    assert (low, high) == metrics.bootstrap_interval(per_item, seed=3)
    assert metrics.with_interval(per_item, seed=3) == {"value": per_item.mean(), "low": low, "high": high}
    assert (low, high) != metrics.bootstrap_interval(per_item, seed=4)
    assert low < per_item.mean() < high and high - low == pytest.approx(2 * 1.96 * (0.24 / 400) ** 0.5, rel=0.15)
    assert metrics.bootstrap_interval(np.ones(7)) == (1.0, 1.0)


def test_clusters_are_drawn_whole():
    """Ten pictures of each concept, all right or all wrong: as many independent items as concepts."""
    concepts = np.repeat(np.arange(40), 10)
    hits = (np.random.default_rng(2).random(40) < 0.4).astype(float)[concepts]
    order = np.random.default_rng(3).permutation(400)  # members of a cluster need not be neighbours
    low, high = metrics.bootstrap_interval(hits[order], clusters=[f"c{concept}" for concept in concepts[order]], seed=3)
    value = hits.mean()
    assert low < value < high and high - low == pytest.approx(2 * 1.96 * (value * (1 - value) / 40) ** 0.5, rel=0.1)
    assert metrics.bootstrap_interval(hits[order], clusters=[0] * 400) == pytest.approx((value, value))
    assert metrics.with_interval(hits[order], 3, concepts[order].tolist()) == pytest.approx(
        {"value": value, "low": low, "high": high})


def test_clusters_of_different_sizes_weigh_by_their_items():
    per_item, clusters = np.array([1.0, 0.0, 0.0, 0.0]), ["a", "b", "b", "b"]
    seen = set()
    metrics.bootstrap_interval(per_item, lambda drawn: seen.add(tuple(sorted(drawn))) or 0.0, clusters=clusters)
    assert seen == {(1.0, 1.0), (0.0, 0.0, 0.0, 1.0), (0.0,) * 6}


def test_clusters_of_one_item_each_are_independent_items():
    per_item = np.random.default_rng(1).random(50)
    assert metrics.bootstrap_interval(per_item, clusters=list(range(50, 0, -1))) == metrics.bootstrap_interval(per_item)
    with pytest.raises(ValueError, match="49 clusters for 50 items"):
        metrics.bootstrap_interval(per_item, clusters=list(range(49)))


def test_bootstrap_of_another_statistic_and_bad_input():
    low, high = metrics.bootstrap_interval(np.arange(101.0), statistic=np.median, samples=500)
    assert low < 50 < high
    for bad, message in ((np.array([]), "no items"), (np.array([1.0, np.nan]), "NaN")):
        with pytest.raises(ValueError, match=message):
            metrics.bootstrap_interval(bad)


def test_retrieval_summary_has_values_intervals_and_sizes():
    rng = np.random.default_rng(0)
    positives = np.eye(30, 40, dtype=bool)
    similarity = rng.normal(size=(30, 40)) + 2 * positives
    rank, clusters = metrics.ranks(similarity, positives), [i // 3 for i in range(30)]
    for options in ({}, {"seed": 4}, {"clusters": clusters}):
        summary = metrics.retrieval_summary(similarity, positives, **options)
        expected = {f"R@{k}": metrics.with_interval(metrics.hits_at_k(rank, k), **options) for k in (1, 5, 10)}
        expected["MRR@10"] = metrics.with_interval(metrics.reciprocal_at_k(rank, 10), **options)
        assert (summary.pop("queries"), summary.pop("candidates")) == (30, 40) and summary.keys() == expected.keys()
        for name, interval in expected.items():
            assert summary[name] == pytest.approx(interval, abs=1e-12)


def test_intervals_of_means_are_those_of_any_statistic():
    values, clusters = np.random.default_rng(1).normal(size=90), [i % 17 for i in range(90)]
    for options in ({}, {"seed": 5}, {"clusters": clusters}):
        general = metrics.bootstrap_interval(values, lambda drawn: drawn.mean(), **options)
        assert metrics.bootstrap_interval(values, **options) == pytest.approx(general, abs=1e-12)


def test_same_key_by_concept_or_name():
    matches = metrics.same_key(["a", "b"], ["a", "c", "b"], (["kucing", "ikan"], ["kucing", "ikan", "burung"]))
    np.testing.assert_array_equal(matches, [[True, False, False], [False, True, True]])
    with pytest.raises(ValueError, match="keys"):
        metrics.same_key(["a"], ["b"], (["x", "y"], ["z"]))
