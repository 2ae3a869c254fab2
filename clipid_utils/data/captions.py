"""The captions record, from and to JSON lines or Parquet, and captions drawn from a picture's name and keywords.

A record is `{"image_path" | "image", "captions": [str, …], "source", "split"}`, one a line or a row; the last two may
be missing. An `image_path` is relative to the file that lists it.
"""

import codecs
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from jaxtyping import Int32

from clipid_utils.wording import fill, load_wording

# How often a caption is the name alone, keywords alone, the name with keywords, or the name in a template.
CAPTION_SHARES = {"name": 0.4, "keywords": 0.1, "both": 0.2, "template": 0.3}
TEMPLATES = (*load_wording()["plain"], *load_wording()["templates"])  # without and with a classifier
# What a mirrored picture would make untrue: left and right, the points of the compass, the way a clock turns.
SIDES = re.compile(r"\b(kiri|kanan|timur|barat|tenggara|jarum jam|left|right|east|west|clockwise)\b", re.IGNORECASE)

TEXTS = {"captions": datasets.List(Value("string")), "source": Value("string"), "split": Value("string")}
PICTURES = {"image_path": Value("string"), "image": datasets.Image()}
HALF = re.compile("[\ud800-\udfff]")  # "\\ud83d" in JSON, half an emoji
MOST_LISTED = 10  # bad lines that an error quotes; all are counted


def read_captions(
    path: str | os.PathLike, *, root: str | os.PathLike | None = None, check_files: bool = True
) -> Dataset:
    """The captions records of a .jsonl or .parquet file, in its order, with `image_path` made whole.

    Relative paths start at `root`, or else at the folder of the file. The file is read once, line by line, into an
    Arrow file in the cache of `datasets`, from which it is mapped (until it changes). Other keys are left out. Raises
    ValueError that names up to ten of the bad lines (for Parquet: rows) with their number; the pictures themselves are
    only looked for, which `check_files=False` leaves out.
    """
    path, stat = Path(path).absolute(), os.stat(path)
    root = path.parent if root is None else Path(root).absolute()
    version = repr((__name__, str(path), str(root), stat.st_size, stat.st_mtime_ns, sorted(_columns(path))))
    try:
        records = Dataset.from_generator(
            _records, features=Features(_columns(path)), gen_kwargs={"path": path, "root": root},
            fingerprint=hashlib.sha256(version.encode()).hexdigest()[:16],
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    if check_files and "image_path" in records.column_names:
        paths = (name for chunk in records.select_columns("image_path").iter(1000) for name in chunk["image_path"])
        missing = [row for row, name in enumerate(paths) if not os.path.isfile(name)]
        if missing:
            first = set(missing[:MOST_LISTED])
            _refuse(path, [f"{path.name}:{number}: {_not_found(record['image_path'], root)}"
                           for row, (number, record, _) in enumerate(_lines(path)) if row in first], len(missing))
    return records


def check_captions(path: str | os.PathLike, *, root: str | os.PathLike | None = None) -> Iterator[str | None]:
    """For each record of a .jsonl or .parquet file in turn: "file:line: what is wrong and what to do", or None.

    What `read_captions` raises for the first ten, here for all, missing pictures among the rest.
    """
    path = Path(path).absolute()
    root = path.parent if root is None else Path(root).absolute()
    for number, record, problem in _lines(path):
        if not problem and "image_path" in record and not os.path.isfile(os.path.join(root, record["image_path"])):
            problem = _not_found(record["image_path"], root)
        yield problem and f"{path.name}:{number}: {problem}"


def _not_found(picture: str, root: Path) -> str:
    return (f"image_path {picture!r} not found under {root}: fetch the picture, leave the line out, or name another "
            "folder with root=")


def write_captions(rows: Iterable[dict], path: str | os.PathLike) -> None:
    """Writes captions records to a .jsonl or .parquet file that `read_captions` reads.

    An absolute `image_path` under the folder of the file becomes relative to it; an `image`, for Parquet alone, is a
    picture of Pillow's or the bytes of a file. Raises ValueError for a bad record; the file is then left as it was.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    records = (_checked(row, f"record {number}", path.parent.absolute()) for number, row in enumerate(rows))
    if path.suffix == ".parquet":
        chunk = list(islice(records, 1000))
        kind = "image" if chunk and "image" in chunk[0] else "image_path"
        schema = Features({kind: PICTURES[kind], **TEXTS}).arrow_schema
        with pq.ParquetWriter(part, schema) as writer:
            while chunk:
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
                chunk = list(islice(records, 1000))
    else:
        with open(part, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(part, path)


def _checked(row: dict, name: str, folder: Path) -> dict:
    problem = _problem(row, "image_path" if "image_path" in row else "image")
    if problem:
        raise ValueError(f"{name}: {problem}")
    if "image_path" not in row:
        return {**row, "image": PICTURES["image"].encode_example(row["image"])}
    picture = Path(row["image_path"])
    return {**row, "image_path": str(picture.relative_to(folder) if picture.is_relative_to(folder) else picture)}


def _problem(record, kind: str) -> str | None:
    """What is wrong with a record and what to do, or None."""
    if not isinstance(record, dict):
        return f"{str(record)[:40]!r} is no record: write {{\"image_path\": …, \"captions\": […]}}"
    picture = record.get(kind)
    if not picture or kind == "image_path" and not isinstance(picture, str):
        return f"{kind} is {picture!r}: " + ("name the picture's file" if kind == "image_path" else "give the picture")
    captions = record.get("captions")
    if not isinstance(captions, list) or not captions:
        return f"captions is {captions!r}: give a list with at least one caption"
    for caption in captions:
        if not isinstance(caption, str) or not caption.strip():
            return f"captions holds {caption!r}: an empty caption matches nothing; drop it or write one"
        if HALF.search(caption):
            return f"captions holds {caption!r}: half a character, which UTF-8 cannot hold; take the escape out"
    for key in ("source", "split"):
        if not isinstance(record.get(key), str | None):
            return f"{key} is {record[key]!r}: write a string, or leave it out"
    return None


def _columns(path: Path) -> dict:
    """The features of what a file holds; only Parquet can hold pictures."""
    names = pq.read_schema(path).names if path.suffix == ".parquet" else []
    kind = "image" if "image" in names and "image_path" not in names else "image_path"
    return {kind: PICTURES[kind], **TEXTS}


def _lines(path: Path) -> Iterator[tuple[int, dict | None, str | None]]:
    """Number from 1, record and what is wrong with it, of each line that is not blank, or of each row."""
    kind = next(iter(_columns(path)))
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
            yield from ((number, row, _problem(row, kind)) for number, row in enumerate(rows, 1))
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line := line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
                yield number, *_parsed(line, kind)


def _parsed(line: bytes, kind: str) -> tuple[object, str | None]:
    try:
        record = json.loads(line.decode())
        return record, _problem(record, kind)
    except UnicodeDecodeError as error:
        return None, f"byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8"
    except json.JSONDecodeError as error:
        return None, f"no JSON ({error.msg} at character {error.pos + 1}): write one record a line"


def _records(path: Path, root: Path) -> Iterator[dict]:
    """The rows of the Arrow file; raises ValueError after the last line where some are bad."""
    problems, bad, kind, number = [], 0, next(iter(_columns(path))), 0
    for number, record, problem in _lines(path):
        if problem:
            bad += 1
            if bad <= MOST_LISTED:
                problems.append(f"{path.name}:{number}: {problem}")
        elif not bad:
            picture = os.path.join(root, record[kind]) if kind == "image_path" else record[kind]
            yield {kind: picture, **{key: record.get(key) for key in TEXTS}}
    if bad:
        _refuse(path, problems, bad)
    if not number:
        raise ValueError(f"{path}: the file holds no records")


def _refuse(path: Path, problems: list[str], count: int) -> None:
    rest = [f"… and {count - len(problems)} more"] * (count > len(problems))
    raise ValueError("\n".join([f"{path}: {count} bad lines", *problems, *rest]))


def sample_caption(
    name: str, keywords: list[str], rng: np.random.Generator, group: str | None = None, templates=TEMPLATES
) -> str:
    """Draws one caption for a picture: what training sees.

    By CAPTION_SHARES it is the name ("kucing"), two to four keywords in any order ("peliharaan, hewan"), the name with
    one to three keywords ("kucing, hewan"), or the name in one of `templates` ("gambar kucing", "foto seekor kucing":
    `group`, the English slug, helps to choose the classifier). A picture with fewer than two keywords takes the name
    where its turn is keywords alone (one word, such as "bendera", would fit too many others), one with none takes it in
    place of both. Raises ValueError where the name is empty.
    """
    name = " ".join(name.split())
    if not name:
        raise ValueError("empty caption: the picture's name is empty; leave the picture out or name it.")
    form = str(rng.choice(list(CAPTION_SHARES), p=list(CAPTION_SHARES.values())))
    if form == "template":
        return fill(templates[rng.integers(len(templates))], name, group)
    if form == "keywords" and len(keywords) >= 2:
        return ", ".join(draw(keywords, int(rng.integers(2, 5)), rng))
    if form == "both" and keywords:
        return ", ".join([name, *draw(keywords, int(rng.integers(1, 4)), rng)])
    return name


def draw(keywords: list[str], count: int, rng: np.random.Generator) -> list[str]:
    """At most `count` different keywords in a random order."""
    return [keywords[i] for i in rng.permutation(len(keywords))[:count]]


def caption_ids(texts: Iterable[str]) -> Int32[np.ndarray, "B 2"]:
    """For each text 64 bits that are equal for equal texts, whatever their case, spaces and Unicode form (NFKC)."""
    folded = (" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)
    digests = (hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest() for text in folded)
    return np.frombuffer(b"".join(digests), "<i4").reshape(-1, 2).astype(np.int32)


def flip_allowed(name: str, keywords: list[str], has_text: bool) -> bool:
    """Whether a picture may be mirrored in training: not where its caption says kiri or kanan (or another word of
    SIDES), and not where it holds letters, digits or anything else that reads wrong in a mirror (`has_text`)."""
    return not has_text and not any(SIDES.search(text) for text in (name, *keywords))
