"""`python -m clipid_utils check FILE` names every bad line and fails for them."""

import json
import sys

import pytest

from clipid_utils import __main__
from clipid_utils.data.captions import check_captions, write_captions


def run(monkeypatch, *arguments) -> int | str | None:
    """The exit status."""
    monkeypatch.setattr(sys, "argv", ["clipid_utils", "check", *map(str, arguments)])
    try:
        __main__.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_every_bad_line_is_named_with_what_to_do(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.jpg").touch()
    good, bad = b'{"image_path": "a.jpg", "captions": ["kucing"]}', b'{"image_path": "a.jpg", "captions": [" "]}'
    lost = b'{"image_path": "b.jpg", "captions": ["kucing"]}'
    lines = [good, b"", *[bad] * 12, lost, b"{", b'"caf\xe9"', good]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    assert run(monkeypatch, tmp_path / "a.jsonl") == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"a.jsonl:{number}" for number in range(3, 18)]
    assert "an empty caption matches nothing; drop it or write one" in lines[0]
    assert f"'b.jpg' not found under {tmp_path}: fetch the picture" in lines[12]
    assert "no JSON" in lines[13] and "byte 5 of the line is not UTF-8: save" in lines[14]
    assert printed.err.endswith("a.jsonl: 17 records, 15 bad\n")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_without_bad_lines_passes(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").touch()
    write_captions([{"image_path": "a.jpg", "captions": ["kucing"]}], tmp_path / name)
    assert list(check_captions(tmp_path / name, root=tmp_path / "elsewhere")) == [None]
    assert run(monkeypatch, tmp_path / name, "--root", tmp_path / "elsewhere") == 0
    assert run(monkeypatch, tmp_path / name) == 1
    assert "a.jpg' not found under" in capsys.readouterr().out


def test_what_is_no_such_file_is_said_in_a_line(tmp_path, monkeypatch):
    assert "No such file" in run(monkeypatch, tmp_path / "a.jsonl")
    (tmp_path / "a.parquet").write_text(json.dumps({"image_path": "a.jpg"}))
    assert "arquet" in run(monkeypatch, tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").touch()
    assert run(monkeypatch, tmp_path / "b.jsonl") == 1
