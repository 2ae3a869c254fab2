"""Feeds: the same batches for any number of workers, threads and processes, and the same again after a resumption."""

import io
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import threading
import zlib
from pathlib import Path

import datasets
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import batches, tiny_pairs, tiny_processor

from clipid_utils.data.batches import loader
from clipid_utils.data.batches.loader import dictionary_feed, load_pairs, load_records, records_feed, stream_feed
from clipid_utils.data.batches.streams import tar_stream
from clipid_utils.data.captions import caption_ids, read_captions, write_captions
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.training.loss import positive_pairs

COUNT, SIZE = 23, 24


@pytest.fixture(scope="module")
def tokenize():
    return tiny_processor().tokenize


def jpeg(number: int) -> bytes:
    """A file with one colour, which tells its number."""
    file = io.BytesIO()
    Image.new("RGB", (30 + number, 40), (10 * number, 255 - 10 * number, 128)).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, cache = tmp_path_factory.mktemp("pictures"), datasets.config.HF_DATASETS_CACHE
    for number in range(COUNT):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    rows = ({"image_path": f"{number}.jpg", "captions": [f"kucing {number}", f"panah kiri {number}"]}
            for number in range(COUNT))
    write_captions(rows, folder / "captions.jsonl")
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    yield folder
    datasets.config.HF_DATASETS_CACHE = cache


@pytest.fixture(scope="module")
def records(folder):
    return read_captions(folder / "captions.jsonl")


@pytest.fixture(scope="module")
def tars(folder):
    """Four WebDataset files of 7 pictures, one of them broken."""
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(7 * shard, 7 * shard + 7):
                picture = b"broken" if number == 9 else jpeg(number % 26)
                for ending, content in (("jpg", picture), ("json", b'{"caption": "kucing %d"}' % number)):
                    info = tarfile.TarInfo(f"{number:05d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return tar_stream(sorted(folder.glob("*.tar")))


def rows_of(batch, records) -> list[int]:
    """The rows of a batch of records, found by its concepts."""
    sums = [zlib.crc32(os.fsencode(path)) for path in records["image_path"]]
    return [sums.index(concept) for concept in batch["concepts"].view(np.uint32)]


def taken(feed, count):
    iterator = iter(getattr(feed, "dataset", feed))
    try:
        return list(itertools.islice(iterator, count))
    finally:
        iterator.close()


def assert_equal_batches(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def joined(shares):
    """The rows that several processes see, put together."""
    return [{key: np.concatenate([batch[key] for batch in parts]) for key in parts[0]}
            for parts in zip(*shares, strict=True)]


def assert_resumes(feed, count=14, stops=(0, 1, 3, 6, 7, 10)):
    iterator, states, whole = iter(feed.dataset), [], []
    for _ in range(count):
        states.append(json.dumps(iterator.get_state()))
        whole.append(next(iterator))
    for stop in stops:
        for other in (iter(feed.dataset), iterator):  # a new one, and one that goes back
            other.set_state(json.loads(states[stop]))
            assert json.dumps(other.get_state()) == states[stop]
            assert_equal_batches(itertools.islice(other, 4), whole[stop : stop + 4])
    iterator.close()


def test_a_dictionary_feed_is_its_epochs_one_after_the_other(tokenize):
    pairs = tiny_pairs(26)
    feed = dictionary_feed(pairs, tokenize, 8, seed=2, length=12, group_concepts=True)
    assert feed.steps_per_epoch == 3 and feed.batch_size == 8
    epochs = [batches(pairs, tokenize, 8, seed=2, epoch=epoch, length=12, group_concepts=True) for epoch in range(3)]
    assert_equal_batches(taken(feed, 9), itertools.chain(*epochs))


@pytest.mark.parametrize("grouped", [False, True])
def test_processes_share_the_batches_of_a_dictionary(tokenize, grouped):
    def feed(**options):
        return dictionary_feed(tiny_pairs(26), tokenize, 8, seed=2, length=12, group_concepts=grouped, **options)

    shares = [taken(feed(process_index=index, process_count=4), 7) for index in range(4)]
    assert all(len(batch["images"]) == 2 for share in shares for batch in share)
    assert_equal_batches(joined(shares), taken(feed(), 7))


def test_a_dictionary_feed_resumes(tokenize):
    assert_resumes(dictionary_feed(tiny_pairs(26), tokenize, 8, seed=2, length=12))


def test_records_come_once_an_epoch_with_a_caption_of_their_own(tokenize, records):
    feed = records_feed(records, tokenize, SIZE, 5, seed=0, length=12)
    assert feed.steps_per_epoch == 4
    decode = tiny_processor().tokenizer.decode
    orders, captions = [], {}
    found = taken(feed, 32)
    for epoch in range(8):
        rows = [row for batch in found[4 * epoch : 4 * epoch + 4] for row in batch["concepts"].tolist()]
        assert len(set(rows)) == 20
        orders.append(tuple(rows))
    assert len(set(orders)) == 8
    for batch in found:
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            "images": ((5, SIZE, SIZE, 3), np.uint8), "concepts": ((5,), np.int32), "caption_ids": ((5, 2), np.int32),
            "may_flip": ((5,), np.bool_), "input_ids": ((5, 12), np.int32), "attention_mask": ((5, 12), np.int32),
            "truncated": ((5,), np.bool_)}
        for place, row in enumerate(rows_of(batch, records)):
            assert abs(batch["images"][place].astype(int) - (10 * row, 255 - 10 * row, 128)).max() < 6
            caption = decode(list(batch["input_ids"][place]))
            assert ("kiri" in caption) != batch["may_flip"][place]
            written = f"{'panah kiri' if 'kiri' in caption else 'kucing'} {row}"
            assert (batch["caption_ids"][place] == caption_ids([written])).all()
            captions.setdefault(row, set()).add(caption)
    assert sum(len(drawn) == 2 for drawn in captions.values()) > 15


@pytest.mark.parametrize("inside", [False, True])
def test_records_of_one_picture_are_positives_of_each_other(tokenize, records, folder, inside):
    twice = datasets.concatenate_datasets([records.select(range(4))] * 2)
    if inside:
        pictures = [{"bytes": Path(path).read_bytes(), "path": None} for path in twice["image_path"]]
        twice = twice.remove_columns("image_path").add_column("image", pictures).cast_column("image", datasets.Image())
    (batch,) = taken(records_feed(twice, tokenize, SIZE, 8, seed=0, length=12), 1)
    assert sorted(np.unique(batch["concepts"], return_counts=True)[1]) == [2, 2, 2, 2]
    same = (batch["images"][:, None] == batch["images"][None]).all(axis=(2, 3, 4))
    np.testing.assert_array_equal(positive_pairs({"concepts": jnp.asarray(batch["concepts"])}), same)


def test_processes_share_the_batches_of_records(tokenize, records):
    def feed(**options):
        return records_feed(records, tokenize, SIZE, 6, seed=7, length=12, **options)

    shares = [taken(feed(process_index=index, process_count=3), 5) for index in range(3)]
    assert_equal_batches(joined(shares), taken(feed(), 5))


def test_a_records_feed_resumes(tokenize, records):
    assert_resumes(records_feed(records, tokenize, SIZE, 5, seed=1, length=12))


def test_each_seed_and_epoch_has_its_own_order_and_captions(tokenize, records):
    orders, draws = set(), set()
    for seed in (0, 1, 2**32 - 1):
        for batch in taken(records_feed(records, tokenize, SIZE, COUNT, seed=seed, length=12), 3):
            orders.add(tuple(batch["concepts"].tolist()))
            draws.add(tuple(batch["may_flip"].tolist()))  # which of the two captions was drawn, place by place
    assert len(orders) == len(draws) == 9


def broken_records(folder, tmp_path, broken):
    for number in range(COUNT):
        content = (folder / f"{number}.jpg").read_bytes()
        (tmp_path / f"{number}.jpg").write_bytes(content[:200] if number in broken else content)
    rows = ({"image_path": f"{number}.jpg", "captions": ["kucing"]} for number in range(COUNT))
    write_captions(rows, tmp_path / "captions.jsonl")
    return read_captions(tmp_path / "captions.jsonl")


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_the_batches_are_the_same_for_any_number_of_workers(tokenize, folder, tmp_path):
    records = broken_records(folder, tmp_path, broken=(4, 5, 22))
    threads = records_feed(records, tokenize, SIZE, 6, seed=7, length=12)
    workers = records_feed(records, tokenize, SIZE, 6, seed=7, length=12, workers=2)
    expected, iterator = taken(threads, 9), iter(workers.dataset)
    iterator.set_state({"step": 2})
    with pytest.warns(UserWarning, match=r"\d\.jpg: .*: skipped, .* \(1 so far\)"):
        assert_equal_batches(itertools.islice(iterator, 4), expected[2:6])
    assert len(multiprocessing.active_children()) >= 2
    other = iter(threads.dataset)
    other.set_state(iterator.get_state())  # a run may resume with a different number of workers
    assert_equal_batches(itertools.islice(other, 3), expected[6:])
    other.close()
    assert type(next(iterator)["images"]) is np.ndarray  # none of Grain's shared memory
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(RuntimeError, match="Worker process was terminated unexpectedly with exit code -9"):
        taken(iterator, 40)  # those made before still come


def test_a_broken_picture_is_replaced_by_the_next_and_said(tokenize, folder, tmp_path):
    records = broken_records(folder, tmp_path, broken=(4, 5, 22))
    feed = records_feed(records, tokenize, SIZE, COUNT, seed=0, length=12)
    with pytest.warns(UserWarning, match=r"\d\.jpg: .*: skipped, a different picture takes its place \(1 so far\)"):
        (batch,) = taken(feed, 1)
    expected = [0, 0, 1, 2, 3, *[6] * 3, *range(7, 22)]
    rows = rows_of(batch, records)
    assert sorted(rows) == expected
    for row, image in zip(rows, batch["images"], strict=True):
        assert abs(image[8, 8].astype(int) - (10 * row, 255 - 10 * row, 128)).max() < 6


def test_when_no_picture_can_be_read_it_is_an_error(tokenize, folder, tmp_path):
    records = broken_records(folder, tmp_path, broken=range(COUNT))
    with pytest.raises(ValueError, match=f"none of {COUNT} pictures one after the other .*, the last is .*jpg: are"):
        taken(records_feed(records, tokenize, SIZE, 4, seed=0, length=12), 1)


def test_cut_captions_are_marked(tokenize, records):
    with pytest.warns(UserWarning, match="texts are cut to 3 tokens"):
        (batch,) = taken(records_feed(records, tiny_processor().tokenize, SIZE, 5, seed=0, length=3), 1)
    assert batch["truncated"].all() and batch["input_ids"].shape == (5, 3)
    (batch,) = taken(records_feed(records, tokenize, SIZE, 5, seed=0, length=16), 1)
    assert not batch["truncated"].any()


@pytest.mark.parametrize("options, message", [
    ({"batch_size": 5, "process_count": 2}, "batch_size 5 cannot be divided among 2 processes"),
    ({"batch_size": 24}, "batch_size 24 is more than the 23 pictures"),
])
def test_what_does_not_fit_is_refused(tokenize, records, options, message):
    with pytest.raises(ValueError, match=message):
        records_feed(records, tokenize, SIZE, seed=0, length=12, **options)


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize("window", [1, 5, 100])
def test_a_stream_of_tars_resumes(tokenize, tars, window):
    feed = stream_feed(tars, tokenize, SIZE, 4, seed=3, length=12, shuffle_window=window)
    assert_resumes(feed, 24, (0, 1, 6, 7, 13, 20))


def test_a_stream_has_each_row_once_an_epoch_in_its_own_order(tokenize, tars):
    feed = stream_feed(tars, tokenize, SIZE, 9, seed=3, length=12, shuffle_window=7)
    assert feed.steps_per_epoch is None
    with pytest.warns(UserWarning, match=r"1\.tar/00009\.jpg: .* skipped, .*\(1 so far\)"):
        found = taken(feed, 6)
    epochs = [np.concatenate([batch["concepts"] for batch in found[start : start + 3]]) for start in (0, 3)]
    # of 28: one is broken, two files are doubles
    assert [(len(epoch), len(set(epoch.tolist()))) for epoch in epochs] == [(27, 25), (27, 25)]
    assert (epochs[0] != epochs[1]).any()
    assert {key: (value.shape, value.dtype) for key, value in found[0].items()} == {
        "images": ((9, SIZE, SIZE, 3), np.uint8), "concepts": ((9,), np.int32), "caption_ids": ((9, 2), np.int32),
        "may_flip": ((9,), np.bool_), "input_ids": ((9, 12), np.int32), "attention_mask": ((9, 12), np.int32),
        "truncated": ((9,), np.bool_)}


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_the_windows_of_neighbouring_seeds_differ(tokenize, tars):
    """Window 1 of a seed must not be shuffled as window 0 of the next seed."""
    seeds = [loader._shuffle_seed(seed) for seed in range(5)]
    assert all(abs(one - other) > 1000 for one, other in itertools.combinations(seeds, 2))
    rows = [taken(stream_feed(tars, tokenize, SIZE, 7, seed=seed, length=12, shuffle_window=7), 2) for seed in (0, 1)]
    orders = [[batch["concepts"].tolist() for batch in batches] for batches in rows]
    assert orders[0] != orders[1]


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_closed_stream_leaves_no_thread(tokenize, tars):
    before = threading.active_count()
    feed = stream_feed(tars, tokenize, SIZE, 4, seed=3, length=12)
    taken(feed, 3)
    next(iter(feed.dataset))  # not closed, but dropped
    assert threading.active_count() == before


def test_a_program_may_end_with_an_open_stream(folder, tars):
    program = f"""
import numpy as np
from clipid_utils.data.batches.loader import stream_feed
from clipid_utils.data.batches.streams import tar_stream
tokenize = lambda texts, length, **options: {{"input_ids": np.zeros((len(texts), length), np.int32)}}
stream = tar_stream(["{folder}/0.tar", "{folder}/2.tar"])
feed = stream_feed(stream, tokenize, {SIZE}, 4, seed=0, length=12)
iterator = iter(feed.dataset)
next(iterator)
print("got one")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "got one\n", "")


def through_every_feed(folder, tokenize, decode) -> list[np.ndarray]:
    """The images of each feed, and of the pictures in memory, for two records of a.jpg."""
    paths = [{"image_path": str(folder / "a.jpg"), "captions": ["kucing"]}] * 2
    write_captions(paths, folder / "a.jsonl")
    write_captions([{"image": (folder / "a.jpg").read_bytes(), "captions": ["kucing"]}] * 2, folder / "a.parquet")
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(folder / "a.jpg", "a.jpg")
        tar.add(folder / "a.jsonl", "a.txt")
    options = {"seed": 0, "length": 12, "decode": decode}
    listed, embedded = (read_captions(folder / f"a.{kind}") for kind in ("jsonl", "parquet"))
    feeds = [records_feed(records, tokenize, SIZE, 2, **options) for records in (listed, embedded)]
    feeds.append(stream_feed(tar_stream([folder / "a.tar"]), tokenize, SIZE, 2, **options))
    texts = {"name_id": "kucing", "keywords_id": [], "group": "animals", "group_id": "hewan", "has_text": False}
    rows = datasets.Dataset.from_list([texts] * 2).add_column("image", [str(folder / "a.jpg")] * 2)
    rows = rows.cast_column("image", datasets.Image())
    pairs = [load_pairs(rows, SIZE, decode), *(load_records(each, SIZE, 2, decode) for each in (listed, embedded))]
    return [*(taken(feed, 1)[0]["images"] for feed in feeds), *(pair.images for pair in pairs)]


@pytest.fixture
def photograph(tmp_path):
    blocks = np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((64, 36), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg")
    return tmp_path


def stretched(picture) -> np.ndarray:
    """A picture as no other code here decodes it."""
    with Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture) as image:
        return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)) // 2


def test_every_feed_decodes_with_the_given_function(tokenize, photograph):
    expected = stretched(photograph / "a.jpg")
    for images in through_every_feed(photograph, tokenize, stretched):
        assert images.shape == (2, SIZE, SIZE, 3) and (images == expected).all()


@pytest.mark.parametrize("settings", [
    {}, {"resize": 30}, {"resize": (SIZE, SIZE), "resample": Image.Resampling.BILINEAR},
    {"resize": (30, 28), "resample": Image.Resampling.LANCZOS}, {"resize": 16},
])
def test_training_and_use_see_the_same_pixels(photograph, settings):
    tokenizer = tiny_processor().tokenizer
    processor = CLIPProcessor(tokenizer, SIZE, 12, **settings)
    expected = processor(images=[photograph / "a.jpg"])["pixel_values"][0]
    default = CLIPProcessor(tokenizer, SIZE, 12)(images=[photograph / "a.jpg"])["pixel_values"][0]
    assert not settings or np.abs(expected - default).max() > 0.05
    for images in through_every_feed(photograph, processor.tokenize, processor.decoder):
        np.testing.assert_array_equal(processor.normalize(images), [expected] * 2)
