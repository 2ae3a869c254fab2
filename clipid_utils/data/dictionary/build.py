"""The picture dictionary: emoji and stamps of five artists, named in Indonesian and English, split without leaks."""

import hashlib
import io
import json
import os
import shutil
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
from PIL import Image as PillowImage
from tqdm.auto import tqdm

from clipid_utils.data.cleaning.near_copies import signatures
from clipid_utils.data.dictionary.artists import find_drawings, read_concepts
from clipid_utils.data.dictionary.drawing import Drawers
from clipid_utils.data.dictionary.fetch import fetch_packages, read_sources
from clipid_utils.data.dictionary.rasterise import pixels
from clipid_utils.data.dictionary.splits import SPLITS, assign_splits
from clipid_utils.data.dictionary.tuxpaint import read_kinds, read_stamps
from clipid_utils.paths import CACHE, DATA

RECIPE = 4  # raise it when the code makes other pictures or other rows, so that prepared ones are made anew
FEATURES = Features({
    "image": Image(), "artist": Value("string"), "concept": Value("string"), "source": Value("string"),
    "name_id": Value("string"), "keywords_id": List(Value("string")),
    "name_en": Value("string"), "keywords_en": List(Value("string")),
    "group": Value("string"), "group_id": Value("string"), "kind": Value("string"),
    "licence": Value("string"), "credit": Value("string"), "has_text": Value("bool"),
})  # fmt: skip
MISSED = {
    "ruby-gemojione": "no EmojiOne drawings (1,341 fewer to train and test on)",
    "tuxpaint-stamps-default": "no Tux Paint stamps (931 fewer, and `photographs` is empty)",
}


def load_picture_dictionary(cache: Path | None = None) -> DatasetDict:
    """Loads the picture dictionary, prepared first where that has not been done: fetched, verified, drawn, split.

    Splits: train, validation, unseen_artist, unseen_concept, photographs. Columns: FEATURES; `image` is RGB, 128 x 128,
    on white. Different concepts of one name are to be grouped by `name_id.lower()`. The first call needs a network and
    a minute or two, later ones neither; an interrupted one goes on where it stopped. Without Debian's packages two
    artists are missing, said in one line each time. Raises FetchError.
    """
    cache = Path(cache or CACHE)
    prepared = cache / f"picture_dictionary-{recipe_number('sources.json', 'groups.json', 'stamp_kinds.json')}"
    if not prepared.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "preparing.lock"):  # a second process waits and finds it done
            if not prepared.is_dir():
                prepare(prepared, cache)
    missing = json.loads((prepared / "missing.json").read_text(encoding="utf-8"))
    if missing:
        print(
            f"The picture dictionary is smaller here: without the Debian packages {' and '.join(missing)} there are "
            f"{' and '.join(MISSED[name] for name in missing)}. To have them, run it where apt-get has these packages "
            f"(Debian, Ubuntu, Colab, Binder, WSL), once {prepared} is deleted."
        )
    stored = load_from_disk(str(prepared))
    return DatasetDict({name: stored[name] if name in stored else to_dataset([]) for name in SPLITS})


def recipe_number(*names: str) -> str:
    """A short number of all that decides what is prepared: RECIPE and the named files of the data folder."""
    digest = hashlib.sha256(str(RECIPE).encode())
    for name in names:
        digest.update((DATA / name).read_bytes())
    return digest.hexdigest()[:12]


def prepare(folder: Path, cache: Path) -> None:
    """Makes the prepared dictionary in `folder`, which appears only when it is whole."""
    sources = read_sources(DATA / "sources.json")
    groups = json.loads((DATA / "groups.json").read_text(encoding="utf-8"))
    packages = fetch_packages(sources, cache, lambda jobs: tqdm(jobs, desc="fetching packages"))
    rows = list_rows(packages, groups, sources["artists"])
    for artist in sources["artists"]:
        add_pictures(artist, [row for row in rows if row["artist"] == artist], cache)
    rows = [row for row in rows if not is_blank(row["png"])]
    pictures = [PillowImage.open(io.BytesIO(row["png"])) for row in rows]
    seen = signatures(pictures, progress=lambda images: tqdm(images, desc="comparing pictures"))
    mirrored = signatures(pictures, mirrored=True, progress=lambda images: tqdm(images, desc="and their mirror images"))
    split = assign_splits(rows, seen, mirrored)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    disable_progress_bars()  # of datasets: five more bars for a second's work
    parts = {name: [rows[i] for i in np.flatnonzero(split == name)] for name in SPLITS}
    # datasets cannot load an empty split again; load_picture_dictionary puts it back.
    DatasetDict({name: to_dataset(part) for name, part in parts.items() if part}).save_to_disk(partial)
    enable_progress_bars()
    missing = [name for name, unpacked in packages.items() if unpacked is None]
    (partial / "missing.json").write_text(json.dumps(missing), encoding="utf-8")
    os.replace(partial, folder)


def list_rows(packages: dict[str, Path | None], groups: dict, artists: dict) -> list[dict]:
    """One row for each picture, without the picture itself: FEATURES but `image`, plus `drawing` (path or SVG text)."""
    concepts, rows = read_concepts(packages, groups), []
    for artist, drawings in find_drawings(packages).items():
        rows += [
            {**concepts[concept], "artist": artist, "concept": concept, "drawing": drawing}
            for concept, drawing in drawings.items()
            if concept in concepts
        ]
    if packages["tuxpaint-stamps-default"]:
        stamps = read_stamps(packages["tuxpaint-stamps-default"], groups, read_kinds(DATA / "stamp_kinds.json"))
        rows += [{**stamp, "artist": "tuxpaint", "drawing": stamp.pop("path")} for stamp in stamps.values()]
    for row in rows:
        row |= {"group_id": groups["names"][row["group"]], **artists[row["artist"]]}
    return rows


def add_pictures(artist: str, rows: list[dict], cache: Path) -> None:
    """Gives each row of one artist its `png`; kept in the cache, so that an interrupted run draws none twice."""
    if not rows:
        return
    wanted = hashlib.sha256("\n".join(row["source"] for row in rows).encode()).hexdigest()[:8]
    path = cache / "pictures" / f"{artist}-{recipe_number('sources.json')}-{wanted}.parquet"
    if not path.exists():
        render = {"emojione": "render_png", "tuxpaint": "render_stamp"}.get(artist, "render_svg")
        with Drawers() as drawers:
            drawn = drawers.map(render, [row["drawing"] for row in rows])
            pngs = list(tqdm(drawn, desc=f"drawing {artist}", total=len(rows)))
        for png in pngs:
            if isinstance(png, ValueError):
                raise png
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({"source": [row["source"] for row in rows], "png": pngs})
        pyarrow.parquet.write_table(table, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
    table = pyarrow.parquet.read_table(path).to_pydict()
    drawn = dict(zip(table["source"], table["png"], strict=True))
    for row in rows:
        row["png"] = drawn[row["source"]]


def is_blank(png: bytes) -> bool:
    """Whether nothing is to be seen of a picture on white (a white stamp)."""
    return bool(pixels(png).min() > 240)


def to_dataset(rows: list[dict]) -> Dataset:
    """The rows of one split as a Dataset."""
    columns = {name: [row[name] for row in rows] for name in FEATURES if name != "image"}
    columns["image"] = [{"bytes": row["png"], "path": None} for row in rows]
    return Dataset.from_dict({name: columns[name] for name in FEATURES}, features=FEATURES)
