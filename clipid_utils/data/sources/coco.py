"""COCO captions: the annotation JSON of 2014 or 2017 as published, and its translation as a table.

    report = Report()
    records = read_coco("annotations/captions_train2017.json", "train2017", report, split="train")
    write_captions(records, "coco_train.jsonl")
    print(report)

COCO 2017's training pictures include most of 2014's validation pictures, on which others evaluate (Karpathy's test
split, xFlickrCO): `joining.join` leaves those out that are named to it as held out.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from clipid_utils.data.report import Report
from clipid_utils.data.sources.disk_table import OnDisk
from clipid_utils.data.sources.tables import caption_table, clean_caption, example, json_items, load_json, local_records

REMEDY = "take the captions_*.json of the annotations' archive"


def read_coco(
    path: str | os.PathLike, pictures: str | os.PathLike | Sequence, report: Report, *, split: str | None = None,
    source: str = "coco",
) -> Iterator[dict]:
    """Captions records, one a picture with its five or so captions, of captions_*.json or of the translated TSV.

    The TSV has the columns `caption` and `image_name`, in any order of rows. `pictures` is the folder of the pictures,
    or several; a number without a file name is `%012d.jpg`. The captions' case and full stops stay. Raises
    ValueError for a file that is neither.
    """
    path = Path(path)
    captions = annotations(path, report) if path.suffix == ".json" else named_captions(path, report)
    return local_records(captions, pictures, report, source, split)


def named_captions(path: Path, report: Report) -> Iterator[tuple[str, str, str]]:
    """(file name, place, caption) of each row of a TSV of captions and pictures' names."""
    for _, line, name, caption in caption_table(path, "image_name", report):
        yield name, example(path, line), caption


def annotations(
    path: Path, report: Report, unwanted: Sequence[str] = (), remedy: str = REMEDY
) -> Iterator[tuple[str, str, str]]:
    """(file name, place, caption) of each annotation of a JSON file in COCO's format.

    One of which a flag in `unwanted` is true is dropped for it. Raises ValueError for another format.
    """
    # A file may list no pictures: the ancestor's did not
    listed = OnDisk((repr(image.get("id")), image["file_name"]) for image in json_items(path, "images.item", remedy)
                    if isinstance(image, dict) and isinstance(image.get("file_name"), str))
    number = None
    for number, row in enumerate(json_items(path, "annotations.item", remedy)):
        if not isinstance(row, dict) or "image_id" not in row or "caption" not in row:
            raise ValueError(f"{path}: annotation {number} is {str(row)[:80]}, without an image_id and a caption "
                             f"(instances_*.json and person_keypoints_*.json have none): {remedy}")
        name = listed.get(repr(row["image_id"])) or _bare_name(row["image_id"])
        caption, place = clean_caption(row["caption"]), f"annotation {number}"
        if flag := next((flag for flag in unwanted if row.get(flag)), None):
            report.drop(flag, example(path, place, row["caption"]))
        elif not caption:
            report.drop("empty caption", example(path, place, row))
        elif not name:
            report.drop("picture not listed", example(path, place, row))
        else:
            yield name, example(path, place), caption
    if number is None:
        value = load_json(path, remedy)
        if not isinstance(value, dict) or not isinstance(value.get("annotations"), list):
            raise ValueError(f"{path}:1: no key 'annotations' with a list (a test set has none): {remedy}")


def _bare_name(image_id) -> str | None:
    return f"{image_id:012d}.jpg" if isinstance(image_id, int) else None
