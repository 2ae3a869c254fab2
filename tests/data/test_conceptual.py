"""CC3M, CC12M and SBU: rows for the downloader, and the mirrors' pictures with translated captions."""

import gzip
import io
import json
import tarfile
import tracemalloc

import pytest

from clipid_utils.data.captions import read_captions, write_captions
from clipid_utils.data.report import Report
from clipid_utils.data.sources.conceptual import (
    SBU_FILES,
    read_conceptual,
    read_mirror,
    read_sbu,
)
from clipid_utils.data.sources.disk_table import OnDisk
from clipid_utils.data.tars import MAX_MEMBER


def test_rows_for_the_downloader_count_as_the_ancestors_did(tmp_path):
    (tmp_path / "cc12m_translate_final.tsv").write_text(
        "caption\turl\nseekor <PERSON> kucing\thttp://a.id/1.jpg\n\n\thttp://a.id/2.jpg\nlogo\thttp://a.id/logo.svg?x=1\n"
        "kucing lain\thttp://a.id/1.jpg\nanjing\tftp://a.id/3.jpg\nsapi\thttps://a.id/4.jpg?w=3")
    report = Report()
    rows = list(read_conceptual(tmp_path / "cc12m_translate_final.tsv", report, source="cc12m"))
    assert rows == [
        {"url": url, "captions": [caption], "source": "cc12m", "split": None, "row": row} for url, caption, row in
        (("http://a.id/1.jpg", "seekor <PERSON> kucing", 0), ("https://a.id/4.jpg?w=3", "sapi", 5))]
    assert report.dropped == {"empty caption": 1, "SVG": 1, "repeated address": 1, "not an http(s) address": 1}
    assert report.examples["repeated address"] == ["cc12m_translate_final.tsv:6: 'http://a.id/1.jpg'"]


def test_sbus_two_files_belong_together_by_line(tmp_path):
    urls, captions = (tmp_path / name for name in SBU_FILES)
    urls.write_text("".join(f"http://static.flickr.com/{number}.jpg\r\n" for number in range(4)))
    captions.write_bytes(b"in the 1950&amp;s\n\n caf\xe9 \na \"dog\t\"")
    report = Report()
    assert [(row["row"], row["url"][-5:], row["captions"]) for row in read_sbu(tmp_path, report)] == [
        (0, "0.jpg", ["in the 1950&s"]), (3, "3.jpg", ['a "dog "'])]
    assert report.dropped == {"empty caption": 1, "not UTF-8": 1}
    urls.write_text("http://static.flickr.com/0.jpg\n")
    with pytest.raises(ValueError, match=r"captions\.txt:2: the other file of .* ends before this line"):
        list(read_sbu(tmp_path, Report()))


def sample(name: str, text: str | None = "a cat", picture: bytes | None = b"\xff\xd8jpeg", **facts) -> dict:
    files = {"jpg": picture, "txt": text and text.encode(), "json": json.dumps(facts).encode()}
    return {f"{name}.{ending}": content for ending, content in files.items() if content is not None}


def write_tar(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path):
    write_tar(tmp_path / "cc3m-train-0000.tar", {
        **sample("00000/000000001", url="http://a.id/1.jpg", key="000000001", status="success"),
        **sample("00000/000000002", None, caption=" a\ndog ", url="http://a.id/2.jpg"),
        **sample("00000/000000003", picture=None, url="http://a.id/3.jpg"), **sample("00000/000000004", " "),
        "00000/000000005.JPG": b"jpeg", "00000/000000005.txt": b"caf\xe9", "00000/000000005.json": b"{",
    })
    write_tar(tmp_path / "cc3m-train-0001.tar", sample("000010000", "a cow", url="http://a.id/4.jpg"))
    return sorted(tmp_path.glob("*.tar"))


def test_the_mirrors_pictures_with_their_captions(tmp_path, tars):
    report = Report()
    records = list(read_mirror(tars, report, source="cc3m"))
    assert records == [{"image": b"\xff\xd8jpeg", "captions": [caption], "source": "cc3m", "split": None}
                       for caption in ("a cat", "a dog", "a cow")]
    assert report.dropped == {"no picture in the sample": 1, "empty caption": 1, "not UTF-8": 1}
    assert report.examples["empty caption"] == ["cc3m-train-0000.tar, 00000/000000004"]
    write_captions(read_mirror(tars, Report(), source="cc3m"), tmp_path / "cc3m.parquet")
    assert read_captions(tmp_path / "cc3m.parquet")["captions"][:] == [["a cat"], ["a dog"], ["a cow"]]


def test_translations_are_found_by_address(tmp_path, tars):
    (tmp_path / "cc3m.tsv").write_text("caption\turl\nseekor sapi\thttp://a.id/4.jpg\nseekor kucing\thttp://a.id/1.jpg\n")
    rows, report = read_conceptual(tmp_path / "cc3m.tsv", Report(), source="cc3m"), Report()
    translations = OnDisk((row["url"], row["captions"][0]) for row in rows)
    records = read_mirror(tars, report, source="cc3m", translations=translations)
    assert [record["captions"] for record in records] == [["seekor kucing"], ["seekor sapi"]]
    assert report.dropped == {"no translation for its address": 3, "no picture in the sample": 1}


def test_memory_does_not_grow_with_a_tar(tmp_path):
    write_tar(tmp_path / "cc3m.tar", {name: content for number in range(1000)
                                      for name, content in sample(f"{number:09d}").items()})
    records = read_mirror(tmp_path / "cc3m.tar", Report(), source="cc3m")
    next(records)
    tracemalloc.start()
    try:
        assert sum(1 for _ in records) == 999
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_tar_that_is_cut_off_anywhere_is_named(tmp_path, pack):
    path = tmp_path / "cc3m.tar"
    write_tar(path, {**sample("1", picture=b"x" * 700), **sample("2")})
    whole = path.read_bytes()
    (end,) = [place for place in range(0, len(whole), 512) if not whole[place:].strip(b"\0")][:1]
    packed = pack(whole)
    cuts = [*range(0, end + 512, 256), end + 511] if pack is bytes else range(0, len(packed) - 8, 37)
    for cut in cuts:
        path.write_bytes(packed[:cut])
        with pytest.raises(ValueError, match=r"cc3m\.tar: not a whole tar \(.*\): fetch it again"):
            list(read_mirror(path, Report(), source="cc3m"))
    path.write_bytes(pack(whole[: end + 512]))  # the mark of the end
    assert len(list(read_mirror(path, Report(), source="cc3m"))) == 2


def header(size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo("a.jpg")
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("content, reason", [
    (b"<html>", "truncated header"), (header(100) + bytes(512) + b"<html>" + bytes(506), "bad checksum"),
    (header(MAX_MEMBER + 1), "'a.jpg' has 134,217,729 bytes"),
    (header(10**10, tarfile.XHDTYPE), "'a.jpg' has 10,000,000,000 bytes"),
    (header(10**10, tarfile.GNUTYPE_LONGNAME), "'a.jpg' has 10,000,000,000 bytes"),
    (gzip.compress((header(2**20) + bytes(2**20)) * 20 + bytes(1024)), "it unpacks to more than 100 times its size"),
    (gzip.compress(header(100) + bytes(2**23)), "it unpacks to more than 100 times its size"),  # after its end
], ids=range(7))
def test_a_file_that_is_not_a_tar_or_unpacks_to_a_bomb_is_named(tmp_path, content, reason):
    (tmp_path / "cc3m.tar").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"cc3m\.tar: not a whole tar \({reason}"):
            list(read_mirror(tmp_path / "cc3m.tar", Report(), source="cc3m"))
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_the_text_file_is_the_caption_and_then_the_json_and_folders_are_parts_of_names(tmp_path):
    write_tar(tmp_path / "cc3m.tar", {
        **sample("a/1", "the text", caption="not this"), **sample("b/1", None, caption="the JSON"),
        **sample("b/2", None), "b/3.jpg": b"x", "b/3.json": b"[" * 100_000, "b/4.seg.txt": b"not this", "b/4.jpg": b"x",
    })
    report = Report()
    records = list(read_mirror(tmp_path / "cc3m.tar", report, source="cc3m"))
    assert [record["captions"] for record in records] == [["the text"], ["the JSON"]]
    assert report.examples == {"no caption in the sample": [f"cc3m.tar, b/{number}" for number in (2, 3, 4)]}
