"""Crossmodal-3600's lines: one language of thirty-six."""

import json

import pytest

from clipid_utils.data.report import Report
from clipid_utils.data.sources.flickr import read_xm3600


def test_the_captions_of_one_language(tmp_path):
    for key in ("000411001ff7dd4f", "cff633a4ebf8d8d6"):
        (tmp_path / f"{key}.jpg").touch()
    rows = [{"image/key": "000411001ff7dd4f", "image/locale": "cs", "en": {"caption": ["A plate"]},
             "id": {"caption": ["Sepiring kentang", "Kentang\u200b "], "caption/tokenized": ["x", "y"]}},
            {"image/key": "cff633a4ebf8d8d6", "image/locale": "id", "en": {"caption": ["A cat"]}},
            {"image/key": "ffff", "id": {"caption": ["hilang"]}}]
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    report = Report()
    assert list(read_xm3600(tmp_path / "captions.jsonl", tmp_path, report)) == [
        {"image_path": str(tmp_path / "000411001ff7dd4f.jpg"), "captions": ["Sepiring kentang", "Kentang\u200b"],
         "source": "xm3600", "split": "test"}]
    assert report.examples == {"no captions in 'id'": [f"captions.jsonl:2: {str(rows[1])[:80]!r}"],
                               "picture not found": ["captions.jsonl:3: 'ffff.jpg'"]}
    assert len(list(read_xm3600(tmp_path / "captions.jsonl", tmp_path, Report(), language="en"))) == 2
    with pytest.raises(ValueError, match=r"captions\.jsonl:1: .*: no captions in 'jv': take XM3600's"):
        list(read_xm3600(tmp_path / "captions.jsonl", tmp_path, Report(), language="jv"))
