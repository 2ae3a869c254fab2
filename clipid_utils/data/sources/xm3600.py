"""Crossmodal-3600: 3,600 photographs with captions that people wrote in 36 languages, for evaluation."""

import os
from collections.abc import Iterator
from pathlib import Path

from clipid_utils.data.report import Report
from clipid_utils.data.sources.tables import example, json_lines, listed_captions, local_records


def read_xm3600(
    path: str | os.PathLike, pictures: str | os.PathLike, report: Report, *, language: str = "id",
    split: str | None = "test",
) -> Iterator[dict]:
    """Captions records, one a picture with its captions in `language`, of captions.jsonl (Thapliyal et al. 2022).

    A line is `{"image/key": key, "id": {"caption": [str, …], …}, "en": {…}, …}`; the picture is `key.jpg`. Not to be
    trained on. Raises ValueError where the first line is another, or lacks the language.
    """
    path = Path(path)
    return local_records(_captions(path, language, report), pictures, report, "xm3600", split)


def _captions(path: Path, language: str, report: Report) -> Iterator[tuple[str, str, str]]:
    seen = False
    for number, row in json_lines(path, report):
        key, texts = row.get("image/key"), row.get(language)
        if isinstance(key, str) and isinstance(texts, dict) and isinstance(texts.get("caption"), list):
            yield from listed_captions(f"{key}.jpg", texts["caption"], example(path, number), report)
        elif not seen:
            known = ", ".join(name for name, value in row.items() if isinstance(value, dict)) or "none"
            raise ValueError(f"{path}:{number}: no keys 'image/key' and {language!r} with captions: take XM3600's "
                             f"captions.jsonl, and one of its languages (here: {known})")
        else:
            report.drop(f"no captions in {language}", example(path, number, key or row))
        seen = True
