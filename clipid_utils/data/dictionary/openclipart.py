"""Open Clip Art 0.18: drawings in the public domain with the English titles, keywords and descriptions of their
authors, which are noisy. The course translates and filters this English caption set."""

import gzip
import hashlib
import io
import json
import re
import xml.etree.ElementTree as ElementTree
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_from_disk

from clipid_utils.data.cleaning.near_copies import near_copies, signatures
from clipid_utils.data.dictionary.artists import look_up
from clipid_utils.data.dictionary.fetch import FetchError, fetch_debian
from clipid_utils.data.dictionary.rasterise import draw_rows, is_blank, render_stamp, to_dataset
from clipid_utils.data.dictionary.splits import VALIDATION, share
from clipid_utils.data.prepared import prepare_once
from clipid_utils.data.report import Report
from clipid_utils.files import read_json, write_json
from clipid_utils.paths import CACHE, DATA

PACKAGE = "openclipart-svg"
RECIPE = 1  # raise it when the code makes different pictures or rows
FEATURES = Features({
    "image": Image(), "title_en": Value("string"), "keywords_en": List(Value("string")),
    "description_en": Value("string"), "source": Value("string"), "author": Value("string"),
    "licence": Value("string"), "group": Value("string"), "folder": Value("string"),
})  # fmt: skip
# 1,500 drawings each that are almost the same: icons in the colours of three desktops, stars made by a program.
SERIES = {"computer/icons": "a desktop icon", "shapes/stars": "a star from a series"}
RDF, WORK = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}", "{http://web.resource.org/cc/}Work"
DC = "{http://purl.org/dc/elements/1.1/}"
PUBLIC_DOMAIN = re.compile("public ?domain", re.IGNORECASE)
OTHER_LANGUAGE = re.compile(r"(?!en)[a-z]{2}\b", re.IGNORECASE)
# Words that the library's own software left behind
REFERENCE = r"hash\(0x[0-9a-f]+\)"
LEFTOVER = re.compile(rf"{REFERENCE}|hash|0x[0-9a-f]+|unsorted", re.IGNORECASE)
MOST_UNZIPPED = 2**26  # bytes of one SVG; the largest has 1.7 MB


def load_openclipart(cache: Path | None = None) -> tuple[Dataset, Report]:
    """Loads Open Clip Art and the report of the drawings that were left out. The first call prepares it.

    Columns: FEATURES; `image` is RGB, 128 x 128, cropped to the drawing and centred on white. `title_en` is as its
    author wrote it (see `to_records` for captions); `group` is the first folder of `source`. The first call needs a
    network and about a minute; if it is interrupted, the next one continues. The package links 663 of its files into
    second folders; each drawing is here once. Raises FetchError, also if there is no apt-get.
    """
    cache = Path(cache or CACHE)
    pin = read_json(DATA / "sources.json")["openclipart"][PACKAGE]
    number = hashlib.sha256(f"{RECIPE} {json.dumps(pin, sort_keys=True)}".encode()).hexdigest()[:12]
    prepared = prepare_once(cache / f"openclipart-{number}", partial(prepare, pin=pin, cache=cache, number=number))
    stored = read_json(prepared / "report.json")
    report = Report(stored["kept"], Counter(stored["dropped"]), stored["examples"])
    return load_from_disk(str(prepared / "rows")), report


def prepare(folder: Path, pin: dict, cache: Path, number: str) -> None:
    """Fills the folder with the prepared set; the fetched package and the drawings stay in `cache`."""
    package = fetch_debian(PACKAGE, pin, cache)
    if package is None:
        raise FetchError(f"Open Clip Art comes as the Debian package {PACKAGE}, which is not available here: prepare "
                         "it where apt-get has it (Debian, Ubuntu, Colab, Binder, WSL) and copy data/cache from there.")
    report, rows = Report(), []
    drawings = list(read_drawings(package, report))
    for row in draw_rows(drawings, render_stamp, cache / "pictures" / f"openclipart-{number}", "openclipart"):
        is_empty = row["png"] is None or is_blank(row["png"])
        if report.count("nothing to be seen on white" if is_empty else None, row["source"]):
            rows.append(row)
    to_dataset(rows, FEATURES).save_to_disk(folder / "rows")
    write_json(folder / "report.json", vars(report))


def read_drawings(package: Path, report: Report) -> Iterator[dict]:
    """The rows of all drawings with an English title, with `drawing`, the path; the others go to the report."""
    root = next(package.rglob("openclipart/svg"))
    for path in sorted(root.rglob("*.svg")):
        source = path.relative_to(root).as_posix()
        if series := look_up(SERIES, source):
            report.drop(series, source)
            continue
        try:
            row, language = read_metadata(path)
        except ValueError as error:
            report.drop("metadata that cannot be read", f"{source}: {error}")
            continue
        if not row["title_en"]:
            report.drop("no title", source)
        elif OTHER_LANGUAGE.match(language):  # not "en-GB", "English", "All", "N/A"
            report.drop("a title in another language, as its author says", f"{source}: {language} {row['title_en']}")
        elif not PUBLIC_DOMAIN.search(row["licence"] or "public domain"):  # without one: the package's licence
            report.drop("not in the public domain", f"{source}: {row['licence']}")
        else:
            folder = source.rpartition("/")[0]
            yield row | {"licence": "public domain", "source": source, "drawing": path, "folder": folder,
                         "group": folder.partition("/")[0]}


def read_metadata(path: Path) -> tuple[dict, str]:
    """The title, keywords, description, author and licence in an SVG's RDF ("" if missing), and its language.

    The file may be gzipped. Raises ValueError if it is not XML, is too large or has no such metadata.
    """
    content = path.read_bytes()
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MOST_UNZIPPED + 1)
        if len(content) > MOST_UNZIPPED:
            raise OSError(f"more than {MOST_UNZIPPED:,} bytes")
        root = ElementTree.fromstring(content)
    except (ElementTree.ParseError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"no SVG ({error})") from error
    work = next(root.iter(WORK), None)
    if work is None:
        raise ValueError("no cc:Work in it")
    author = _text(work.find(f"{DC}creator"))
    keywords = [_text(item) for item in work.iterfind(f"{DC}subject//{RDF}li")]
    licence = work.find("{http://web.resource.org/cc/}license")
    row = {
        "title_en": _text(work.find(f"{DC}title")),
        "keywords_en": clean_keywords(keywords, author),
        "description_en": re.sub(rf"(?i){REFERENCE}", "", _text(work.find(f"{DC}description"))).strip(),
        "author": author,
        "licence": "" if licence is None else licence.get(f"{RDF}resource", ""),
    }
    return row, _text(work.find(f"{DC}language"))


def clean_keywords(keywords: Iterable[str], author: str) -> list[str]:
    """The keywords in their order, each once, without the author's name and the words that software left behind."""
    words = dict.fromkeys(" ".join(keyword.replace("_", " ").split()) for keyword in keywords)
    return [word for word in words
            if any(map(str.isalpha, word)) and not LEFTOVER.fullmatch(word) and word.lower() != author.lower()]


def _text(element: ElementTree.Element | None) -> str:
    return "" if element is None else " ".join("".join(element.itertext()).split())


def split_openclipart(openclipart: Dataset, dictionary: DatasetDict) -> tuple[DatasetDict, Report]:
    """Splits Open Clip Art into train and validation, for training beside the picture dictionary's `train`.

    Near copies, also in the mirror, of pictures that the dictionary does not train on are left out, and so are drawings
    with the name of an unseen concept. Validation is a tenth, drawn by a hash of `source` from the drawings without a
    near copy among the others: no picture is on both sides.
    """
    images = list(openclipart["image"])
    seen = signatures(images, desc="comparing pictures")
    mirrored = signatures(images, mirrored=True, desc="and their mirror images")
    reasons: dict[int, str] = {}
    for name in (name for name in dictionary if name != "train"):
        others = signatures(dictionary[name]["image"])
        for side in (seen, mirrored):
            for row in near_copies(side, others)[:, 0].tolist():
                reasons.setdefault(row, f"a near copy of a picture of {name}")
    unseen = {name.lower() for name in dictionary["unseen_concept"]["name_en"][:]}
    for row, title in enumerate(openclipart["title_en"]):
        if tidy_title(title).lower() in unseen:
            reasons.setdefault(row, "the name of an unseen concept")
    report, sources = Report(), openclipart["source"][:]
    kept = np.array([row for row, source in enumerate(sources) if report.count(reasons.get(row), source)], np.int64)
    pairs = np.concatenate([near_copies(side.take(kept), seen.take(kept)) for side in (seen, mirrored)])
    alone = np.setdiff1d(kept, kept[pairs[pairs[:, 0] != pairs[:, 1]]])
    drawn = [row for row in alone if share(f"openclipart {sources[row]}") < VALIDATION]
    train = np.setdiff1d(kept, drawn)
    return DatasetDict(train=openclipart.select(train), validation=openclipart.select(drawn)), report


def to_records(rows: Iterable[dict], split: str = "train") -> Iterator[dict]:
    """Captions records of rows of Open Clip Art: the tidied title and, if there is one, the description."""
    for row in rows:
        captions = dict.fromkeys(filter(None, (tidy_title(row["title_en"]), row["description_en"])))
        if captions:
            yield {"image": row["image"], "captions": list(captions), "source": "openclipart", "split": split}


def tidy_title(title: str) -> str:
    """A title as people say it: without "Clipart by …", the marks of file names and running numbers.

    "Clipart by Nicu Buculei - arrow08_4" -> "arrow"; "CayennePepper_01.svg" -> "Cayenne Pepper".
    """
    title = re.sub(r"^clip ?art by .*? - |\.svg$", "", title, flags=re.IGNORECASE)
    title = re.sub(r"(?<=[a-z]{2})(?=[A-Z][a-z]{2})", " ", re.sub(r"_|(?<=\w)-(?=\w)", " ", title))
    return " ".join(re.sub(r"(?<=\D)\d*( \d+)*$", "", " ".join(title.split())).split())
