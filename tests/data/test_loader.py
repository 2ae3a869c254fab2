"""Batches: an order that seed and epoch alone decide, each picture at most once, captions drawn anew."""

import hypothesis.strategies as st
import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from hypothesis import given, settings
from PIL import Image
from tiny import NAMES, tiny_pairs, tiny_processor

from clipid_utils.data.batches.loader import batches, load_pairs


@pytest.fixture(scope="module")
def tokenize():
    return tiny_processor().tokenize


def rows_of(batch, pairs):
    """Which pictures a batch holds; all of `tiny_pairs` differ."""
    number = {image.tobytes(): row for row, image in enumerate(pairs.images)}
    return [number[image.tobytes()] for image in batch["images"]]


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 500), batch_size=st.integers(2, 12))
def test_an_epoch_holds_each_picture_once(tokenize, seed, epoch, batch_size):
    pairs = tiny_pairs(12)
    epoch_one = list(batches(pairs, tokenize, batch_size, seed=seed, epoch=epoch, length=12))
    assert len(epoch_one) == 12 // batch_size
    assert all(len(value) == batch_size for batch in epoch_one for value in batch.values())
    rows = [row for batch in epoch_one for row in rows_of(batch, pairs)]
    assert len(set(rows)) == len(rows)
    for batch in epoch_one:
        for place, row in enumerate(rows_of(batch, pairs)):
            assert batch["concepts"][place] == pairs.concepts[row]
            assert batch["may_flip"][place] == pairs.may_flip[row]
    again = list(batches(pairs, tokenize, batch_size, seed=seed, epoch=epoch, length=12))
    for one, other in zip(epoch_one, again, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_seed_and_epoch_change_the_order(tokenize):
    pairs = tiny_pairs(12)
    orders = {tuple(rows_of(next(batches(pairs, tokenize, 12, seed=seed, epoch=epoch, length=12)), pairs))
              for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), batch_size=st.sampled_from([2, 5, 30]))
def test_grouped_concepts_stand_next_to_each_other(tokenize, seed, batch_size):
    pairs = tiny_pairs(30)  # 12 names: two or three pictures of each
    epoch = [list(batches(pairs, tokenize, batch_size, seed=seed, epoch=number, length=12, group_concepts=True))
             for number in (0, 1)]
    for batch_list in epoch:
        rows = [row for batch in batch_list for row in rows_of(batch, pairs)]
        assert len(set(rows)) == len(rows) == 30 // batch_size * batch_size
        changes = (np.diff(pairs.concepts[rows]) != 0).sum()
        assert changes == len(set(pairs.concepts[rows])) - 1
    orders = [[row for batch in batch_list for row in rows_of(batch, pairs)] for batch_list in epoch]
    assert orders[0] != orders[1]


def test_captions_are_the_pictures_own_and_drawn_anew(tokenize):
    pairs, processor = tiny_pairs(12), tiny_processor()
    seen = {row: set() for row in range(12)}
    for epoch in range(12):
        (batch,) = batches(pairs, tokenize, 12, seed=0, epoch=epoch, length=16)
        for place, row in enumerate(rows_of(batch, pairs)):
            caption = processor.tokenizer.decode(list(batch["input_ids"][place]))
            words = pairs.names[row].split() + pairs.keywords[row]
            # the decoder writes a hyphen with spaces around it
            assert any(word.replace("-", " - ") in caption for word in words), (caption, pairs.names[row])
            seen[row].add(caption)
    assert np.mean([len(captions) for captions in seen.values()]) > 3


def test_the_shapes_of_a_batch(tokenize):
    batch = next(batches(tiny_pairs(8), tokenize, 4, seed=0, epoch=0, length=10))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "images": ((4, 16, 16, 3), np.uint8), "concepts": ((4,), np.int32), "may_flip": ((4,), np.bool_),
        "input_ids": ((4, 10), np.int32), "attention_mask": ((4, 10), np.int32), "truncated": ((4,), np.bool_),
    }


def test_a_batch_larger_than_the_data_is_refused(tokenize):
    with pytest.raises(ValueError, match="batch_size 13 is more than the 12 pictures"):
        next(batches(tiny_pairs(12), tokenize, 13, seed=0, epoch=0, length=12))


def test_an_empty_caption_is_an_error(tokenize):
    pairs = tiny_pairs(4)
    pairs.names[2] = " "
    with pytest.raises(ValueError, match="empty caption"):
        next(batches(pairs, tokenize, 4, seed=0, epoch=0, length=12))


def test_take_keeps_rows_together():
    pairs = tiny_pairs(12)
    part = pairs.take([3, 0, 7])
    assert len(part) == 3 and part.names == [NAMES[3], NAMES[0], NAMES[7]]
    np.testing.assert_array_equal(part.images, pairs.images[[3, 0, 7]])
    np.testing.assert_array_equal(part.may_flip, pairs.may_flip[[3, 0, 7]])
    assert pairs.take(slice(4, 6)).concepts.tolist() == [4, 5]
    assert pairs.take(pairs.concepts < 2).names == NAMES[:2]


def test_pairs_of_a_dataset():
    """Rows as the picture dictionary has them: concepts by name, flips by caption and by letters in the picture."""
    colours = ["red", "white", "blue", "green"]
    dataset = Dataset.from_dict(
        {
            "image": [Image.new("RGB", (32, 32), colour) for colour in colours],
            "name_id": ["Kucing", "panah kiri", "kucing", "huruf A"],
            "keywords_id": [["hewan"], ["arah"], [], ["abjad"]],
            "group": ["animals", "symbols", "animals", "letters"],
            "group_id": ["hewan", "simbol & rambu", "hewan", "huruf & angka"],
            "has_text": [False, False, False, True],
        }
    ).cast_column("image", ImageFeature())
    pairs = load_pairs(dataset, 16)
    assert pairs.images.shape == (4, 16, 16, 3)
    assert pairs.images[0, 0, 0].tolist() == [255, 0, 0] and pairs.images[3, 5, 5].tolist() == [0, 128, 0]
    assert pairs.concepts[0] == pairs.concepts[2] and len(set(pairs.concepts.tolist())) == 3
    assert pairs.may_flip.tolist() == [True, False, True, False]
    assert pairs.names == ["Kucing", "panah kiri", "kucing", "huruf A"] and pairs.groups[2] == "animals"
    assert pairs.keywords == [["hewan"], ["arah", "simbol dan rambu"], ["hewan"], ["abjad", "huruf dan angka"]]
