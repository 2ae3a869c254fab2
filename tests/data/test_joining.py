"""Sets joined into training and validation: no picture or near copy on both sides, in every order of the sets."""

import hashlib
import io
import json
from collections import Counter

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_near_copies import all_with_all, encoded, picture, random_keys

from clipid_utils import files as files_module
from clipid_utils.data.captions import read_captions, write_captions
from clipid_utils.data.cleaning import near_copies
from clipid_utils.data.cleaning.joining import HELD_OUT, TRAIN, UNREADABLE, VALIDATION, join, sides
from clipid_utils.data.cleaning.near_copies import Signatures
from clipid_utils.data.report import Report


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows_of_pictures(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with many near copies, some of the very same bytes, one unreadable."""
    rng = np.random.default_rng(seed)
    keys, thumbnails = random_keys(seed, count)
    keys["sha256"] = rng.integers(1, 256, (count, 32))
    again = rng.integers(0, count, count + 3)
    keys, thumbnails = keys[again], thumbnails[again]
    keys["sha256"][0] = 0
    return keys, thumbnails


def copies(keys: np.ndarray, thumbnails: np.ndarray) -> np.ndarray:
    """The rows that are near copies [N, N], compared one by one, also in the mirror; rows of the same bytes too."""
    seen, mirrored = Signatures(keys["hash"], thumbnails), Signatures(keys["mirrored"], thumbnails[:, :, ::-1])
    same = (keys["sha256"][:, None] == keys["sha256"]).all(2)
    return all_with_all(seen, seen) | all_with_all(mirrored, seen) | same


MANY = st.tuples(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([0.0, 0.2, 0.5, 1.0]))


@settings(max_examples=40)
@given(MANY, st.data())
def test_sides_keep_their_laws(made, data):
    (seed, count, share), rng = made, np.random.default_rng(data.draw(st.integers(0, 99)))
    keys, thumbnails = rows_of_pictures(seed, count)
    held = rng.random(len(keys)) < data.draw(st.sampled_from([0.0, 0.1]))
    side, near = sides(keys, thumbnails.__getitem__, held, share), copies(keys, thumbnails)
    same = (keys["sha256"][:, None] == keys["sha256"]).all(2)
    readable = keys["sha256"].any(1)
    assert ((side == UNREADABLE) == ~readable).all()
    # held out: the rows that are named, and every near copy of them
    assert ((side == HELD_OUT) == (readable & (held | near[held & readable].any(0)))).all()
    # no picture and no near copy on both sides; validation is all that is drawn and has no near copy
    assert not near[np.ix_(side == VALIDATION, side == TRAIN)].any()
    drawn = np.array([int.from_bytes(key[:8].tobytes(), "big") / 2**64 < share for key in keys["sha256"]])
    alone = ~(near & ~same)[:, readable].any(1)
    assert ((side == VALIDATION) == (readable & (side != HELD_OUT) & drawn & alone)).all()
    assert (same <= (side[:, None] == side)).all()
    # the order of the rows does not matter
    order = rng.permutation(len(keys))
    assert (sides(keys[order], thumbnails[order].__getitem__, held[order], share) == side[order]).all()
    # more rows bring no picture from training to validation, and a greater share brings none back
    some = np.sort(order[: len(order) // 2 + 1])
    fewer = sides(keys[some], thumbnails[some].__getitem__, held[some], share)
    assert (side[some][fewer == TRAIN] != VALIDATION).all()
    assert (sides(keys, thumbnails.__getitem__, held, 1.0)[side == VALIDATION] == VALIDATION).all()
    if share == 0:
        assert (side != VALIDATION).all()


def write_set(folder, name: str, pictures: dict[str, bytes], **keys) -> str:
    folder.mkdir(exist_ok=True)
    for file, content in pictures.items():
        (folder / file).write_bytes(content)
    lines = [{"image_path": file, "captions": [f"{name} {file}", "lagi"], **keys} for file in pictures]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(folder / f"{name}.jsonl")


def joined(tmp_path, files, **options) -> tuple[dict[str, list[dict]], Report, dict]:
    report, work = Report(), options.pop("work", tmp_path / "work")
    counts = join(files, tmp_path / "train.jsonl", tmp_path / "validation.jsonl", report, work=work, **options)
    found = {}
    for name in ("train", "validation"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
        assert all((tmp_path / row["image_path"]).is_file() and row["split"] == name for row in found[name])
        assert Counter(row["source"] for row in found[name]) == counts[name]
    return found, report, counts


@pytest.fixture
def files(tmp_path):
    """Three sets: pictures of their own, one of the same bytes in two sets, and one smaller in the third."""
    one = {f"{seed}.png": encoded(picture(seed)) for seed in range(24)}
    two = {f"{seed}.png": encoded(picture(seed)) for seed in range(100, 124)} | {"same.png": one["0.png"]}
    three = {f"{seed}.jpg": encoded(picture(seed, 60, 40), "JPEG", quality=85) for seed in (1, 2, 101)}
    return [write_set(tmp_path / "one", "one", one, source="coco"),
            write_set(tmp_path / "two", "two", two, source="cc3m", split="train"),
            write_set(tmp_path / "three", "three", three)]  # as the ancestor wrote them


def names(rows: list[dict]) -> list[str]:
    return sorted(row["image_path"] for row in rows)


def test_sets_are_split_by_picture_whatever_their_order(tmp_path, files):
    found, report, _ = joined(tmp_path, files, validation_share=0.5)
    everything = names(found["train"]) + names(found["validation"])
    assert len(everything) == len(set(everything)) == report.kept == 52 and not report.dropped
    assert 8 < len(found["validation"]) < 40
    for name in ("train", "validation"):
        if "one/0.png" in names(found[name]):
            assert "two/same.png" in names(found[name])
    assert {"one/1.png", "one/2.png", "two/101.png", "three/1.jpg"} <= set(names(found["train"]))
    drawn = {row["image_path"] for row in found["validation"]}
    for path in everything:
        if hashlib.sha256((tmp_path / path).read_bytes()).digest() >= b"\x80":
            assert path not in drawn  # by the content alone
    (tmp_path / "again").mkdir()
    other, _, _ = joined(tmp_path, files[::-1], validation_share=0.5, work=tmp_path / "again")
    assert {name: names(rows) for name, rows in other.items()} == {name: names(rows) for name, rows in found.items()}
    assert found["train"][0]["captions"] == [f"one {found['train'][0]['image_path'][4:]}", "lagi"]


def test_signatures_are_kept_for_the_next_call_until_the_set_changes(tmp_path, files, monkeypatch):
    signed, sign = [], near_copies.sign
    monkeypatch.setattr(near_copies, "sign", lambda picture: signed.append(picture) or sign(picture))
    monkeypatch.setattr(files_module, "HEAD", 9)  # the change below is further on
    found, _, _ = joined(tmp_path, files)
    assert len(signed) == 52
    assert joined(tmp_path, files)[0] == found and len(signed) == 52
    path = tmp_path / "one/one.jsonl"
    first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([second, first, *rest]))  # of the same size: only the time tells
    joined(tmp_path, files)
    assert len(signed) == 52 + 24


def test_a_picture_with_only_a_mirrored_copy_is_trained_on(tmp_path):
    kinds = (picture(1), picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT), picture(2))
    path = write_set(tmp_path / "one", "one", {f"{i}.png": encoded(image) for i, image in enumerate(kinds)})
    found, _, _ = joined(tmp_path, [path], validation_share=1.0)
    assert names(found["train"]) == ["one/0.png", "one/1.png"] and names(found["validation"]) == ["one/2.png"]


def test_pictures_held_out_and_their_copies_are_in_neither(tmp_path, files):
    held = {"a.jpg": encoded(picture(3, 70, 50), "JPEG"), "b.png": encoded(picture(104).transpose(
        Image.Transpose.FLIP_LEFT_RIGHT)), "c.png": encoded(picture(0))}
    path = write_set(tmp_path / "held", "xflickrco", held, source="xflickrco", split="test")
    found, report, _ = joined(tmp_path, files, held_out=[path], validation_share=0.5)
    everything = set(names(found["train"])) | set(names(found["validation"]))
    assert everything.isdisjoint({"one/3.png", "two/104.png", "one/0.png", "two/same.png"})
    assert len(everything) == 48 and report.dropped == {"copy of a picture that is held out": 4}
    assert report.examples["copy of a picture that is held out"][0].startswith("one.jsonl, record 1: ")
    with pytest.raises(ValueError, match=r"xflickrco\.jsonl: rows of split test: name the file under held_out="):
        joined(tmp_path, [*files, path])


def test_weights_repeat_or_thin_the_training_rows_of_a_source(tmp_path, files):
    plain, _, counts = joined(tmp_path, files, validation_share=0.2)
    found, report, weighted = joined(tmp_path, files, validation_share=0.2, weights={"coco": 2.5, "cc3m": 0.5})
    assert names(found["validation"]) == names(plain["validation"])
    times = Counter(names(found["train"]))
    assert {times[name] for name in names(plain["train"]) if name.startswith("one/")} == {2, 3}
    assert {times[name] for name in names(plain["train"]) if name.startswith("two/")} == {0, 1}
    assert {times[name] for name in names(plain["train"]) if name.startswith("three/")} == {1}
    assert report.dropped == {"the weight of its source": counts["train"]["cc3m"] - weighted["train"]["cc3m"]}
    backwards, _, _ = joined(tmp_path, files[::-1], validation_share=0.2, weights={"coco": 2.5, "cc3m": 0.5})
    assert Counter(names(backwards["train"])) == times
    other, _, _ = joined(tmp_path, files, validation_share=0.2, weights={"coco": 2.5, "cc3m": 0.5}, seed=1)
    assert Counter(names(other["train"])) != times
    with pytest.raises(ValueError, match="no rows of source wit: the sources are None, cc3m, coco"):
        joined(tmp_path, files, weights={"wit": 2})


def test_pictures_that_cannot_be_read_are_dropped_and_named(tmp_path, files):
    (tmp_path / "one" / "5.png").write_bytes(b"<html>")
    found, report, _ = joined(tmp_path, files)
    assert "one/5.png" not in names(found["train"]) + names(found["validation"])
    (shown,) = report.examples["picture cannot be read"]
    assert shown.startswith("one.jsonl, record 6: ") and shown.endswith("one/5.png'") and report.kept == 51


def test_parquet_with_the_pictures_inside(tmp_path, files):
    rows = [{"image": encoded(picture(seed)), "captions": [f"{seed}"], "source": "cc12m"} for seed in range(12)]
    write_captions(rows, tmp_path / "mirror.parquet")
    join([tmp_path / "mirror.parquet"], tmp_path / "train.parquet", tmp_path / "validation.parquet", Report(),
         work=tmp_path / "work", validation_share=0.4)
    found = [read_captions(tmp_path / f"{name}.parquet") for name in ("train", "validation")]
    assert sorted(int(text) for part in found for (text,) in part["captions"]) == list(range(12)) and len(found[1]) > 1
    row = found[0][0]
    image = Image.open(io.BytesIO(encoded(picture(int(row["captions"][0])))))
    assert (np.asarray(row["image"]) == np.asarray(image)).all()
    with pytest.raises(ValueError, match=r"one\.jsonl: no column 'image', which .*mirror\.parquet has"):
        join([tmp_path / "mirror.parquet", files[0]], tmp_path / "a", tmp_path / "b", Report(), work=tmp_path / "work")
