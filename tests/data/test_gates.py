"""The gates on pairs with the faults they are made for and without, and the raters' agreement on published values."""

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipid_utils.data.report import Report
from clipid_utils.data.translation.checks import (
    GATES,
    check_colours,
    check_copy,
    check_length,
    check_numbers,
    check_repetition,
    count_gates,
    language_gate,
    numbers,
    pass_gates,
    round_trip_gate,
)
from clipid_utils.data.translation.rating import gwet, gwet_with_interval, read_sheets, write_sheet

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
    ("repetition", "people walk through the old town in the rain at night", "orang di kota tua orang di kota orang di"),
    ("numbers", "three cats", "dua kucing"), ("numbers", "cats", "dua ekor kucing"), ("numbers", "2015", "tahun 2016"),
    ("colours", "a red car", "mobil biru"), ("colours", "a red car", "sebuah mobil"),
    ("colours", "a car", "mobil hitam"), ("colours", "a green and yellow bird", "burung hijau dan hitam"),
]


def test_good_pairs_pass_all_gates():
    report = Report()
    assert [pair for _, *pair in pass_gates(GOOD, GATES, report)] == [list(pair) for pair in GOOD], str(report)
    assert report.kept == len(GOOD)


@pytest.mark.parametrize("name, english, indonesian", BAD)
def test_each_gate_stops_what_it_is_for(name, english, indonesian):
    assert GATES[name]([(english, indonesian)])[0]
    assert GATES[name](GOOD) == [""] * len(GOOD)


def test_a_pair_is_counted_for_the_first_gate_and_alone_for_each():
    pairs = [*GOOD[:3], ("two red cars", "tiga mobil biru"), ("a red car", "mobil biru")]
    report = Report()
    kept = list(pass_gates(iter(pairs), GATES, report, chunk=2))
    assert [number for number, _, _ in kept] == [0, 1, 2] and report.read == 5
    assert report.dropped == {"numbers": 1, "colours": 1}
    assert report.examples["numbers"] == ["two red cars → tiga mobil biru (without 2)"]
    assert count_gates(pairs, GATES)["colours"].dropped == {"colours": 2}


def test_the_stream_is_read_a_chunk_at_a_time():
    read = []
    stream = (read.append(pair) or pair for pair in GOOD)
    next(pass_gates(stream, GATES, Report(), chunk=3))
    assert len(read) == 3


def test_language():
    gate = language_gate()
    assert gate([("", "seorang pria sedang mengendarai sepeda di jalan raya")]) == [""]
    assert gate([("", "a man is riding a bicycle on the main road")]) == ["taken for 'en'"]
    assert gate([("", "the road")]) == [""]  # too short to tell
    assert language_gate(lambda text: "nl", least_words=1)([("", "satu"), ("", "")]) == ["taken for 'nl'", ""]


def test_names_may_stay_as_they_are():
    assert check_copy("the skyline of New York City", "cakrawala New York City") == ""
    assert check_copy("New York", "New York") == ""
    assert check_copy("fence post Texas", "fence post Texas")  # the other words were copied too
    assert check_copy("hot dog", "hot dog")  # a price: what both languages say alike is stopped


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


def test_the_way_back_is_compared_by_chrf():
    gate = round_trip_gate(lambda texts: ["a red car" if "mobil" in text else "something else" for text in texts])
    passed, stopped = gate([("A red car", "mobil merah"), ("a red car", "merah")])
    assert passed == "" and stopped.startswith("comes back as 'something else', chrF ")


@pytest.mark.parametrize("check", [check_length, check_copy, check_repetition, check_numbers, check_colours])
@given(st.text(), st.text())
def test_no_text_breaks_a_gate(check, english, indonesian):
    assert isinstance(check(english, indonesian), str)
    if check is not check_length:
        assert check(indonesian, "") == "" or check in (check_numbers, check_colours)


# --- Agreement --------------------------------------------------------------------------------------------------------

RAW_4_RATERS = np.array([  # Gwet's Handbook of Inter-Rater Reliability, 4th edition, his example with gaps
    [1, 1, 0, 1], [2, 2, 3, 2], [3, 3, 3, 3], [3, 3, 3, 3], [2, 2, 2, 2], [1, 2, 3, 4], [4, 4, 4, 4], [1, 1, 2, 1],
    [2, 2, 2, 2], [0, 5, 5, 5], [0, 0, 1, 1], [0, 0, 3, 0]])


def from_table(table) -> np.ndarray:
    """Two raters' ratings whose table of counts this is."""
    return np.array([(k, m) for k, row in enumerate(table, 1) for m, n in enumerate(row, 1) for _ in range(n)])


def test_ac1_by_hand():
    # Of 4 items 3 agree; 5 of the 8 ratings are 4, 3 are 1. Chance: 2 (5/8)(3/8) / 3 = 0.15625
    ratings = np.array([[4, 4], [4, 4], [1, 1], [4, 1]])
    assert gwet(ratings) == pytest.approx((0.75 - 0.15625) / (1 - 0.15625))


def test_ac1_on_published_examples():
    assert gwet(from_table([[118, 5], [2, 0]]), (1, 2)) == pytest.approx(0.9408, abs=5e-5)  # Gwet 2008, kappa is -0.02
    table = from_table([[13, 0, 0], [0, 20, 7], [0, 4, 56]])  # irrCAC's cont3x3abstractors, as irrCAC computes it
    assert gwet(table, (1, 2, 3)) == pytest.approx(0.84933, abs=1e-5)
    assert gwet(RAW_4_RATERS, (1, 2, 3, 4, 5)) == pytest.approx(0.77544, abs=1e-5)


def test_the_interval_holds_the_value_and_narrows_with_more_items():
    rng = np.random.default_rng(0)

    def interval(count):
        truth = rng.choice([1, 2, 3, 4], count, p=[0.1, 0.1, 0.2, 0.6])
        noisy = np.where(rng.random((count, 2)) < 0.8, truth[:, None], rng.integers(1, 5, (count, 2)))
        return gwet_with_interval(noisy)

    small, large = interval(50), interval(800)
    for found in (small, large):
        assert found["low"] < found["value"] < found["high"]
    assert large["high"] - large["low"] < 0.5 * (small["high"] - small["low"])


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1))
def test_agreement_knows_no_order_of_items_or_raters_and_is_one_where_all_agree(rows):
    ratings = np.array(rows)
    if (np.sum(ratings > 0, axis=1) < 2).all():
        with pytest.raises(ValueError, match="no item has the ratings of two raters"):
            gwet(ratings)
        return
    assert gwet(ratings) == pytest.approx(gwet(ratings[::-1, ::-1])) and gwet(ratings) <= 1
    alike = np.repeat(ratings[:, :1], 3, axis=1)
    if (alike > 0).any():
        assert gwet(alike) == pytest.approx(1)


def test_a_sheet_is_drawn_evenly_and_read_back(tmp_path):
    pairs = [(f"cat {i}", f"kucing, “{i}”\n") for i in range(1000)]
    places = write_sheet(iter(pairs), tmp_path / "a.csv", seed=1)
    assert len(set(places)) == 100 and places != sorted(places)
    drawn = [place for seed in range(30) for place in write_sheet(pairs, tmp_path / "b.csv", seed=seed)]
    assert np.ptp(np.histogram(drawn, 10, (0, 1000))[0]) < 120  # of 300 in each; five standard deviations are 90
    for rater, name in enumerate(("a", "b")):
        write_sheet(pairs, tmp_path / f"{name}.csv", seed=1)
        rows = list(csv.DictReader(open(tmp_path / f"{name}.csv", encoding="utf-8-sig", newline="")))
        assert [(row["english"], row["indonesian"]) for row in rows] == [pairs[place] for place in places]
        for i, row in enumerate(rows):
            row["rating"] = " 4 " if i % 2 else "" if i == 0 else str(1 + rater)
        with open(tmp_path / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    ratings = read_sheets([tmp_path / "a.csv", tmp_path / "b.csv"])
    assert ratings[:4].tolist() == [[0, 0], [4, 4], [1, 2], [4, 4]]


def test_a_row_without_its_last_comma_has_no_rating(tmp_path):
    (tmp_path / "a.csv").write_text("number,english,indonesian,rating\n1,a cat,kucing\n2,a dog,anjing,4\n")
    assert read_sheets([tmp_path / "a.csv"]).tolist() == [[0], [4]]


def test_bad_sheets_are_named(tmp_path):
    write_sheet([("a", "b")], tmp_path / "a.csv")
    write_sheet([("a", "c")], tmp_path / "b.csv")
    with pytest.raises(ValueError, match="b.csv and .*a.csv hold other pairs"):
        read_sheets([tmp_path / "a.csv", tmp_path / "b.csv"])
    (tmp_path / "a.csv").write_text("number,english,indonesian,rating\n1,a,b,5\n")
    with pytest.raises(ValueError, match=r"a.csv:2: the rating '5' is none of \(1, 2, 3, 4\)"):
        read_sheets([tmp_path / "a.csv"])
    (tmp_path / "a.csv").write_text("number;english;indonesian;rating\n1;a;b;4\n")
    with pytest.raises(ValueError, match="has not the columns number, english"):
        read_sheets([tmp_path / "a.csv"])
    with pytest.raises(ValueError, match="ratings other than"):
        gwet(np.array([[5, 5]]))
