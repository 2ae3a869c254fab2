"""Classifiers and templates: seekor kucing, sebuah mobil, seorang guru."""

import json

import pytest

from clipid_utils import wording


@pytest.mark.parametrize(
    ("name", "group", "expected"),
    [
        ("kucing", None, "seekor kucing"),
        ("kucing tidur", "objects", "seekor kucing tidur"),
        ("mobil", None, "sebuah mobil"),
        ("guru", None, "seorang guru"),
        ("anak laki-laki", None, "seorang anak laki-laki"),
        ("anak ayam", None, "seekor anak ayam"),
        ("anjing laut", None, "seekor anjing laut"),
        ("daun maple", None, "sehelai daun maple"),
        ("uang kertas dolar", None, "selembar uang kertas dolar"),
        ("bunga matahari", None, "setangkai bunga matahari"),
        ("pohon palem", None, "sebatang pohon palem"),
        ("kaus kaki", None, "sepasang kaus kaki"),
        ("surat cinta", None, "sepucuk surat cinta"),
        ("pistol air", None, "sebuah pistol air"),
        ("kopi", None, "secangkir kopi"),
        ("Kucing Persia", None, "seekor Kucing Persia"),
        ("pria: rambut merah", None, "seorang pria: rambut merah"),
        ("sebuah koin", None, "sebuah koin"),
        ("sepasang gunting", None, "sepasang gunting"),
        ("hujan", None, "hujan"),
        ("dua hati", None, "dua hati"),
        ("wajah kucing", None, "wajah kucing"),
        ("orang berlari", None, "orang berlari"),
        ("jam tangan", None, "sebuah jam tangan"),
        ("jam dua belas tepat", None, "jam dua belas tepat"),
    ],
)
def test_classifiers(name, group, expected):
    assert wording.counted(name, group) == expected


def test_the_group_decides_where_the_table_is_silent():
    table = {"heads": {}, "classifiers": {}, "groups": {"animals": "seekor", "symbols": ""}, "default": "sebuah"}
    assert wording.counted("okapi", "animals", table) == "seekor okapi"
    assert wording.counted("okapi", "symbols", table) == "okapi"
    assert wording.counted("okapi", None, table) == "sebuah okapi"


def test_templates_fill_both_forms():
    assert wording.fill("foto {name}", "kucing") == "foto kucing"
    assert wording.fill("gambar {counted}", "kucing") == "gambar seekor kucing"


def test_wording_errors_name_the_template_and_the_head(tmp_path):
    good = {"naive": ["foto {name}"], "plain": ["ini {name}"], "templates": ["{counted}"], "default": "", "groups": {}}
    path = tmp_path / "templates.json"
    path.write_text(json.dumps(good | {"classifiers": {}, "templates": ["sebuah gambar"]}))
    with pytest.raises(ValueError, match="templates.json: templates: 'sebuah gambar'"):
        wording.load_wording(path)
    path = tmp_path / "twice.json"
    path.write_text(json.dumps(good | {"classifiers": {"seekor": ["kucing"], "sebuah": ["kucing"]}}))
    with pytest.raises(ValueError, match="'kucing' stands under"):
        wording.load_wording(path)


def test_a_group_as_one_would_say_it():
    assert wording.group_phrase("langit, cuaca & antariksa") == "langit, cuaca dan antariksa"
