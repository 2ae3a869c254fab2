"""Draws data/images/search.png and fills the results into README.md, both from the shipped checkpoints.

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
QUERIES = ("kucing tidur", "burung di air", "alat musik gesek", "orang di pantai")
MODELS = ("photo", "mini")
UNSEEN = {
    "photographs": "cut-out photographs; the heads and `mini` were trained on drawings only",
    "unseen_artist": "drawings by an artist never seen in training",
    "unseen_concept": "concepts never seen in training, by any artist",
}


def draw_searches(columns: int = 6) -> Image.Image:
    """A row for each query: the first pictures that `photo` finds among the sample photographs."""
    import clipid_utils
    from clipid_utils.data.photographs import load_sample_photographs
    from clipid_utils.inference.index import build_index
    from clipid_utils.inference.search import search_figure

    model, processor = clipid_utils.load_clip(MODELS[0])
    index = build_index(model, processor, load_sample_photographs())
    rows = []
    for query in QUERIES:
        buffer = io.BytesIO()
        search_figure(index, model, processor, query, k=columns, columns=columns).savefig(buffer, format="png")
        rows.append(Image.open(buffer).convert("RGB"))
    whole = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for number, row in enumerate(rows):
        whole.paste(row, (0, sum(above.height for above in rows[:number])))
    return whole


def results_table(reports: dict[str, dict]) -> str:
    """The reports of `evaluate_checkpoint`, by model, as Markdown: retrieval both ways on the test splits."""
    lines = [
        "| test pictures | names, pictures | model | text to picture, R@1 | R@10 | picture to text, R@1 | R@10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for split, meaning in UNSEEN.items():
        for name, report in reports.items():
            found = report["retrieval"].get(split)
            if found is None:
                continue
            there, back = found["text_to_image"], found["image_to_text"]
            figures = [cell(way[measure]) for way in (there, back) for measure in ("R@1", "R@10")]
            size = f"{there['queries']:,}, {there['candidates']:,}"
            lines.append(" | ".join([f"| **`{split}`**: {meaning}", size, f"`{name}`", *figures]) + " |")
    pixels = reports["mini"]["pixel_nearest_neighbour"]
    named = reports["mini"]["zero_shot"]["unseen_artist"]
    within, group = (named[key]["templates"] for key in ("concept_within_group", "group"))
    return "\n".join([
        *lines, "",
        f"For comparison, without any model: the nearest neighbour in pixels, picture to picture, from `unseen_artist` "
        f"to the training pictures, has R@1 {cell(pixels['R@1'])} and R@10 {cell(pixels['R@10'])}.", "",
        f"Zero-shot on `unseen_artist` by `mini`, with Indonesian templates: the right one of {group['classes']} "
        f"groups is found for {cell(group['top1'])} of the pictures. If the group is known, the right concept is found "
        f"among those of the group for {cell(within['top1'])}; for a picture, its group has {within['classes']:.0f} "
        "concepts on average.",
    ])


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
    parser.add_argument("--results", action="store_true", help="the results alone, no figure")
    options = parser.parse_args(arguments)
    files = {name: CHECKPOINTS / name / "metrics.json" for name in MODELS}
    if missing := [file for file in files.values() if not file.is_file()]:
        print(f"{missing[0]} not found: write it with `make evaluate`", file=sys.stderr)
        return 1
    table = results_table({name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()})
    README.write_text(fill(README.read_text(encoding="utf-8"), table), encoding="utf-8")
    print(table)
    if not options.results:
        figure = DATA / "images" / "search.png"
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw_searches().quantize(256).save(figure, optimize=True)
        print(f"\n{figure.name}: {figure.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
