"""Filters of captions and pictures: what each drops, what it keeps, and what the reports say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from test_near_copies import all_with_all, encoded

from clipid_utils.data.cleaning import filters, near_copies
from clipid_utils.data.cleaning.near_copies import signatures
from clipid_utils.data.cleaning.proper_nouns import SLOTS, Tagger, slot
from clipid_utils.data.report import Report


def rows(*captions) -> list[dict]:
    return [{"image_path": f"{i}.jpg", "captions": list(row)} for i, row in enumerate(captions)]


def dropped(check, *captions) -> list[str]:
    return [caption for caption in captions if check(caption)]


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)


def kept_pictures(images, *checks) -> tuple[list[int], Report]:
    report = Report()
    table = [{"image": image, "captions": [str(i)]} for i, image in enumerate(images)]
    return [int(row["captions"][0]) for row in filters.filter_pictures(table, report, *checks)], report


def test_captions_are_dropped_one_by_one_and_rows_without_any():
    report = Report()
    table = rows(["seekor kucing", "kucing"], ["anjing"], ["dua ekor burung"])
    found = list(filters.filter_captions(table, report, filters.length(words=(2, 9))))
    assert found == [table[0] | {"captions": ["seekor kucing"]}, table[2]]
    assert (report.read, report.kept, dict(report.dropped)) == (4, 2, {"fewer than 2 words": 2})
    assert report.examples == {"fewer than 2 words": ["kucing", "anjing"]}
    assert table[0]["captions"] == ["seekor kucing", "kucing"]  # the caller's rows stay as they were


def test_rows_are_streamed():
    endless = ({"captions": [f"kucing {i}"]} for i in iter(int, 1))
    assert next(filters.filter_captions(endless, Report(), filters.length()))["captions"] == ["kucing 0"]


def test_length_counts_words_and_characters():
    check = filters.length(words=(2, 3), characters=(6, 20))
    assert check("a b") == "fewer than 6 characters" and check("kucing") == "fewer than 2 words"
    assert check("satu dua tiga empat") == "more than 3 words" and check("seekor kucing") is None
    assert check("bertanggungjawab sekali") == "more than 20 characters" and check("") == "fewer than 2 words"


def test_the_share_of_proper_nouns_decides():
    weights = np.zeros(SLOTS, np.float32)
    for name in ("joko", "widodo", "bali", "jakarta"):
        weights[slot(f"spellingw={name}")] = 1
    check = filters.proper_nouns(Tagger(weights))
    assert check("Joko Widodo, Jakarta, Bali") == check("Joko di Widodo, Jakarta Bali") == "at least 80% proper nouns"
    assert check("Joko Widodo di Jakarta") is None and check("12 !") is None


def test_languages_are_told_apart_and_doubtful_captions_kept():
    indonesian = ["seekor kucing tidur di atas kursi", "anak-anak bermain bola di lapangan", "payung merah besar"]
    english = ["a cat is sleeping on the chair", "children playing football in the field"]
    malay = ["kereta api pantas itu berhenti di stesen", "basikal budak lelaki itu sangat cantik kerana baharu"]
    in_indonesian, in_english = filters.language("id"), filters.language("en")
    assert dropped(in_indonesian, *indonesian, *english, *malay) == english
    assert dropped(in_english, *indonesian[:2], *english) == indonesian[:2]
    assert in_indonesian("a cat is sleeping on the chair") == "not in id, probably in en"
    assert {in_english(caption) for caption in malay} == {"not in en, probably in ms"}
    assert in_indonesian("17 / 8") is None  # without a letter


def test_a_repeated_caption_is_kept_once():
    captions = ["Kucing hitam.", "kucing  hitam", "KUCING HITAM!", "ｋucing hitam", "kucing putih", "!!", "??", "!!"]
    assert dropped(filters.repeated_captions(), *captions) == [*captions[1:4], "!!"]
    names = ["Straße 5", "STRASSE ⑤", "kafe\u0301", "kafé", "kafe", "ﬁlm", "film", "anak-anak", "anak anak"]
    assert dropped(filters.repeated_captions(), *names) == ["STRASSE ⑤", "kafé", "film", "anak anak"]


@given(st.text())
def test_normalising_twice_changes_nothing(caption):
    # Through casefold alone: NFKC of what casefold made can fold again (Cherokee, U+0345), once
    once = filters.normalise(filters.normalise(caption))
    assert filters.normalise(once) == once


def test_a_series_title_is_dropped_everywhere():
    table = rows(["Road signs"], ["road signs"], ["Road Signs."], ["stop sign", "stop sign"])
    check = filters.common_captions(table, most=2)
    assert check("ROAD SIGNS") == "a caption of more than 2 pictures" and check("stop sign") is None
    assert filters.common_captions(table, most=3)("road signs") is None


def test_near_captions_are_dropped_and_one_word_makes_a_difference():
    captions = ["seorang pria bersepeda di jalan raya kota Bandung pada pagi hari yang cerah",
                "Seorang pria bersepeda di jalan raya kota Bandung, pada pagi hari yang cerah!",
                "seorang pria bersepeda di jalan raya kota Bandung pada pagi hari cerah",
                "mobil merah di jalan", "mobil biru di jalan"]  # fmt: skip
    assert dropped(filters.near_captions(), *captions) == captions[1:3]
    assert dropped(filters.near_captions(threshold=0.4), *captions[3:]) == captions[4:]
    assert dropped(filters.near_captions(), "☂☂☂", "☀☀☀☀") == []  # without a word, but not the same


def test_broken_pictures_are_named_and_the_others_stay(tmp_path):
    (tmp_path / "good.png").write_bytes(encoded(picture(0)))
    (tmp_path / "cut.jpg").write_bytes(encoded(picture(1), "JPEG")[:400])
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    names = ["good.png", "cut.jpg", "page.jpg", "missing.jpg"]
    table = [{"image_path": str(tmp_path / name), "captions": ["x"]} for name in names]
    report = Report()
    assert list(filters.filter_pictures(table, report)) == table[:1]
    assert report.kept == 1 and dict(report.dropped) == {"a broken picture": 3}
    assert "cut.jpg: " in report.examples["a broken picture"][0]


def test_tiny_and_narrow_pictures_are_dropped():
    sizes = [(64, 64), (31, 64), (64, 31), (40, 321), (321, 40), (40, 320), (32, 33)]
    kept, report = kept_pictures([picture(i, size) for i, size in enumerate(sizes)], filters.size())
    assert kept == [0, 5, 6]
    assert dict(report.dropped) == {"a side of fewer than 32 pixels": 2, "a side more than 8 times the other": 2}


def test_pictures_of_one_colour_are_dropped_and_faint_ones_kept():
    grey = np.random.default_rng(0).integers(120, 126, (64, 64, 3), np.uint8)
    halves = [Image.new("RGB", (64, 64), (100, 100, 100)) for _ in range(2)]
    for image, blue in zip(halves, (107, 109), strict=True):  # a standard deviation of 3.5 and 4.5, in blue alone
        image.paste((100, 100, blue), (0, 0, 32, 64))
    kept, report = kept_pictures([Image.fromarray(grey), Image.new("RGB", (64, 64)), *halves], filters.flat())
    assert kept == [3] and dict(report.dropped) == {"nearly one colour": 3}


def test_the_same_pixels_are_kept_once():
    content = [encoded(picture(1)), encoded(picture(2)), encoded(picture(1), optimize=True)]
    kept, report = kept_pictures(content, filters.repeated_pictures())
    assert kept == [0, 1] and dict(report.dropped) == {"a repeated picture": 1}


def test_near_pictures_are_kept_once():
    first = picture(5, (96, 96))
    again = [ImageEnhance.Brightness(first).enhance(1.02), first.resize((64, 64)), encoded(first, "JPEG", quality=60)]
    kept, report = kept_pictures([first, *again, picture(6)], filters.near_pictures())
    assert kept == [0, 4] and dict(report.dropped) == {"nearly a repeated picture": 3}


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(0, 11), st.floats(0.5, 60))
def test_near_pictures_are_those_that_comparing_all_with_all_finds(seed, max_bits, max_difference):
    rng = np.random.default_rng(seed)
    images = [picture(int(rng.integers(3))) for _ in range(12)]
    images = [Image.fromarray(np.clip(np.asarray(image) + rng.normal(0, rng.choice([0, 9, 60]), (64, 64, 3)), 0, 255)
                              .astype(np.uint8)) for image in images]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_copies, "MAX_BITS", max_bits)
        patch.setattr(near_copies, "MAX_DIFFERENCE", max_difference)
        kept = kept_pictures(images, filters.near_pictures())[0]  # one after the other
    near, expected = all_with_all(signatures(images), signatures(images), max_bits, max_difference), []
    for row in range(len(images)):
        if not near[row, expected].any():
            expected.append(row)
    assert kept == expected


def test_a_placeholder_under_many_captions_is_dropped_also_resized():
    missing = Image.new("RGB", (120, 90), "lightgrey")
    missing.paste("dimgrey", (30, 40, 90, 50))
    forms = [missing, missing.resize((60, 45)), encoded(missing, "JPEG", quality=80), missing]
    table = [{"image": image, "captions": [f"caption {i}"]} for i, image in enumerate([*forms, picture(1), picture(2)])]
    table.append({"image": b"broken", "captions": ["x"]})
    check = filters.placeholders(table, most=3)
    report = Report()
    assert [row["captions"] for row in filters.filter_pictures(table, report, check)] == [["caption 4"], ["caption 5"]]
    assert dict(report.dropped) == {"a picture of more than 3 captions": 4, "a broken picture": 1}
    assert filters.placeholders(table, most=4)(filters.row_picture(table[0])) is None
    table = [{"image": picture(1), "captions": ["mobil merah"]} for _ in range(9)]  # again and again the same
    assert filters.placeholders(table, most=3)(filters.row_picture(table[0])) is None
