"""Pictures in memory: an order that seed and epoch alone decide, each at most once, captions drawn anew."""

import hypothesis.strategies as st
import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from hypothesis import given, settings
from PIL import Image
from tiny import NAMES, batches, tiny_pairs, tiny_processor

from clipid_utils.data.batches.loader import load_pairs, load_records
from clipid_utils.data.captions import caption_ids


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def tokenize(processor):
    return processor.tokenize


def rows_of(batch, pairs):
    """The pictures of a batch; all of `tiny_pairs` differ."""
    number = {image.tobytes(): row for row, image in enumerate(pairs.images)}
    return [number[image.tobytes()] for image in batch["images"]]


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 500), batch_size=st.integers(2, 12))
def test_an_epoch_has_each_picture_once(tokenize, seed, epoch, batch_size):
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


def test_seed_and_epoch_change_the_order_and_the_captions(tokenize):
    pairs = tiny_pairs(12)
    orders, captions = set(), set()
    for seed in (0, 1):
        for epoch in (0, 1, 2):
            (batch,) = batches(pairs, tokenize, 12, seed=seed, epoch=epoch, length=12)
            rows = rows_of(batch, pairs)
            orders.add(tuple(rows))
            captions.add(batch["input_ids"][np.argsort(rows)].tobytes())
    assert len(orders) == 6 and len(captions) == 6


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), batch_size=st.sampled_from([2, 5, 30]))
def test_grouped_concepts_stay_together(tokenize, seed, batch_size):
    pairs = tiny_pairs(30)  # 12 names: two or three pictures of each
    orders = []
    for epoch in (0, 1):
        found = batches(pairs, tokenize, batch_size, seed=seed, epoch=epoch, length=12, group_concepts=True)
        rows = [row for batch in found for row in rows_of(batch, pairs)]
        assert len(set(rows)) == len(rows) == 30 // batch_size * batch_size
        assert (np.diff(pairs.concepts[rows]) != 0).sum() == len(set(pairs.concepts[rows])) - 1
        orders.append(rows)
    assert orders[0] != orders[1]


def test_captions_are_the_pictures_own_and_drawn_anew(processor):
    pairs = tiny_pairs(12)
    seen = {row: set() for row in range(12)}
    for epoch in range(24):
        (batch,) = batches(pairs, processor.tokenize, 12, seed=0, epoch=epoch, length=16)
        for place, row in enumerate(rows_of(batch, pairs)):
            caption = processor.tokenizer.decode(list(batch["input_ids"][place]))
            words = pairs.names[row].split() + pairs.keywords[row]
            # the decoder writes a hyphen with spaces around it
            assert any(word.replace("-", " - ") in caption for word in words), (caption, pairs.names[row])
            seen[row].add(caption)
    assert np.mean([len(captions) for captions in seen.values()]) > 5
    assert any("sebuah" in caption for caption in seen[3])  # a car, of the group "objects"


def test_captions_have_the_classifier_of_the_pictures_group(processor):
    pairs = tiny_pairs(12)
    pairs.names[:], pairs.groups[:], pairs.keywords[:] = ["okapi"] * 12, ["animals"] * 12, [[]] * 12
    texts = []
    for epoch in range(4):
        (batch,) = batches(pairs, lambda captions, *_, **__: texts.extend(captions) or {}, 12, seed=0, epoch=epoch,
                           length=16)
        np.testing.assert_array_equal(batch["caption_ids"], caption_ids(texts[-12:]))
    assert any("seekor okapi" in text for text in texts)


def test_the_shapes_of_a_batch(tokenize):
    batch = next(batches(tiny_pairs(8), tokenize, 4, seed=0, epoch=0, length=10))
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "images": ((4, 16, 16, 3), np.uint8), "concepts": ((4,), np.int32), "caption_ids": ((4, 2), np.int32),
        "may_flip": ((4,), np.bool_), "input_ids": ((4, 10), np.int32), "attention_mask": ((4, 10), np.int32),
        "truncated": ((4,), np.bool_),
    }


def test_a_batch_larger_than_the_data_is_refused(tokenize):
    assert len(list(batches(tiny_pairs(12), tokenize, 12, seed=0, epoch=0, length=12))) == 1
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
    assert part.keywords == [pairs.keywords[row] for row in (3, 0, 7)]
    assert part.groups == [pairs.groups[row] for row in (3, 0, 7)]
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


def test_pairs_of_records_to_measure_on(tmp_path):
    for number, colour in enumerate(["red", "white", "blue"]):
        Image.new("RGB", (32, 24), colour).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"broken")
    captions = [["Kucing", "hewan"], ["anjing"], ["kucing"], ["panah kiri"], ["anjing"]]
    paths = [str(tmp_path / f"{number}.png") for number in (0, 1, 2, 0, 9)]
    records = Dataset.from_dict({"image_path": paths, "captions": captions})
    with pytest.warns(UserWarning, match=r"^2 of 5 pictures are left out: .*1\.png: .*; .*9\.png: .*No such|no such"):
        pairs = load_records(records, 16, 9)
    assert pairs.images[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255], [255, 0, 0]]
    assert pairs.concepts.tolist() == [0, 0, 1] and pairs.names == ["Kucing", "kucing", "panah kiri"]
    assert pairs.keywords == [["hewan"], [], []] and pairs.may_flip.tolist() == [True, True, False]
    assert len(load_records(records, 16, 1)) == 1
    with pytest.raises(ValueError, match="none of the 1 pictures can be read"):
        load_records(records.select([1]), 16, 5)
