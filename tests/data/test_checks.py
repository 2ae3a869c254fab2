"""The checks of translated pairs: each stops the fault that it is for, and lets good pairs pass."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipid_utils.data.report import Report
from clipid_utils.data.translation.checks import (
    CHECKS,
    check_colours,
    check_copy,
    check_length,
    check_numbers,
    check_repetition,
    filter_pairs,
    loops,
    numbers,
    round_trip_check,
)

GOOD = [
    ("a cat", "seekor kucing"), ("two red cars", "dua mobil merah"), ("a robot", "robot"),
    ("flag of Papua New Guinea", "bendera Papua Nugini"), ("a bunch of garlic", "seikat bawang putih"),
    ("a man with sunglasses", "pria berkacamata hitam"), ("eight-thirty", "jam setengah sembilan"),
    ("a pink rose", "bunga mawar merah muda"), ("twenty-five birds on a wire", "25 ekor burung di atas kawat"),
    ("both children wear grey hats", "kedua anak itu memakai topi abu-abu"), ("2,000 people", "2.000 orang"),
    ("a pair of brown shoes", "sepasang sepatu cokelat"), ("two hundred and five coins", "dua ratus lima koin"),
    ("the Golden Gate bridge in San Francisco", "jembatan Golden Gate di San Francisco"),
    ("a butterfly on a white flower in the garden", "kupu-kupu di atas bunga putih di taman"),
    ("very very very big", "sangat sangat sangat besar"),
]
BAD = [
    ("length", "a cat", "seekor kucing yang sedang duduk di atas kursi"), ("length", "a cat", " "),
    ("length", "a small brown dog runs along the beach", "anjing"),
    ("copy", "a cat and a dog", "kucing and anjing"), ("copy", "a wooden fence post", "wooden fence post"),
    ("copy", "a butterfly", "A butterfly"),
    ("repetition", "a cat", "kucing kucing kucing"),
    ("repetition", "people walk through the old town in the rain at night", "orang di kota orang kota di kota orang"),
    ("numbers", "three cats", "dua kucing"), ("numbers", "cats", "dua ekor kucing"), ("numbers", "2015", "tahun 2016"),
    ("colours", "a red car", "mobil biru"), ("colours", "a red car", "sebuah mobil"),
    ("colours", "a car", "mobil hitam"), ("colours", "a green and yellow bird", "burung hijau dan hitam"),
]


def test_good_pairs_pass_all_checks():
    report = Report()
    assert [pair for _, *pair in filter_pairs(GOOD, CHECKS, report)] == [list(pair) for pair in GOOD], str(report)
    assert report.kept == len(GOOD)


@pytest.mark.parametrize("name, english, indonesian", BAD)
def test_each_check_stops_its_fault(name, english, indonesian):
    assert CHECKS[name]([(english, indonesian)])[0]
    assert CHECKS[name](GOOD) == [""] * len(GOOD)


def test_a_pair_is_counted_for_the_first_check_that_stops_it():
    pairs = [*GOOD[:3], ("two red cars", "tiga mobil biru"), ("a red car", "mobil biru")]
    report = Report()
    kept = list(filter_pairs(iter(pairs), CHECKS, report, chunk=2))
    assert [number for number, _, _ in kept] == [0, 1, 2] and report.read == 5
    assert report.dropped == {"numbers": 1, "colours": 1}
    assert report.examples["numbers"] == ["two red cars → tiga mobil biru (without 2)"]


def test_the_stream_is_read_a_chunk_at_a_time():
    read = []
    stream = (read.append(pair) or pair for pair in GOOD)
    next(filter_pairs(stream, CHECKS, Report(), chunk=3))
    assert len(read) == 3


@pytest.mark.parametrize("english, indonesian, problem", [  # 8 are added to both lengths
    (2, 12, ""), (2, 13, "2.1 times as long"), (12, 2, ""), (13, 2, "0.5 times as long"), (3, 0, "empty"),
])
def test_the_lengths_differ_at_most_twofold(english, indonesian, problem):
    assert check_length("x" * english, "y" * indonesian) == problem


def test_the_language_of_five_words_and_more_is_looked_at():
    check = CHECKS["language"]
    assert check([("", "seorang pria sedang mengendarai sepeda di jalan raya")]) == [""]
    assert check([("", "the road is long"), ("", "the road is very long")]) == ["", "taken for 'en'"]
    assert check([("road very", "the road is very long")]) == [""]  # words of the English do not count


@pytest.mark.parametrize("text, source, expected", [
    ("kupu-kupu di atas bunga", "", False), ("kucing kucing", "", False), ("merah merah merah", "", True),
    ("sangat sangat sangat besar", "very very very big", False), ("seekor ikan, seekor ikan, seekor ikan", "", True),
    ("kukukukuku", "", True), ("hahaha", "", False), ("satu dua tiga satu dua tiga satu dua tiga", "", True),
    ("Merah merah MERAH", "", True), ("dan dan, danau", "", False), ("1000000", "", False),
])
def test_what_counts_as_a_loop(text, source, expected):
    assert loops(text, source) is expected


def test_names_may_stay_as_they_are():
    assert check_copy("the skyline of New York City", "cakrawala New York City") == ""
    assert check_copy("New York", "New York") == ""
    assert check_copy("an ox on a tv", "ox di tv") == ""  # short words may be the same by chance
    assert check_copy("fence post Texas", "fence post Texas")  # the other words were copied too
    assert check_copy("hot dog", "hot dog")  # the price: words that both languages share are stopped


@pytest.mark.parametrize("text, said", [
    ("seven-thirty", {7, 30}), ("pukul tujuh tiga puluh", {7, 30}), ("jam setengah delapan", {7, 30}),
    ("jam setengah satu", {12, 30}), ("dua belas", {12}), ("dua puluh lima", {25}), ("seratus dua belas", {112}),
    ("dua ratus tiga puluh lima", {235}), ("dua ribu lima ratus", {2500}), ("two thousand five hundred", {2500}),
    ("sebelas ekor, dua belas ekor", {11, 12}), ("one cat", set()), ("satu kucing", set()), ("kedua", set()),
    ("1.000.000 dan 3,5", {1_000_000, 3, 5}), ("ten two", {10, 2}), ("segitiga", set()), ("2 ribu orang", {2000}),
])
def test_numbers_are_read_in_both_languages(text, said):
    assert numbers(text)[0] == said


UNITS_EN = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen \
seventeen eighteen nineteen".split()
TENS_EN = "- - twenty thirty forty fifty sixty seventy eighty ninety".split()
UNITS_ID = "nol satu dua tiga empat lima enam tujuh delapan sembilan sepuluh sebelas".split()


def in_english(number: int) -> str:
    if number < 20:
        return UNITS_EN[number]
    if number < 100:
        return TENS_EN[number // 10] + (f"-{UNITS_EN[number % 10]}" if number % 10 else "")
    scale, word = (1000, "thousand") if number >= 1000 else (100, "hundred")
    return f"{in_english(number // scale)} {word}" + (f" {in_english(number % scale)}" if number % scale else "")


def in_indonesian(number: int) -> str:
    if number < 12:
        return UNITS_ID[number]
    if number < 20:
        return f"{UNITS_ID[number - 10]} belas"
    scale, word = (10, "puluh") if number < 100 else (100, "ratus") if number < 1000 else (1000, "ribu")
    head = f"se{word}" if number // scale == 1 else f"{in_indonesian(number // scale)} {word}"
    return head + (f" {in_indonesian(number % scale)}" if number % scale else "")


@given(st.integers(2, 99_999))
def test_every_number_is_the_same_in_both_languages_and_in_digits(number):
    texts = [in_english(number), in_indonesian(number), str(number), f"{number:,}", f"{number:,}".replace(",", ".")]
    assert all(numbers(text)[0] == {number} for text in texts), texts
    assert check_numbers(f"{texts[0]} birds", f"{texts[1]} burung") == ""
    assert check_numbers(f"{texts[0]} birds", f"{in_indonesian(number + 1)} burung") == f"without {number}"


def test_the_way_back_is_compared_by_chrf_whatever_the_case():
    check = round_trip_check(lambda texts: ["a red car" if "mobil" in text else "something else" for text in texts])
    passed, stopped = check([("A RED CAR", "mobil merah"), ("a red car", "merah")])
    assert passed == "" and stopped.startswith("comes back as 'something else', chrF ")


@pytest.mark.parametrize("check", [check_length, check_copy, check_repetition, check_numbers, check_colours])
@given(st.text(), st.text())
def test_no_text_breaks_a_check(check, english, indonesian):
    assert isinstance(check(english, indonesian), str)
    if check is not check_length:
        assert check(indonesian, "") == "" or check in (check_numbers, check_colours)
