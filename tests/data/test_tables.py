"""Published files line by line: what is quoting and what is not, what is no text, and pictures found by name."""

import csv
import gzip
import io
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipid_utils.data.report import Report
from clipid_utils.data.sources.disk_table import OnDisk, gathered
from clipid_utils.data.sources.tables import (
    caption_table,
    clean_caption,
    find_picture,
    json_records,
    quoted_table,
    refused,
    text_lines,
)

URL = "http://a.id/1.jpg"


def table(path, content: bytes, key: str = "url"):
    path.write_bytes(content)
    report = Report()
    return [row for row in caption_table(path, key, report)], report


def test_a_caption_table_with_a_header_and_its_oddities(tmp_path):
    content = ("\ufeffcaption\turl\r\n"
               'seekor "kucing" tidur\thttp://a.id/1.jpg\r\n'  # quotes that are none
               '"kucing\thttp://a.id/2.jpg\r\n'  # one that opens nothing
               '"""Kucing"" kata dia"\thttp://a.id/3.jpg\r\n'  # as csv quotes
               '"Halo"\thttp://a.id/4.jpg\r\n'  # csv would not have quoted this
               "dua\tkata\thttp://a.id/5.jpg\r\n"  # a tab in the caption
               "\r\n"
               "  \thttp://a.id/6.jpg\r\n"
               "tanpa alamat\t\r\n"
               "satu kolom\r\n"
               "R&amp;B &copy2020\thttp://a.id/7.jpg\r\n"
               "garis\u2028baru\x85 lain\thttp://a.id/8.jpg").encode() + b"\r\nrusak \xe9\thttp://a.id/9.jpg\r\nakhir\thttp://a.id/10.jpg"
    rows, report = table(tmp_path / "cc.tsv", content)
    assert [(row, line, url[-5:], caption) for row, line, url, caption in rows] == [
        (0, 2, "1.jpg", 'seekor "kucing" tidur'), (1, 3, "2.jpg", '"kucing'), (2, 4, "3.jpg", '"Kucing" kata dia'),
        (3, 5, "4.jpg", '"Halo"'), (4, 6, "5.jpg", "dua kata"), (8, 11, "7.jpg", "R&B &copy2020"),
        (9, 12, "8.jpg", "garis baru lain"), (11, 14, "0.jpg", "akhir"),
    ]
    assert report.dropped == {"empty caption": 1, "empty url": 1, "a column is missing": 1, "not UTF-8": 1}
    assert report.examples["a column is missing"] == ["cc.tsv:10: 'satu kolom'"]
    assert report.examples["not UTF-8"][0].startswith("cc.tsv:13: 'rusak")


@pytest.mark.parametrize("content", [
    "a cat\thttp://a.id/1.jpg\nurl\thttp://a.id/2.jpg\n",  # CC3M as published
    "http://a.id/1.jpg\ta\tcat\nhttp://a.id/2.jpg\turl",  # CC12M as published; a tab in the caption
    "url\tcaption\nhttp://a.id/1.jpg\ta cat\nhttp://a.id/2.jpg\turl\n",
    "\tcaption\turl\n0\ta cat\thttp://a.id/1.jpg\n1\turl\thttp://a.id/2.jpg\n",  # with pandas' index
])
def test_columns_are_found_in_any_order_named_or_not(tmp_path, content):
    rows, report = table(tmp_path / "a.tsv", content.encode())
    assert [(url[-5:], caption) for _, _, url, caption in rows] == [("1.jpg", "a cat"), ("2.jpg", "url")]
    assert not report.dropped


@pytest.mark.parametrize("content", [b"", b"a,http://a.id/1.jpg\n", b"a cat\ta dog\n", b"http://a.id\thttp://b.id\n",
                                     b'{"annotations": []}', b"x\thttp://a.id/1.jpg\ty\n"])
def test_another_file_is_refused_at_its_first_line(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.tsv:1: .*not the header caption<TAB>url, and not"):
        table(tmp_path / "a.tsv", content)


# What the format cannot say: no text, and a caption over several lines with a tab in it
ANY = st.text(st.characters(exclude_categories=["Cs"])).map(lambda text: text.replace("\t", " "))
CAPTIONS = ANY | st.text('"a \t')


@given(st.lists(CAPTIONS.filter(lambda text: clean_caption(text) and text.count("\n") < 10), min_size=1))
def test_what_csv_writes_is_read_back(tmp_path_factory, captions):
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerows([("caption", "url"), *((caption, URL) for caption in captions)])
    path = tmp_path_factory.mktemp("csv") / "a.tsv"
    rows, report = table(path, file.getvalue().encode())
    assert [caption for *_, caption in rows] == [clean_caption(caption) for caption in captions]
    assert not report.dropped


@pytest.mark.parametrize("count, rows", [(20, 2), (21, 1)])
def test_a_quoted_caption_has_at_most_so_many_further_lines(tmp_path, count, rows):
    caption = "\n".join(f"baris {number}" for number in range(count + 1))
    found, report = table(tmp_path / "a.tsv", f'caption\turl\n"{caption}"\t{URL}\nakhir\t{URL}\n'.encode())
    assert [text for *_, text in found][: rows - 1] == [clean_caption(caption)][: rows - 1]
    assert found[-1][1:] == (count + 3, URL, "akhir")


def test_a_quoted_table_with_line_breaks_and_a_broken_end(tmp_path):
    path = tmp_path / "wit.tsv.gz"
    text = ('id\tcaption\tnote\n1\t"two\n\nlines ""here"""\tx\n2\tshort\n3\ta\rb\ty\n\n4\t' + "x" * 200_000 + "\tz\n")
    path.write_bytes(gzip.compress(text.encode() + b"5\t\xff\t\n6\tb\t\xff\n7\tlast\t"))
    report = Report()
    rows = [(row, line, values) for row, _, line, values in quoted_table([path, path], ("id", "caption"), report)]
    assert rows[:2] == [(0, 2, ["1", 'two\n\nlines "here"']), (2, 6, ["3", "a b"])]
    assert [(row, line) for row, line, _ in rows[2:]] == [(3, 8), (5, 10), (6, 11), (7, 2), (9, 6), (10, 8), (12, 10),
                                                         (13, 11)]
    assert report.dropped == {"2 columns where the header has 3": 2, "not UTF-8": 2}
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match=r"wit\.tsv\.gz:\d+: not gzip, or cut off.*fetch the file again"):
        list(quoted_table([path], ("id",), report))
    (tmp_path / "open.tsv").write_text('id\n1\n"2\n' + ("3" * 1000 + "\n") * 17_000)
    with pytest.raises(ValueError, match=r"open\.tsv:3: .*does not close"):
        list(quoted_table([tmp_path / "open.tsv"], ("id",), report))
    (tmp_path / "open.tsv").write_text('id\n1\n"2\n3\n4\n')  # csv itself would give "2\n3\n4\n" and say nothing
    rows = quoted_table([tmp_path / "open.tsv"], ("id",), report)
    assert next(rows)[-1] == ["1"]
    with pytest.raises(ValueError, match=r"open\.tsv:3: .*does not close"):
        next(rows)
    with pytest.raises(ValueError, match=r"open\.tsv:1: the header lacks caption"):
        list(quoted_table([tmp_path / "open.tsv"], ("id", "caption"), report))


def test_a_small_file_that_unpacks_to_an_endless_line_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"id\n" + b"x" * 2**27, 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"a\.tsv\.gz:2: the line is longer than 16,777,216 bytes: .*fetch"):
            list(text_lines(tmp_path / "a.tsv.gz"))
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_what_is_no_text_or_no_gz_is_named(tmp_path):
    (tmp_path / "a.tsv").write_bytes("caption\turl".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.tsv:1: this is UTF-16: save the file as UTF-8"):
        list(text_lines(tmp_path / "a.tsv"))
    (tmp_path / "a.gz").write_bytes(b"caption")
    with pytest.raises(ValueError, match=r"a\.gz:1: not gzip, or cut off"):
        list(text_lines(tmp_path / "a.gz"))


def test_lines_that_are_not_json_are_dropped(tmp_path):
    path, report = tmp_path / "a.jsonl", Report()
    path.write_bytes(b'\xef\xbb\xbf\n{"a": 1}\r\n[2]\n{"a": \n{"a": "\xff"}\n'
                     + b"[" * 100_000 + b"\n" + b"1" * 5000 + b'\n{"a": 3}')
    assert list(json_records(path, report)) == [(2, {"a": 1}), (8, {"a": 3})]
    assert report.dropped == {"not a JSON object": 4, "not UTF-8": 1}
    assert report.examples["not UTF-8"][0].startswith("a.jsonl:5: 'byte 8 of the line is not UTF-8")


@given(st.lists(st.tuples(st.sampled_from("abcd\u00e9"), st.integers(0, 9), st.text(st.characters(codec="utf-8")))))
def test_gathering_on_disk_is_gathering_in_a_dict(rows):
    groups = {}
    for key, place, text in rows:
        groups.setdefault(key, (place, []))[1].append(text)
    assert list(gathered(iter(rows))) == [(key, *value) for key, value in groups.items()]


def test_an_error_while_rows_are_gathered_is_seen():
    def rows():
        yield "a", 1, "b"
        raise ValueError("a.tsv:2: bad")

    with pytest.raises(ValueError, match="a.tsv:2: bad"):
        list(gathered(rows()))


@given(st.lists(st.tuples(st.text("ab", max_size=2), st.text("xy", max_size=2))))
def test_the_first_text_of_a_key_stays(items):
    first, disk = {}, OnDisk()
    for key, text in items:
        assert disk.add(key, text) is (key not in first)
        first.setdefault(key, text)
    other = OnDisk(items)
    assert all(disk.get(key) == other.get(key) == text for key, text in first.items())
    assert disk.get("c") is None and disk.get("\ud83d") is None  # half an emoji, which JSON can hold


@pytest.mark.parametrize("url, mime_type, reason", [
    (URL, "image/jpeg", None), ("HTTPS://a.id/svg", "", None), ("https://a.id/x.svg/300px-x.svg.png", "", None),
    ("https://a.id/x.SVG?width=3", "", "SVG"), ("https://a.id/x", "image/svg+xml", "SVG"), ("//a.id/x.jpg", "",
     "not an http(s) address"), ("ftp://a.id/x.jpg", "", "not an http(s) address"), ("", "", "not an http(s) address"),
])
def test_addresses_not_worth_asking_for(url, mime_type, reason):
    assert refused(url, mime_type) == reason


def test_pictures_are_found_under_the_names_of_2014_and_in_several_folders(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one / "000000000009.jpg", two / "a.jpg", two / "COCO_val2014_000000000007.jpg"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert find_picture("COCO_train2014_000000000009.jpg", [two, one]) == str(one / "000000000009.jpg")
    assert find_picture("COCO_val2014_000000000007.jpg", [one, two]) == str(two / "COCO_val2014_000000000007.jpg")
    (two / "images").mkdir()
    (two / "images/c.jpg").touch()
    assert find_picture("images/c.jpg", [one, two]) == str(two / "images/c.jpg")
    assert find_picture("images/a.jpg", [one, two]) == str(two / "a.jpg")
    assert find_picture("b.jpg", [one, two]) is None and find_picture("", [one]) is None
