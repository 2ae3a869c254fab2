"""`clipid check` names every bad record with its line, and every picture that cannot be read."""

import pytest
from PIL import Image

from clipid_utils.__main__ import main
from clipid_utils.data.captions import write_captions


def check(*arguments) -> int | str | None:
    """The exit status."""
    try:
        main(["check", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


def test_every_bad_line_is_named_with_its_remedy(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    good, bad = b'{"image_path": "a.png", "captions": ["kucing"]}', b'{"image_path": "a.png", "captions": [" "]}'
    lost = b'{"image_path": "b.png", "captions": ["kucing"]}'
    lines = [good, b"", *[bad] * 12, lost, b"{", b'"caf\xe9"', good]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    assert check(tmp_path / "a.jsonl") == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"a.jsonl:{number}" for number in range(3, 18)]
    assert "empty caption" in lines[0] and "leave it out" in lines[0]
    assert f"'b.png' not found under {tmp_path}: fetch the picture" in lines[12] and "--root" in lines[12]
    assert "not valid JSON" in lines[13] and "byte 5 of the line is not UTF-8: save" in lines[14]
    assert printed.err.endswith("a.jsonl: 17 records, 15 bad\n")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_without_bad_records_passes(tmp_path, capsys, name):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "elsewhere" / "a.png")
    write_captions([{"image_path": "a.png", "captions": ["kucing"]}], tmp_path / name)
    assert check(tmp_path / name, "--root", tmp_path / "elsewhere") == 0
    assert capsys.readouterr().out == f"next: clipid train RECIPE --train {tmp_path / name}\n"
    assert check(tmp_path / name) == 1
    assert "a.png' not found under" in capsys.readouterr().out


def test_pictures_are_opened(tmp_path, capsys):
    """A JPEG that is cut off, an empty file and a text are bad, unless only their presence is checked."""
    Image.effect_noise((99, 99), 50).convert("RGB").save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    (tmp_path / "c.jpg").touch()
    (tmp_path / "d.jpg").write_text("{}")
    write_captions([{"image_path": f"{name}.jpg", "captions": ["kucing"]} for name in "abcd"], tmp_path / "a.jsonl")
    assert check(tmp_path / "a.jsonl") == 1
    assert [line[:9] for line in capsys.readouterr().out.splitlines()] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    assert check(tmp_path / "a.jsonl", "--no-pictures") == 0


def test_an_empty_or_broken_file_says_why(tmp_path, capsys):
    (tmp_path / "a.jsonl").touch()
    assert check(tmp_path / "a.jsonl") == 1
    assert "no records" in capsys.readouterr().out
    (tmp_path / "a.parquet").write_text("{}")
    assert "arquet" in check(tmp_path / "a.parquet")
