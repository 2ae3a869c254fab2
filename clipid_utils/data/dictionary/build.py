"""The picture dictionary: emoji and stamps of five artists, with Indonesian and English names, split without leaks."""

import hashlib
import io
import json
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_from_disk  # noqa: F401
from PIL import Image as PillowImage

from clipid_utils.data.cleaning.near_copies import signatures
from clipid_utils.data.dictionary import rasterise
from clipid_utils.data.dictionary.artists import find_drawings, read_concepts
from clipid_utils.data.dictionary.fetch import fetch_packages
from clipid_utils.data.dictionary.splits import SPLITS, assign_splits
from clipid_utils.data.dictionary.tuxpaint import read_stamps
from clipid_utils.data.prepared import prepare_once
from clipid_utils.files import read_json, write_json
from clipid_utils.paths import CACHE, DATA

RECIPE = 4  # raise it when the code makes different pictures or rows: prepared ones are then made again
FEATURES = Features({
    "image": Image(), "artist": Value("string"), "concept": Value("string"), "source": Value("string"),
    "name_id": Value("string"), "keywords_id": List(Value("string")),
    "name_en": Value("string"), "keywords_en": List(Value("string")),
    "group": Value("string"), "group_id": Value("string"), "kind": Value("string"),
    "licence": Value("string"), "credit": Value("string"), "has_text": Value("bool"),
})  # fmt: skip
RENDER = {"emojione": rasterise.render_png, "tuxpaint": rasterise.render_stamp}  # of all other artists: render_svg
MISSED = {
    "ruby-gemojione": "no EmojiOne drawings (1,341 fewer to train and test on)",
    "tuxpaint-stamps-default": "no Tux Paint stamps (931 fewer, and `photographs` is empty)",
}


def load_picture_dictionary(cache: Path | None = None) -> DatasetDict:
    """Loads the picture dictionary. The first call prepares it: fetches, verifies, draws and splits it.

    Splits: train, validation, unseen_artist, unseen_concept, photographs. Columns: FEATURES; `image` is RGB, 128 x 128,
    on white. Different concepts can have the same name: group them by `name_id.lower()`. The first call needs a network
    and a minute or two; if it is interrupted, the next one continues. Without Debian's packages two artists are
    missing; each call then prints one line about it. Raises FetchError.
    """
    cache = Path(cache or CACHE)
    number = recipe_number("groups.json", "stamp_kinds.json")
    prepared = prepare_once(cache / f"picture_dictionary-{number}", partial(prepare, cache=cache))
    missing = read_json(prepared / "missing.json")
    if missing:
        print(
            f"The picture dictionary is smaller here: without the Debian packages {' and '.join(missing)} there are "
            f"{' and '.join(MISSED[name] for name in missing)}. To get them, delete {prepared} and run it where "
            "apt-get has these packages (Debian, Ubuntu, Colab, Binder, WSL)."
        )
    stored, empty = load_from_disk(str(prepared)), rasterise.to_dataset([], FEATURES)
    return DatasetDict({name: stored.get(name, empty) for name in SPLITS})


def recipe_number(*names: str) -> str:
    """A short number that changes with RECIPE, the dictionary's sources and the named files of the data folder."""
    sources = read_json(DATA / "sources.json")
    own = [sources[part] for part in ("npm", "debian", "artists")]  # the others are of other collections
    digest = hashlib.sha256(f"{RECIPE} {json.dumps(own)}".encode())
    for name in names:
        digest.update((DATA / name).read_bytes())
    return digest.hexdigest()[:12]


def prepare(folder: Path, cache: Path) -> None:
    """Fills the folder with the prepared dictionary; the fetched packages and the drawings stay in `cache`."""
    sources, groups = read_json(DATA / "sources.json"), read_json(DATA / "groups.json")
    packages = fetch_packages(sources, cache)
    rows = []
    for artist, drawings in groupby(list_rows(packages, groups, sources["artists"]), lambda row: row["artist"]):
        kept = cache / "pictures" / f"{artist}-{recipe_number()}"
        for row in rasterise.draw_rows(list(drawings), RENDER.get(artist, rasterise.render_svg), kept, artist):
            if row["png"] is None:
                raise ValueError(f"{artist}: {row['source']}: an empty drawing, or not a drawing")
            if not rasterise.is_blank(row["png"]):
                rows.append(row)
    pictures = [PillowImage.open(io.BytesIO(row["png"])) for row in rows]
    seen = signatures(pictures, desc="comparing pictures")
    mirrored = signatures(pictures, mirrored=True, desc="and their mirror images")
    split = assign_splits(rows, seen, mirrored)
    parts = {name: [rows[i] for i in np.flatnonzero(split == name)] for name in SPLITS}
    # `datasets` cannot load an empty split; load_picture_dictionary adds it again.
    stored = {name: rasterise.to_dataset(part, FEATURES) for name, part in parts.items() if part}
    DatasetDict(stored).save_to_disk(folder)
    write_json(folder / "missing.json", [name for name, unpacked in packages.items() if unpacked is None])


def list_rows(packages: dict[str, Path | None], groups: dict, artists: dict) -> list[dict]:
    """One row for each picture: FEATURES without `image`, and `drawing`, a path or the text of an SVG."""
    concepts, rows = read_concepts(packages, groups), []
    for artist, drawings in find_drawings(packages).items():
        rows += [{**concepts[concept], "artist": artist, "concept": concept, "drawing": drawing}
                 for concept, drawing in sorted(drawings.items()) if concept in concepts]
    if packages["tuxpaint-stamps-default"]:
        stamps = read_stamps(packages["tuxpaint-stamps-default"], groups, read_json(DATA / "stamp_kinds.json"))
        rows += [{**stamp, "artist": "tuxpaint"} for stamp in stamps]
    for row in rows:
        row |= {"group_id": groups["names"][row["group"]], **artists[row["artist"]]}
    return rows
