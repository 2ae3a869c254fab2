"""Open Clip Art 0.18: drawings in the public domain with the English titles, keywords and descriptions that their
authors gave them, noisy as such texts are. The course's English caption set, to be translated and filtered."""

import gzip
import hashlib
import json
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    Value,
    disable_progress_bars,
    enable_progress_bars,
    load_from_disk,
)
from filelock import FileLock
from tqdm.auto import tqdm

from clipid_utils.data.cleaning.near_copies import near_copies, signatures
from clipid_utils.data.dictionary.drawing import Drawers
from clipid_utils.data.dictionary.fetch import FetchError, fetch_debian, read_sources
from clipid_utils.data.dictionary.rasterise import pixels
from clipid_utils.data.dictionary.splits import VALIDATION, share
from clipid_utils.data.report import Report
from clipid_utils.paths import CACHE, DATA

PACKAGE = "openclipart-svg"
RECIPE = 1  # raise it when the code makes other pictures or other rows
FEATURES = Features({
    "image": Image(), "title_en": Value("string"), "keywords_en": List(Value("string")),
    "description_en": Value("string"), "source": Value("string"), "author": Value("string"),
    "licence": Value("string"), "group": Value("string"), "folder": Value("string"),
})  # fmt: skip
# A thousand and a half of almost the same each: icons in the colours of three desktops, stars made by a program.
SERIES = {"computer/icons": "a desktop icon", "shapes/stars": "a star from a series"}
RDF, WORK = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}", "{http://web.resource.org/cc/}Work"
DC = "{http://purl.org/dc/elements/1.1/}"
PUBLIC_DOMAIN = re.compile("public ?domain", re.IGNORECASE)
OTHER_LANGUAGE = re.compile(r"(?!en)[a-z]{2}\b", re.IGNORECASE)
# What the library's own software left among its words, and what it filed under no heading.
REFERENCE = r"hash\(0x[0-9a-f]+\)"
LEFTOVER = re.compile(rf"{REFERENCE}|hash|0x[0-9a-f]+|unsorted", re.IGNORECASE)
SHARD = 400  # drawings kept at a time, so that an interrupted run draws no more than these again


def load_openclipart(cache: Path | None = None) -> tuple[Dataset, Report]:
    """Loads Open Clip Art, prepared first where that has not been done, and the report of what was left out of it.

    Columns: FEATURES; `image` is RGB, 128 x 128, cut to what is drawn and centred on white. `title_en` is as its author
    wrote it (see `to_records` for captions), `group` is the first folder of `source`. The first call needs a network
    and about a minute, later ones neither; an interrupted one goes on where it stopped. The package links 663 of its
    files into second folders: a drawing stands here once. Raises FetchError, also where there is no apt-get.
    """
    cache = Path(cache or CACHE)
    pin = read_sources(DATA / "sources.json")["openclipart"][PACKAGE]
    number = hashlib.sha256(f"{RECIPE} {json.dumps(pin, sort_keys=True)}".encode()).hexdigest()[:12]
    prepared = cache / f"openclipart-{number}"
    if not prepared.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "preparing-openclipart.lock"):  # a second process waits and finds it done
            if not prepared.is_dir():
                prepare(prepared, pin, cache)
    stored = json.loads((prepared / "report.json").read_text(encoding="utf-8"))
    report = Report(kept=stored["kept"], examples=stored["examples"])
    report.dropped.update(stored["dropped"])
    return load_from_disk(str(prepared / "rows")), report


def prepare(folder: Path, pin: dict, cache: Path) -> None:
    """Makes the prepared set in `folder`, which appears only when it is whole."""
    package = fetch_debian(PACKAGE, pin, cache)
    if package is None:
        raise FetchError(f"Open Clip Art comes as the Debian package {PACKAGE}, which is not to be had here: prepare "
                         "it where apt-get has it (Debian, Ubuntu, Colab, Binder, WSL) and copy data/cache from there.")
    report, rows = Report(), []
    for row in add_pictures(list(read_drawings(package, report)), cache / "pictures" / folder.name):
        if row["png"] is None or pixels(row["png"]).min() > 240:
            report.drop("nothing to be seen on white", row["source"])
        else:
            report.keep()
            rows.append(row)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    disable_progress_bars()  # of datasets: one more bar for a second's work
    to_dataset(rows).save_to_disk(partial / "rows")
    enable_progress_bars()
    (partial / "report.json").write_text(json.dumps(vars(report), ensure_ascii=False), encoding="utf-8")
    os.replace(partial, folder)


def read_drawings(package: Path, report: Report) -> Iterator[dict]:
    """The rows of all drawings with an English title, without the pictures but with `path`; the others are reported."""
    root = next(package.rglob("openclipart/svg"))
    for path in sorted(root.rglob("*.svg")):
        source = path.relative_to(root).as_posix()
        series = next((reason for place, reason in SERIES.items() if source.startswith(place + "/")), None)
        if series:
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
        elif not PUBLIC_DOMAIN.search(row["licence"] or "public domain"):  # where none is named, the package's holds
            report.drop("not in the public domain", f"{source}: {row['licence']}")
        else:
            folder = source.rpartition("/")[0]
            yield row | {"licence": "public domain", "source": source, "path": path, "folder": folder,
                         "group": folder.partition("/")[0]}


def read_metadata(path: Path) -> tuple[dict, str]:
    """The title, keywords, description, author and licence in an SVG's RDF, and its language; "" for what is missing.

    The file may be gzipped. Raises ValueError for one that is no XML or has no such metadata.
    """
    content = path.read_bytes()
    try:
        root = ElementTree.fromstring(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    except (ElementTree.ParseError, OSError, EOFError) as error:
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
    """The keywords in their order, each once: without the author's name and what the library's software left there."""
    words = dict.fromkeys(" ".join(keyword.replace("_", " ").split()) for keyword in keywords)
    return [word for word in words
            if any(map(str.isalpha, word)) and not LEFTOVER.fullmatch(word) and word.lower() != author.lower()]


def _text(element: ElementTree.Element | None) -> str:
    return "" if element is None else " ".join("".join(element.itertext()).split())


def add_pictures(rows: list[dict], folder: Path) -> Iterator[dict]:
    """The rows with their `png`, None for an empty drawing; kept in `folder` in parts, so that none is drawn twice."""
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(rows), desc="drawing openclipart") as bar, Drawers() as drawers:
        for start in range(0, len(rows), SHARD):
            part = rows[start : start + SHARD]
            number = hashlib.sha256("\n".join(row["source"] for row in part).encode()).hexdigest()[:12]
            path = folder / f"{number}.parquet"  # by what it holds, lest other rows take its pictures for theirs
            if not path.exists():
                drawn = drawers.map("render_stamp", [row["path"] for row in part])
                pngs = [None if isinstance(png, ValueError) else png for png in drawn]  # nothing drawn, or no drawing
                table = pyarrow.table({"png": pyarrow.array(pngs, pyarrow.binary())})
                pyarrow.parquet.write_table(table, path.with_suffix(".partial"))
                os.replace(path.with_suffix(".partial"), path)
            bar.update(len(part))
            pngs = pyarrow.parquet.read_table(path)["png"].to_pylist()
            yield from (row | {"png": png} for row, png in zip(part, pngs, strict=True))


def to_dataset(rows: list[dict]) -> Dataset:
    """The rows as a Dataset."""
    columns = {name: [row[name] for row in rows] for name in FEATURES if name != "image"}
    columns["image"] = [{"bytes": row["png"], "path": None} for row in rows]
    return Dataset.from_dict({name: columns[name] for name in FEATURES}, features=FEATURES)


def split_openclipart(openclipart: Dataset, dictionary: DatasetDict) -> tuple[DatasetDict, Report]:
    """Splits Open Clip Art into train and validation, to be trained on beside the picture dictionary's `train`.

    Left out, with their mirror images: near copies of any picture that the dictionary does not train on, and drawings
    that bear the name of an unseen concept. Validation is a tenth, drawn by a hash of `source` from the drawings
    without a near copy among the others, so that no picture stands on both sides.
    """
    tested = {name: rows for name, rows in dictionary.items() if name != "train" and len(rows)}
    images = list(openclipart["image"])
    seen = signatures(images, progress=lambda part: tqdm(part, desc="comparing pictures"))
    mirrored = signatures(images, mirrored=True, progress=lambda part: tqdm(part, desc="and their mirror images"))
    reasons: dict[int, str] = {}
    for name, rows in tested.items():
        others = signatures(rows["image"])
        for side in (seen, mirrored):
            for row in near_copies(side, others)[:, 0].tolist():
                reasons.setdefault(row, f"a near copy of a picture of {name}")
    unseen = {name.lower() for name in dictionary["unseen_concept"]["name_en"][:]}
    for row, title in enumerate(openclipart["title_en"]):
        if tidy_title(title).lower() in unseen:
            reasons.setdefault(row, "the name of an unseen concept")
    report, kept = Report(), []
    for row, source in enumerate(openclipart["source"]):
        if row in reasons:
            report.drop(reasons[row], source)
        else:
            report.keep()
            kept.append(row)
    kept = np.array(kept, np.int64)
    pairs = np.concatenate([near_copies(side.take(kept), seen.take(kept)) for side in (seen, mirrored)])
    doubled = set(kept[pairs[pairs[:, 0] != pairs[:, 1]].ravel()].tolist())
    drawn = [row for row in kept.tolist()
             if row not in doubled and share(f"openclipart {openclipart['source'][row]}") < VALIDATION]
    train = np.setdiff1d(kept, drawn)
    return DatasetDict(train=openclipart.select(train), validation=openclipart.select(drawn)), report


def to_records(rows: Iterable[dict], split: str = "train") -> Iterator[dict]:
    """Captions records of rows of Open Clip Art: the title, tidied, and the description where there is one."""
    for row in rows:
        captions = dict.fromkeys(filter(None, (tidy_title(row["title_en"]), row["description_en"])))
        if captions:
            yield {"image": row["image"], "captions": list(captions), "source": "openclipart", "split": split}


def tidy_title(title: str) -> str:
    """A title as one would say it: without "Clipart by …", file names' marks and running numbers.

    "Clipart by Nicu Buculei - arrow08_4" -> "arrow"; "CayennePepper_01.svg" -> "Cayenne Pepper".
    """
    title = re.sub(r"^clip ?art by .*? - |\.svg$", "", title, flags=re.IGNORECASE)
    title = re.sub(r"(?<=[a-z]{2})(?=[A-Z][a-z]{2})", " ", re.sub(r"_|(?<=\w)-(?=\w)", " ", title))
    return " ".join(re.sub(r"(?<=\D)\d*( \d+)*$", "", " ".join(title.split())).split())
