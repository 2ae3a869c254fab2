"""Captions records: read as they were written, each bad line named, pictures decoded as the processor does it."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from clipid_utils.data.captions import read_captions, write_captions
from clipid_utils.files import decode_square


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def smooth(width: int, height: int) -> Image.Image:
    blocks = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def pictures(folder, count=3):
    for number in range(count):
        smooth(20 + number, 20).save(folder / f"{number}.jpg")


def test_the_ancestors_lines_load_as_they_are(tmp_path):
    pictures(tmp_path)
    lines = [{"image_path": f"{n}.jpg", "captions": [f"kucing {n}", "hewan"]} for n in range(3)]
    (tmp_path / "captions.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    records = read_captions(tmp_path / "captions.jsonl")
    assert records[1] == {"image_path": str(tmp_path / "1.jpg"), "captions": ["kucing 1", "hewan"], "source": None,
                          "split": None}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "captions.jsonl").rename(tmp_path / "elsewhere" / "captions.jsonl")
    moved = read_captions(tmp_path / "elsewhere" / "captions.jsonl", root=tmp_path)
    assert moved["image_path"][:] == records["image_path"][:]


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.parquet"])
def test_what_is_written_is_read_back(tmp_path, name):
    pictures(tmp_path)
    rows = [{"image_path": str(tmp_path / f"{n}.jpg"), "captions": ["é", "dua"], "source": "coco", "split": "train"}
            for n in range(3)]
    write_captions(rows, tmp_path / name)
    assert list(read_captions(tmp_path / name)) == rows
    assert str(tmp_path).encode() not in (tmp_path / name).read_bytes()  # the folder may move
    write_captions(rows[:2], tmp_path / name)
    assert len(read_captions(tmp_path / name)) == 2  # not the older one out of the cache


def test_parquet_may_hold_the_pictures_themselves(tmp_path):
    write_captions([{"image": smooth(30, 20), "captions": ["seekor kucing"]}], tmp_path / "captions.parquet")
    (record,) = read_captions(tmp_path / "captions.parquet")
    assert record["image"].size == (30, 20) and record["captions"] == ["seekor kucing"]


def test_each_bad_line_is_named_with_what_to_do(tmp_path):
    bad = ['{"image_path": "0.jpg"', '{"captions": ["a"]}', '{"image_path": "0.jpg", "captions": []}',
           '{"image_path": "0.jpg", "captions": [" "]}', "3", '{"image_path": "0.jpg", "captions": ["a"], "split": 1}']
    good = '{"image_path": "0.jpg", "captions": ["a"]}'
    (tmp_path / "captions.jsonl").write_text("\n".join([good, *bad, *bad, good]))
    with pytest.raises(ValueError) as error:
        read_captions(tmp_path / "captions.jsonl")
    first, *lines = str(error.value).splitlines()
    assert first.endswith("captions.jsonl: 12 bad lines") and lines[-1] == "… and 2 more"
    said = ["no JSON", "image_path is None", r"captions is []", "an empty caption", "is no record", "split is 1"]
    for number, (line, words) in enumerate(zip(lines[:6], said, strict=True), 2):
        assert line.startswith(f"captions.jsonl:{number}: ") and words in line, line


def test_half_a_character_is_named_like_other_faults(tmp_path):
    record = {"image_path": "a.jpg", "captions": ["anak \ud83d"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: captions holds .*half a character"):
        read_captions(tmp_path / "a.jsonl", check_files=False)
    with pytest.raises(ValueError, match="record 0: captions holds .*half a character"):
        write_captions([record], tmp_path / "b.jsonl")


def test_pictures_that_are_not_there_are_named_by_their_line(tmp_path):
    pictures(tmp_path)
    lines = [json.dumps({"image_path": name, "captions": ["a"]}) for name in ("0.jpg", "gone.jpg", "2.jpg")]
    (tmp_path / "captions.jsonl").write_text("\n\n".join(lines))
    with pytest.raises(ValueError, match=r"captions\.jsonl:3: image_path 'gone\.jpg' not found under"):
        read_captions(tmp_path / "captions.jsonl")
    assert len(read_captions(tmp_path / "captions.jsonl", check_files=False)) == 3
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no records"):
        read_captions(tmp_path / "none.jsonl")


def test_a_bad_record_leaves_the_older_file(tmp_path):
    pictures(tmp_path)
    write_captions([{"image_path": str(tmp_path / "0.jpg"), "captions": ["a"]}], tmp_path / "captions.jsonl")
    with pytest.raises(ValueError, match="record 1: .*an empty caption"):
        write_captions([{"image_path": "0.jpg", "captions": [c]} for c in ("b", "")], tmp_path / "captions.jsonl")
    assert read_captions(tmp_path / "captions.jsonl")[0]["captions"] == ["a"]


@pytest.mark.parametrize("size", [(50, 37), (37, 50), (33, 24), (24, 24), (20, 90)])
def test_a_picture_is_what_the_processor_makes_of_it(tmp_path, size):
    smooth(*size).save(tmp_path / "a.png")
    expected = decode_square(Image.open(tmp_path / "a.png"), 24).astype(int)
    assert abs(decode_square(str(tmp_path / "a.png"), 24) - expected).max() <= 1


def test_a_large_jpeg_is_decoded_smaller(tmp_path, monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, *args, **options: (
        sizes.append(image.size) or resize(image, *args, **options)))
    smooth(400, 300).save(file := io.BytesIO(), "JPEG", quality=95)
    square = decode_square(file.getvalue(), 70)
    assert sizes[-1] == (100, 75)  # a quarter: an eighth would be less than 70
    expected = decode_square(Image.open(file), 70).astype(int)
    assert abs(square - expected).mean() < 2


def test_pictures_are_upright_and_on_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    assert (decode_square(tmp_path / "clear.png", 4) == 255).all()
    half = Image.new("RGB", (16, 16), "red")
    half.paste("blue", (0, 8, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 3  # held upside down
    half.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    top = decode_square(tmp_path / "turned.jpg", 16)[2, 8]
    assert top[2] > 200 and top[0] < 50
