"""The captions record, read from and written to JSON lines or Parquet, and captions drawn from a name and keywords.

A record is `{"image_path" | "image", "captions": [str, …], "source", "split"}`, one on each line or row. The last two
may be missing. An `image_path` is relative to the file that lists it.
"""

import hashlib
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

from clipid_utils.data.shards import numbered_rows
from clipid_utils.files import file_identity, input_files, whole_file, write_json_lines
from clipid_utils.pictures import open_picture
from clipid_utils.wording import fill, load_wording

# How often a caption is the name alone, keywords alone, the name with keywords, or the name in a template.
CAPTION_SHARES = {"name": 0.4, "keywords": 0.1, "both": 0.2, "template": 0.3}
TEMPLATES = (*load_wording()["plain"], *load_wording()["templates"])  # without and with a classifier
# Words that a mirrored picture would make false. North and south (utara, selatan) stay true; "kidal" is left-handed.
SIDES = re.compile(
    r"\b((kiri|kanan|timur|barat|tenggara|barat daya|jarum jam|kidal)(nya|ku|mu)?"
    r"|left|right|(north|south)?(east|west)|((counter|anti)-?)?clockwise)\b", re.IGNORECASE)

TEXTS = {"captions": datasets.List(Value("string")), "source": Value("string"), "split": Value("string")}
PICTURES = {"image_path": Value("string"), "image": datasets.Image()}
FILES = (".jsonl", ".jsonl.gz", ".parquet")  # endings of the files of a folder that have records
HALF = re.compile("[\ud800-\udfff]")  # "\\ud83d" in JSON, half an emoji
MOST_LISTED = 10  # bad lines that an error quotes; all are counted
RULES = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # a change of the checks below makes the cache stale


def read_captions(path: str | os.PathLike, *, root: str | os.PathLike | None = None) -> Dataset:
    """The captions records of a file, of a folder's part files, or of a glob, in order, with absolute `image_path`.

    Files are JSON lines or Parquet. Relative paths start at `root`, or else at the folder of their file. Each file is
    read once, line by line, into an Arrow file in the cache of `datasets`, which serves until the file, the root or
    the rules of this module change. Other keys are left out. Raises ValueError that names up to ten of the bad lines
    (for Parquet: rows) with their number from 1. A missing picture is such a line. Pictures are not opened.
    """
    sources = _sources(path, root)
    kind, *others = {_kind(file) for file, _ in sources}
    if others:
        raise ValueError(f"{path}: some files have pictures and some have paths: read them one after the other")
    version = repr((RULES, kind, [(str(folder), file_identity(file)) for file, folder in sources]))
    try:
        records = Dataset.from_generator(
            _records, features=Features({kind: PICTURES[kind], **TEXTS}),
            gen_kwargs={"path": path, "root": root, "kind": kind},
            fingerprint=hashlib.sha256(version.encode()).hexdigest()[:16],
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    if kind == "image_path":
        paths = (name for chunk in records.select_columns(kind).iter(1000) for name in chunk[kind])
        if not all(map(os.path.isfile, paths)):
            _refuse(path, root)
    return records


def check_captions(
    path: str | os.PathLike, *, root: str | os.PathLike | None = None, pictures: bool = False
) -> Iterator[str | None]:
    """For each record that `read_captions` would read: "file:line: problem and remedy", or None if it is good.

    All problems are given, missing pictures too. With `pictures`, each picture is also decoded to its end. A file
    without records gives one problem.
    """
    for file, folder in _sources(path, root):
        number = 0
        for number, record, problem in _lines(file):
            problem = problem or _picture_problem(record.get("image_path") or record["image"], folder, pictures)
            yield problem and f"{file.name}:{number}: {problem}"
        if not number:
            yield f"{file.name}: the file has no records: write one on each line"


def _picture_problem(picture: str | dict, folder: Path, is_opened: bool) -> str | None:
    if isinstance(picture, str) and not os.path.isfile(os.path.join(folder, picture)):
        return (f"image_path {picture!r} not found under {folder}: fetch the picture, leave the line out, or name "
                "the pictures' folder as root (--root)")
    try:
        if is_opened:
            open_picture(picture, root=folder)
    except (OSError, ValueError) as error:
        return f"{error}: replace the picture, or leave the line out"


def write_captions(rows: Iterable[dict], path: str | os.PathLike) -> None:
    """Writes captions records to a .jsonl or .parquet file that `read_captions` reads, whole or not at all.

    An absolute `image_path` under the folder of the file becomes relative to it. An `image`, for Parquet alone, is a
    Pillow image or the bytes of a file. Raises ValueError for a bad record, and then leaves an older file as it was.
    """
    path = Path(path)
    records = (_checked(row, f"record {number}", path.parent.absolute()) for number, row in enumerate(rows, 1))
    if path.suffix != ".parquet":
        write_json_lines(path, records)
        return
    with whole_file(path) as file:
        chunk = list(islice(records, 1000))
        kind = "image" if chunk and "image" in chunk[0] else "image_path"
        schema = Features({kind: PICTURES[kind], **TEXTS}).arrow_schema
        with pq.ParquetWriter(file, schema) as writer:
            while chunk:
                writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
                chunk = list(islice(records, 1000))


def _checked(row: dict, name: str, folder: Path) -> dict:
    problem = _problem(row, "image_path" if "image_path" in row else "image")
    if problem:
        raise ValueError(f"{name}: {problem}")
    if "image_path" not in row:
        return {**row, "image": PICTURES["image"].encode_example(row["image"])}
    picture = Path(row["image_path"])
    return {**row, "image_path": str(picture.relative_to(folder) if picture.is_relative_to(folder) else picture)}


def _problem(record: dict, kind: str) -> str | None:
    """A problem of a record with its remedy, or None."""
    picture, captions = record.get(kind), record.get("captions")
    if not picture or kind == "image_path" and not isinstance(picture, str):
        return f"{kind} is {picture!r}: " + ("name the picture's file" if kind == "image_path" else "give the picture")
    if not isinstance(captions, list) or not captions:
        return f"captions is {captions!r}: give a list with at least one caption"
    for caption in captions:
        if not isinstance(caption, str):
            return f"captions has {caption!r}, which is not a string: write text, or leave it out"
        if not caption.strip():
            return f"captions has the empty caption {caption!r}: write text, or leave it out"
        if HALF.search(caption):
            return f"captions has {caption!r}, with half a character that UTF-8 cannot write: remove the escape"
    for key in ("source", "split"):
        if not isinstance(record.get(key), str | None):
            return f"{key} is {record[key]!r}: write a string, or leave it out"
    return None


def _sources(path: str | os.PathLike, root: str | os.PathLike | None) -> list[tuple[Path, Path]]:
    """The files that `path` names, each with the folder where its relative paths start."""
    files = [file.absolute() for file in input_files(path, FILES)]
    return [(file, file.parent if root is None else Path(root).expanduser().absolute()) for file in files]


def _kind(file: Path) -> str:
    """The key of a file's pictures: "image_path", or "image", in Parquet alone."""
    try:
        names = pq.read_schema(file).names if file.suffix == ".parquet" else []
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a whole Parquet file ({error}): write it again") from None
    return "image" if "image" in names and "image_path" not in names else "image_path"


def _lines(file: Path) -> Iterator[tuple[int, dict | None, str | None]]:
    """Number from 1, record and problem of each line that is not blank, or of each row."""
    kind = _kind(file)
    for number, record, problem in numbered_rows(file):
        yield number, record, problem or _problem(record, kind)


def _records(path: str | os.PathLike, root: str | os.PathLike | None, kind: str) -> Iterator[dict]:
    """The rows of the Arrow file. Raises ValueError for all bad lines, or if there are no records."""
    number = 0
    for file, folder in _sources(path, root):
        for number, record, problem in _lines(file):  # noqa: B007
            if problem:
                _refuse(path, root)
            picture = os.path.join(folder, record[kind]) if kind == "image_path" else record[kind]
            yield {kind: picture, **{key: record.get(key) for key in TEXTS}}
    if not number:
        _refuse(path, root)


def _refuse(path: str | os.PathLike, root: str | os.PathLike | None) -> None:
    problems = filter(None, check_captions(path, root=root))
    first = list(islice(problems, MOST_LISTED))
    more = sum(1 for _ in problems)
    rest = [f"… and {more} more"] * (more > 0)
    raise ValueError("\n".join([f"{path}: {len(first) + more} bad lines", *first, *rest]))


def sample_caption(
    name: str, keywords: list[str], rng: np.random.Generator, group: str | None = None, templates=TEMPLATES
) -> str:
    """Draws one caption for a picture.

    With the shares of CAPTION_SHARES it is the name ("kucing"), two to four keywords in any order ("peliharaan,
    hewan"), the name with one to three keywords ("kucing, hewan"), or the name in one of `templates` ("gambar kucing",
    "foto seekor kucing"; `group`, the English slug, helps to choose the classifier). With fewer than two keywords the
    name replaces keywords alone: one word, such as "bendera", would fit too many other pictures. Without keywords the
    name also replaces the name with keywords. Raises ValueError if the name is empty.
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


def flip_allowed(name: str, keywords: list[str], has_text: bool) -> bool:
    """Whether training may mirror a picture: no caption has a word of SIDES, such as kiri or kanan, and the picture
    shows no letters, digits or other signs that a mirror makes wrong (`has_text`)."""
    return not has_text and not any(SIDES.search(text) for text in (name, *keywords))


def caption_ids(texts: Iterable[str]) -> Int32[np.ndarray, "B 2"]:
    """For each text 64 bits that are equal for equal texts, whatever their case, spaces and Unicode form (NFKC)."""
    folded = (" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)
    digests = (hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest() for text in folded)
    return np.frombuffer(b"".join(digests), "<i4").reshape(-1, 2).astype(np.int32)
