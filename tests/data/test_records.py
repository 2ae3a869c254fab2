"""Captions records: read as they were written, each bad line named with its remedy."""

import gzip
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from clipid_utils.data import captions
from clipid_utils.data.captions import check_captions, read_captions, write_captions

GOOD = {"image_path": "0.jpg", "captions": ["a"]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def smooth(width: int, height: int) -> Image.Image:
    blocks = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        smooth(20 + number, 20).save(tmp_path / f"{number}.jpg")
    return tmp_path


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_the_ancestors_lines_load_as_they_are(folder):
    lines = [{"image_path": f"{n}.jpg", "captions": [f"kucing {n}", "hewan"]} for n in range(3)]
    path = folder / "captions.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(line).encode() for line in lines))
    records = read_captions(path)
    assert records[1] == {"image_path": str(folder / "1.jpg"), "captions": ["kucing 1", "hewan"], "source": None,
                          "split": None}
    (folder / "elsewhere").mkdir()
    moved = path.rename(folder / "elsewhere" / "captions.jsonl")
    assert read_captions(moved, root=folder)["image_path"][:] == records["image_path"][:]
    with pytest.raises(ValueError, match=f"'0.jpg' not found under {folder / 'elsewhere'}"):  # not the cached records
        read_captions(moved)


def test_a_cached_file_is_checked_again_when_the_rules_change(folder, monkeypatch):
    path = write_lines(folder / "captions.jsonl", GOOD)
    read_captions(path)
    monkeypatch.setattr(captions, "_problem", lambda record, kind: "a new rule")
    assert len(read_captions(path)) == 1  # out of the cache
    monkeypatch.setattr(captions, "RULES", "newer")
    with pytest.raises(ValueError, match="a new rule"):
        read_captions(path)


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.parquet"])
def test_what_is_written_is_read_back(folder, name):
    rows = [{"image_path": str(folder / f"{n}.jpg"), "captions": ["é", "dua"], "source": "coco", "split": "train"}
            for n in range(3)]
    write_captions(rows, folder / name)
    assert list(read_captions(folder / name)) == rows
    assert str(folder).encode() not in (folder / name).read_bytes()  # the folder may move
    write_captions(rows[:2], folder / name)
    assert len(read_captions(folder / name)) == 2  # not the older one out of the cache


def test_many_rows_are_written_to_parquet(folder):
    write_captions(({"image_path": "0.jpg", "captions": [str(n)]} for n in range(2100)), folder / "a.parquet")
    assert read_captions(folder / "a.parquet")["captions"][:] == [[str(n)] for n in range(2100)]


def test_parquet_may_have_the_pictures_themselves(folder):
    path = folder / "captions.parquet"
    write_captions([{"image": smooth(30, 20), "captions": ["seekor kucing"]}], path)
    (record,) = read_captions(path)
    assert record["image"].size == (30, 20) and record["captions"] == ["seekor kucing"]
    assert list(check_captions(path, pictures=True)) == [None]
    write_captions([{"image": (folder / "0.jpg").read_bytes()[:300], "captions": ["a"]}], path)
    assert list(check_captions(path)) == [None]
    (problem,) = check_captions(path, pictures=True)
    assert problem.startswith("captions.parquet:1: not a picture that can be read (") and "replace" in problem


def test_a_folder_of_part_files_and_a_glob_are_read_in_order(folder):
    parts = folder / "parts"
    parts.mkdir()
    for number, name in enumerate(["part-00.jsonl", "part-01.jsonl.gz", "part-02.parquet"]):
        row = {"image_path": f"{number}.jpg", "captions": [f"kucing {number}"]}
        if name.endswith("parquet"):
            write_captions([row], parts / name)
        else:
            content = json.dumps(row).encode()
            (parts / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (parts / "part-03.jsonl.12.partial").write_text("{")
    for given in (parts, parts / "part-*", f"{parts}/part-0[012].*"):
        records = read_captions(given, root=folder)
        assert records["captions"][:] == [["kucing 0"], ["kucing 1"], ["kucing 2"]]
        assert records["image_path"][:] == [str(folder / f"{n}.jpg") for n in range(3)]
    write_lines(parts / "part-01.jsonl", GOOD | {"captions": "a string"})
    assert [problem for problem in check_captions(parts, root=folder) if problem] == [
        "part-01.jsonl:1: captions is 'a string': give a list with at least one caption"]
    with pytest.raises(ValueError, match=r"1 bad lines\npart-01\.jsonl:1: captions is"):
        read_captions(parts, root=folder)
    write_captions([{"image": smooth(9, 9), "captions": ["a"]}], parts / "part-01.parquet")
    with pytest.raises(ValueError, match="some files have pictures and some have paths"):
        read_captions(parts, root=folder)


BAD = {
    '{"image_path": "0.jpg"': "not valid JSON",
    '{"captions": ["a"]}': "image_path is None: name the picture's file",
    '{"image_path": "0.jpg", "captions": []}': "captions is []: give a list",
    '{"image_path": "0.jpg", "captions": null}': "captions is None: give a list",
    '{"image_path": "0.jpg", "captions": ["a", " "]}': "captions has the empty caption ' ': write text",
    '{"image_path": "0.jpg", "captions": [5]}': "captions has 5, which is not a string",
    '{"image_path": "0.jpg", "captions": ["a", null]}': "captions has None, which is not a string",
    "3": "'3' is not a record",
    '{"image_path": "0.jpg", "captions": ["a"], "split": 1}': "split is 1: write a string",
    '{"image_path": "0.jpg", "captions": ["anak \\ud83d"]}': "captions has 'anak \\ud83d', with half a character",
}


def test_each_bad_line_is_named_with_its_remedy(folder):
    path = write_lines(folder / "captions.jsonl", GOOD, *BAD, *BAD, GOOD)
    with pytest.raises(ValueError) as error:
        read_captions(path)
    first, *lines, last = str(error.value).splitlines()
    assert first == f"{path}: 20 bad lines" and last == "… and 10 more" and len(lines) == 10
    for number, (line, words) in enumerate(zip(lines, BAD.values(), strict=True), 2):
        assert line.startswith(f"captions.jsonl:{number}: {words}"), line
    found = list(check_captions(path))
    assert [problem is None for problem in found] == [True, *[False] * 20, True] and found[1:11] == lines
    with pytest.raises(ValueError) as error:
        read_captions(write_lines(folder / "ten.jsonl", *BAD))
    assert len(str(error.value).splitlines()) == 11  # exactly ten are all listed


def test_missing_and_broken_pictures_are_named_by_their_line(folder):
    (folder / "2.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-90])
    path = write_lines(folder / "captions.jsonl", GOOD, GOOD | {"image_path": "gone.jpg"},
                       GOOD | {"image_path": "2.jpg"})
    lost = f"captions.jsonl:2: image_path 'gone.jpg' not found under {folder}: fetch the picture"
    with pytest.raises(ValueError, match=lost):
        read_captions(path)
    assert [bool(problem) for problem in check_captions(path)] == [False, True, False]
    good, missing, broken = check_captions(path, pictures=True)
    assert good is None and missing.startswith(lost)
    assert broken.startswith(f"captions.jsonl:3: {folder}/2.jpg: not a picture that can be read (OSError: ")


def test_a_file_without_records_says_so(folder):
    path = write_lines(folder / "none.jsonl", "", "")
    with pytest.raises(ValueError, match="none.jsonl: the file has no records: write one on each line"):
        read_captions(path)
    assert list(check_captions(path)) == ["none.jsonl: the file has no records: write one on each line"]
    (folder / "a.parquet").write_text("PAR1")
    with pytest.raises(ValueError, match="a.parquet: not a whole Parquet file"):
        list(check_captions(folder / "a.parquet"))
    with pytest.raises(ValueError, match="no such file or folder"):
        read_captions(folder / "elsewhere.jsonl")


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.parquet"])
def test_a_bad_record_leaves_the_older_file_and_nothing_else(folder, name):
    write_captions([GOOD], folder / name)
    before = sorted(folder.iterdir())
    for bad, reason in (("", "captions has the empty caption"), ("\ud83d", "captions has .*half a character")):
        with pytest.raises(ValueError, match=f"record 2: {reason}"):
            write_captions([GOOD, GOOD | {"captions": [bad]}], folder / name)
    assert sorted(folder.iterdir()) == before
    assert read_captions(folder / name)[0]["captions"] == ["a"]
