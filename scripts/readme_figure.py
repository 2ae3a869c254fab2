"""Draws data/images/search.png and fills the results into README.md, both from the shipped checkpoint.

    python scripts/readme_figure.py             # the figure and the results
    python scripts/readme_figure.py --results   # the results alone, from metrics.json; it needs no pictures

The queries were fixed before anybody saw the results; the figure shows the first results of each, right or wrong.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

from PIL import Image

from clipid_utils.paths import CHECKPOINTS, DATA

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
QUERIES = ("kucing", "buah berwarna merah", "ngantuk", "kendaraan di laut")
UNSEEN = {
    "unseen_artist": "drawings by an artist never seen in training",
    "unseen_concept": "concepts never seen in training, by any artist",
    "photographs": "photographs; training had drawings only",
}


def draw_searches(checkpoint: Path, columns: int = 7) -> Image.Image:
    """A row for each query: the first pictures that it finds among all test pictures together."""
    from datasets import concatenate_datasets

    import clipid_utils
    from clipid_utils.data.dictionary.build import load_picture_dictionary
    from clipid_utils.inference.index import build_index
    from clipid_utils.inference.search import search_figure

    model, processor = clipid_utils.load_clip(checkpoint)
    dictionary = load_picture_dictionary()
    index = build_index(model, processor, concatenate_datasets([dictionary[split] for split in UNSEEN]))
    rows = []
    for query in QUERIES:
        buffer = io.BytesIO()
        search_figure(index, model, processor, query, k=columns, columns=columns).savefig(buffer, format="png")
        rows.append(Image.open(buffer).convert("RGB"))
    whole = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        whole.paste(row, (0, sum(above.height for above in rows[:number])))
    return whole


def results_table(report: dict) -> str:
    """The report of `evaluate_checkpoint` as Markdown: retrieval both ways on the test splits, baseline, zero-shot."""
    lines = [
        "| test pictures | names, pictures | text to picture, R@1 | R@10 | picture to text, R@1 | R@10 |",
        "|---|---|---|---|---|---|",
    ]
    for split, meaning in UNSEEN.items():
        found = report["retrieval"].get(split)
        if found is None:
            continue
        there, back = found["text_to_image"], found["image_to_text"]
        figures = [cell(way[measure]) for way in (there, back) for measure in ("R@1", "R@10")]
        size = f"{there['queries']:,}, {there['candidates']:,}"
        lines.append(" | ".join([f"| **`{split}`**: {meaning}", size, *figures]) + " |")
    if "pixel_nearest_neighbour" in report:
        pixels = report["pixel_nearest_neighbour"]
        lines.append("")
        lines.append(
            f"For comparison, without any model: the nearest neighbour in pixels, picture to picture, from "
            f"`unseen_artist` to the training pictures, has R@1 {cell(pixels['R@1'])} and R@10 {cell(pixels['R@10'])}."
        )
    named = report["zero_shot"]["unseen_artist"]
    within, group = (named[key]["templates"] for key in ("concept_within_group", "group"))
    lines.append("")
    lines.append(
        f"Zero-shot on `unseen_artist`, with Indonesian templates: the right one of {group['classes']} groups is found "
        f"for {cell(group['top1'])} of the pictures. If the group is known, the right concept is found for "
        f"{cell(within['top1'])}; a group has {within['classes']:.0f} concepts on average."
    )
    return "\n".join(lines)


def cell(figure: dict[str, float]) -> str:
    """A figure with its 95% interval."""
    return f"{figure['value']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def fill(readme: str, results: str) -> str:
    """The text with `results` between its two markers. Raises ValueError unless each is there once, in this order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before:
        raise ValueError(f"README.md must have {BEGIN} and after it {END}, each once: put them back")
    return f"{before}{BEGIN}\n{results}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINTS / "mini")
    parser.add_argument("--results", action="store_true", help="the results alone, no figure")
    options = parser.parse_args(arguments)
    metrics = options.checkpoint / "metrics.json"
    if not metrics.is_file():
        print(f"{metrics} not found: write it with `make evaluate`", file=sys.stderr)
        return 1
    table = results_table(json.loads(metrics.read_text(encoding="utf-8")))
    README.write_text(fill(README.read_text(encoding="utf-8"), table), encoding="utf-8")
    print(table)
    if not options.results:
        figure = DATA / "images" / "search.png"
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw_searches(options.checkpoint).quantize(256).save(figure, optimize=True)
        print(f"\n{figure.name}: {figure.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
