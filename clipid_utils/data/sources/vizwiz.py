"""VizWiz-Captions: photographs by people who are blind, as published and translated."""

import os
from collections.abc import Iterator
from pathlib import Path

from clipid_utils.data.report import Report
from clipid_utils.data.sources.coco import annotations
from clipid_utils.data.sources.tables import example, first_mark, json_items, listed_captions, local_records

# Flags of annotations: the worker was a spammer; "Quality issues are too severe to recognize visual content."
UNWANTED = ("is_rejected", "is_precanned")
REMEDY = "take VizWiz-Captions' train.json or val.json, or its translation"


def read_vizwiz(
    path: str | os.PathLike, pictures: str | os.PathLike, report: Report, *, split: str | None = None
) -> Iterator[dict]:
    """Captions records, one a picture, of annotations/train.json or val.json, or of the translated JSON.

    The first is in COCO's format; what its flags reject is dropped. The second is a list of `{"image_path": name,
    "captions": [str, …]}`, without such flags. Raises ValueError for a file that is neither.
    """
    path = Path(path)
    if first_mark(path) == "[":
        captions = _listed(path, report)
    else:
        captions = annotations(path, report, UNWANTED, REMEDY)
    return local_records(captions, pictures, report, "vizwiz", split)


def _listed(path: Path, report: Report) -> Iterator[tuple[str, str, str]]:
    for number, row in enumerate(json_items(path, "item", REMEDY)):
        if not isinstance(row, dict) or not isinstance(row.get("captions"), list) or not row.get("image_path"):
            raise ValueError(f"{path}: entry {number} is {str(row)[:80]}, not {{\"image_path\": …, \"captions\": […]}}")
        yield from listed_captions(row["image_path"], row["captions"], example(path, f"entry {number}"), report)
