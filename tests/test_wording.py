"""Classifiers and templates: seekor kucing, sebuah mobil, seorang guru."""

from collections import Counter

import pytest

from clipid_utils import wording

EXAMPLES = {
    "seekor": "kucing; kucing tidur; anak ayam; anjing laut; orang utan; orang utan tidur; cicak; komodo; kancil; "
              "trenggiling; lele; raja udang; ratu lebah; Kucing Persia; kupu-kupu; kunang-kunang",
    "seorang": "guru; anak laki-laki; pria: rambut merah; presiden; teman; istri; kakak; satpam; santri; raja; ratu",
    "sebuah": "mobil; pistol air; jam tangan; bebek karet; kuda lumping; ibu kota; kuda catur; radio; kuda-kudaan",
    "sebatang": "pohon palem; anak panah; tongkat", "sehelai": "daun maple; bendera; saputangan",
    "selembar": "uang kertas dolar; surat kabar; foto; foto lama; prangko", "setangkai": "bunga matahari",
    "sepasang": "kaus kaki", "sepucuk": "surat cinta", "sekeping": "koin; biskuit", "sebutir": "kacang tanah",
    "sesiung": "bawang putih", "secangkir": "kopi", "seporsi": "rendang; gado-gado; ikan bakar",
    "sepotong": "ayam goreng; piza; pizza",
    "": "hujan; dua hati; wajah kucing; orang berlari; jam dua belas tepat; anak-anak; madu; gula; beras; pasir; "
        "darah; sekelompok anak; sepasang gunting; seperempat kue; sebuah koin; kucing-kucing; kucing-kucingan; "
        "buah-buahan; okapi; zzz; -",
}  # fmt: skip


@pytest.mark.parametrize("name, expected", [(name, classifier) for classifier, names in EXAMPLES.items()
                                            for name in names.split("; ")])
def test_classifiers(name, expected):
    assert wording.counted(name) == f"{expected} {name}".strip()
    assert wording.classifier_for(f"{name}, besar") == expected


@pytest.mark.parametrize("name, group, expected", [
    ("okapi", "animals", "seekor okapi"), ("okapi", "symbols", "okapi"), ("okapi", None, "okapi"),
    ("okapi-okapi", "animals", "okapi-okapi"), ("okapi-okapian", "animals", "okapi-okapian"),
    ("sebuah okapi", "animals", "sebuah okapi"), ("kucing tidur", "objects", "seekor kucing tidur"),
    ("bendera Jepang", "flags", "sehelai bendera Jepang")])
def test_the_group_decides_for_words_that_are_not_in_the_table(name, group, expected):
    assert wording.counted(name, group) == expected


def test_templates_are_good_indonesian():
    texts = str(wording.load_wording())
    assert "selembar foto {name}" in texts and "{counted} berlatar putih" in texts
    assert "sebuah foto" not in texts and "di atas latar" not in texts


def test_templates_fill_both_forms():
    assert wording.fill("foto {name}", "kucing") == "foto kucing"
    assert wording.fill("gambar {counted}", "kucing") == "gambar seekor kucing"


def test_each_template_has_one_place_for_a_name_and_each_head_one_classifier():
    table = wording.load_wording()
    for template in (*table["naive"], *table["plain"], *table["templates"]):
        assert template.format(name="\0", counted="\0").count("\0") == 1, template
    heads = [head for listed in table["classifiers"].values() for head in listed]
    assert not [head for head, times in Counter(heads).items() if times > 1]


def test_a_group_as_people_say_it():
    assert wording.group_phrase("langit, cuaca & antariksa") == "langit, cuaca dan antariksa"
