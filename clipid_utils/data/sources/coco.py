"""COCO captions and VizWiz-Captions, which share a format: annotations as published, and their translations.

    report = Report()
    records = read_coco("annotations/captions_train2017.json", "train2017", report)
    write_captions(records, "coco_train.jsonl")
    print(report)

COCO 2017's training pictures include most of 2014's validation pictures, which others use for evaluation (Karpathy's
test split, xFlickrCO). `joining.join` leaves out pictures that are held out.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from clipid_utils.data.report import Report, example
from clipid_utils.data.sources import tables
from clipid_utils.data.sources.disk_table import OnDisk
from clipid_utils.data.sources.tables import PathLike, Paths, json_items, picked_captions

# Flags of VizWiz: the worker was a spammer; "Quality issues are too severe to recognize visual content."
UNWANTED = ("is_rejected", "is_precanned")


def read_coco(path: PathLike, pictures: Paths, report: Report) -> Iterator[dict]:
    """Captions records, one for each picture, of COCO's captions_*.json or of a translated TSV.

    The TSV has the columns `caption` and `image_name`; its rows may be in any order. `pictures` is the folder of the
    pictures, or several. A number without a file name means `%012d.jpg`. Captions keep their case and full stops.
    Raises ValueError for a different file.
    """
    path = Path(path)
    remedy = "take the captions_*.json of the annotations' archive (instances_*.json and test sets have no captions)"
    captions = annotations(path, report, (), remedy) if path.suffix == ".json" else named_captions(path, report)
    return tables.local_records(captions, pictures, report, "coco")


def read_vizwiz(path: PathLike, pictures: Paths, report: Report) -> Iterator[dict]:
    """Captions records, one for each picture, of VizWiz-Captions' train.json or val.json, or of the translated JSON.

    The first have COCO's format; captions that their flags reject are dropped. The translation is a list of
    `{"image_path": name, "captions": [str, …]}`. Raises ValueError for a different file.
    """
    path, remedy = Path(path), "take VizWiz-Captions' train.json or val.json, or its translation"
    if first_character(path) == "[":
        entries = ((f"entry {number}", row) for number, row in enumerate(json_items(path, "item", remedy), 1))
        captions = picked_captions(path, entries, lambda row: (row["image_path"], row["captions"]), report, remedy)
    else:
        captions = annotations(path, report, UNWANTED, remedy)
    return tables.local_records(captions, pictures, report, "vizwiz")


def first_character(path: Path) -> str:
    """The first character of a file, after spaces; "" if its first thousand characters are spaces."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        return file.read(1000).lstrip()[:1]


def named_captions(path: Path, report: Report) -> Iterator[tuple[str, str, str]]:
    """(file name, place, caption) of each row of a TSV with the columns `caption` and `image_name`."""
    for _, line, name, caption in tables.caption_table(path, "image_name", report):
        yield name, example(path, line), caption


def annotations(path: Path, report: Report, unwanted: Sequence[str], remedy: str) -> Iterator[tuple[str, str, str]]:
    """(file name, place, caption) of each annotation of a JSON file in COCO's format.

    An annotation with a true flag of `unwanted` is dropped. Raises ValueError for a different format.
    """
    # A file may list no pictures: the ancestor's did not
    names = OnDisk((repr(image.get("id")), image["file_name"]) for image in json_items(path, "images.item", remedy)
                   if isinstance(image, dict) and isinstance(image.get("file_name"), str))

    def pick(row: dict) -> tuple[str, list] | str:
        number, caption = row["image_id"], row["caption"]
        name = names.get(repr(number)) or (f"{number:012d}.jpg" if isinstance(number, int) else None)
        reason = next((flag for flag in unwanted if row.get(flag)), None if name else "picture not listed")
        return reason or (name, [caption])

    rows = enumerate(json_items(path, "annotations.item", remedy), 1)
    return picked_captions(path, ((f"annotation {number}", row) for number, row in rows), pick, report, remedy)
