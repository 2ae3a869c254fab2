"""Streams: WebDataset tars as they are found, other columns, each row once an epoch, the shares of processes."""

import io
import itertools
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_processor

from clipid_utils.data.batches import loader
from clipid_utils.data.batches.loader import stream_feed
from clipid_utils.data.batches.streams import EndlessRows, picture_and_captions, tar_stream


@pytest.fixture(scope="module")
def tokenize():
    return tiny_processor().tokenize


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 255 - number, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members: dict[str, bytes], mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def found(files, columns=(None, None)) -> list:
    """The samples that have both, as (number in the picture's colour, captions)."""
    pairs = [picture_and_captions(row, columns) for row in tar_stream(files)]
    return [(Image.open(io.BytesIO(picture["bytes"])).getpixel((0, 0))[0], captions)
            for picture, captions in pairs if picture["bytes"] and captions]


WILD = {
    "compound": ({"a.input.jpg": png(1), "a.outputs.txt": b"kucing"}, [(1, ["kucing"])]),
    "capitals": ({"a.JPG": png(1), "a.TXT": b"kucing"}, [(1, ["kucing"])]),
    "folders": ({"x/": b"", "x/a.png": png(1), "x/a.txt": b"satu", "y/a.webp": png(2), "y/a.txt": b"dua"},
                [(1, ["satu"]), (2, ["dua"])]),
    "lines": ({"a.jpg": png(1), "a.txt": b"\xef\xbb\xbfkucing\r\n \nhewan\n"}, [(1, ["kucing", "hewan"])]),
    "json of one": ({"a.jpg": png(1), "a.json": b'{"caption": "kucing", "captions": null}'}, [(1, ["kucing"])]),
    "json of several": ({"a.jpg": png(1), "a.Meta.JSON": b'{"captions": ["kucing", null, " ", "hewan"]}'},
                        [(1, ["kucing", "hewan"])]),
    "json list": ({"a.jpg": png(1), "a.json": b'["kucing", "hewan"]'}, [(1, ["kucing", "hewan"])]),
    "text before json": ({"a.json": b'{"caption": "json"}', "a.txt": b"teks", "a.jpg": png(1)}, [(1, ["teks"])]),
    "json for an empty text": ({"a.txt": b"", "a.json": b'{"text": "json"}', "a.jpg": png(1)}, [(1, ["json"])]),
    "an exact name first": ({"a.mask.png": png(2), "a.png": png(1), "a.license.txt": b"CC", "a.txt": b"teks"},
                            [(1, ["teks"])]),
    "samples that lack a part": (
        {"a.txt": b"a", "b.jpg": png(2), "c.jpg": png(3), "c.txt": b"c", "d.jpg": b"", "d.txt": b"d", "e.cls": b"7",
         "f.jpg": png(6), "f.txt": b"\xff", "g.jpg": png(7), "g.json": b"{", "h.jpg": png(8), "h.json": b"5",
         "i.jpg": png(9), "i.json": b'{"url": "x"}', ".hidden.jpg": png(10), "j.jpg": png(11), "j.txt": b"j"},
        [(3, ["c"]), (11, ["j"])]),
}


@pytest.mark.parametrize("kind", WILD)
def test_tars_as_they_are_found(tmp_path, kind):
    members, expected = WILD[kind]
    assert found([write_tar(tmp_path / "a.tar", members)]) == expected
    assert found([str(write_tar(tmp_path / "a.tar.gz", members, "w:gz"))]) == expected


def test_columns_choose_the_endings(tmp_path):
    members = {"a.left.jpg": png(1), "a.Right.jpg": png(2), "a.en.txt": b"cat", "a.id.txt": b"kucing"}
    assert found([write_tar(tmp_path / "a.tar", members)], ("right.jpg", "id.txt")) == [(2, ["kucing"])]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_is_cut_off_is_an_error(tmp_path, mode):
    path = write_tar(tmp_path / "a.tar", {f"{n}.{end}": png(n) for n in range(4) for end in ("jpg", "txt")}, mode)
    whole = path.read_bytes()
    for size in (3, 512, 1024, 1536, 5120, 8 * 1024) if mode == "w" else (3, len(whole) // 2, len(whole) - 2):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.tar: not a whole tar .*: fetch it again"):
            list(tar_stream([path]))
    path.write_bytes(whole)
    assert len(list(tar_stream([path]))) == 4


def test_samples_that_lack_a_part_are_skipped_and_counted(tokenize, tmp_path):
    members = {}
    for number in range(30):
        members |= {f"{number:02}.jpg": png(number)} if number % 5 else {}
        members |= {f"{number:02}.txt": b"kucing %d" % number} if number % 3 else {}
    path = write_tar(tmp_path / "a.tar", members)
    feed = stream_feed(tar_stream([path]), tokenize, 8, 4, seed=0, length=12, shuffle_window=1)
    iterator = iter(feed.dataset)
    with pytest.warns(UserWarning) as warned:
        batches = list(itertools.islice(iterator, 4))
    iterator.close()
    numbers = [image[0, 0, 0] for batch in batches for image in batch["images"]]
    assert numbers == [number for number in range(30) if number % 5 and number % 3]
    said = [str(warning.message) for warning in warned]
    for line, name, part, count in zip(said, ("03.jpg", "05", "09.jpg"), ("caption", "picture", "caption"), (1, 2, 4),
                                       strict=False):
        assert line == f"{path}/{name}: it has no {part}: skipped, a different picture takes its place ({count} so far)"
    assert len(said) >= 3


@pytest.mark.parametrize("members", [{"a.jpg": png(1), "a.cls": b"7"}, {"a.txt": b"kucing", "a.cls": b"7"},
                                     {"a.jpg": png(1), "a.cls": b"7", "b.txt": b"kucing"},
                                     {"a.jpg": b"broken", "a.txt": b"kucing"}])
def test_a_stream_without_usable_rows_ends_the_run(tokenize, tmp_path, monkeypatch, members):
    monkeypatch.setattr(loader, "MOST_UNREADABLE", 6)
    stream = tar_stream([write_tar(tmp_path / "a.tar", members)])
    iterator = iter(stream_feed(stream, tokenize, 8, 1, seed=0, length=12).dataset)
    with pytest.warns(UserWarning, match=r"a\.tar/.*skipped"), pytest.raises(
            ValueError, match="none of 6 rows one after the other .* the last is .*a.tar.* with the columns __key__.*: "
                              "check the pictures, or name the columns with --image-column and --caption-column"):
        next(iterator)
    iterator.close()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A stream of four tars with seven samples each."""
    folder = tmp_path_factory.mktemp("tars")
    return tar_stream([write_tar(folder / f"{shard}.tar", {
        f"{number:02}.{end}": content for number in range(7 * shard, 7 * shard + 7)
        for end, content in (("png", png(number)), ("txt", b"kucing %d\nhewan %d" % (number, number)))
    }) for shard in range(4)])


def epochs_of(stream, count, *share, seed=0):
    rows = itertools.takewhile(lambda row: row[0] < count, iter(EndlessRows(stream, seed, *share)))
    return [[row["__key__"][-2:] for _, row in group] for _, group in itertools.groupby(rows, key=lambda row: row[0])]


@pytest.mark.parametrize("count", [2, 3])  # 3 does not divide the 4 files: rows are shared then
def test_processes_share_the_rows_of_a_stream(four, count):
    shares = [epochs_of(four, 1, index, count)[0] for index in range(count)]
    assert sorted(sum(shares, [])) == [f"{number:02}" for number in range(28)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(ValueError, match="no rows for process 8 of 99"):
        next(iter(EndlessRows(four.take(1), 0, 8, 99)))


def test_each_seed_and_epoch_has_its_own_order_of_files(four):
    orders = [tuple(order) for seed in range(3) for order in epochs_of(four, 3, seed=seed)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len(set(orders)) > 4  # of 9, drawn among the 24 orders of four files
    assert len({orders[1], orders[3]}) == len({orders[2], orders[6]}) == 2  # not the sum of seed and epoch


def test_captions_are_drawn_again_each_epoch(four, tokenize):
    drawn = {}
    iterator = iter(stream_feed(four, tokenize, 8, 28, seed=0, length=12, shuffle_window=1).dataset)
    for batch in itertools.islice(iterator, 6):
        assert len(set(batch["concepts"].tolist())) == 28
        for concept, ids in zip(batch["concepts"].tolist(), batch["caption_ids"].tolist(), strict=True):
            drawn.setdefault(concept, set()).add(tuple(ids))
    iterator.close()
    assert len(drawn) == 28 and np.mean([len(ids) for ids in drawn.values()]) > 1.8


def test_columns_of_other_streams():
    captions = ["a cat", None, " "]
    assert picture_and_captions({"image": b"1", "captions": captions}) == (b"1", ["a cat"])
    assert picture_and_captions({"image_path": "a.jpg", "captions": None, "text": "a\nb"}) == ("a.jpg", ["a\nb"])
    row = {"jpg": {"bytes": b"1", "path": "a.jpg"}, "json": {"caption": "kucing"}, "__key__": "a"}
    assert picture_and_captions(row) == ({"bytes": b"1", "path": "a.jpg"}, ["kucing"])
    assert picture_and_captions({"Foto": "a.jpg", "teks": "x", "text": "y"}, ("foto", "teks")) == ("a.jpg", ["x"])
    assert picture_and_captions({"Foto": "a.jpg", "teks": "x", "text": "y"}, ("foto", None)) == ("a.jpg", ["y"])
    assert picture_and_captions({"other": 1}) == (None, [])


def test_a_stream_of_parquet_files(tokenize, tmp_path):
    table = datasets.Dataset.from_list([{"image": {"bytes": png(i), "path": None}, "text": f"kucing {i}"}
                                        for i in range(4)]).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "a.parquet")
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True)
    iterator = iter(stream_feed(stream, tokenize, 8, 4, seed=0, length=12).dataset)
    batch = next(iterator)
    iterator.close()
    assert batch["images"].shape == (4, 8, 8, 3) and len(set(batch["concepts"].tolist())) == 4
