"""Checks of the committed notebooks that need no run; `make test` runs them too, through nbval."""

import json
import re
from pathlib import Path

import pytest

import clipid_utils
from clipid_utils import plots

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
# A home, a temporary folder, or a drive: what another machine has not.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|work|mnt)/|\b[A-Z]:\\\\")


def cells(path, kind="code"):
    """The notebook's cells of one kind, empty ones left out."""
    return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind and "".join(c["source"]).strip()]


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson_is_executed_once_from_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in cells(path)]
    assert counts == list(range(1, len(counts) + 1)), "make notebooks"


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda p: p.stem)
def test_notebook_shows_no_error_and_no_path_of_a_machine(path):
    outputs = [o for cell in cells(path) for o in cell["outputs"]]
    assert not [o["ename"] for o in outputs if o["output_type"] == "error"]
    found = MACHINE_PATH.search(path.read_text())
    assert not found, path.read_text()[max(0, found.start() - 60) : found.end() + 60]
    assert path.stat().st_size < 1_500_000


@pytest.mark.parametrize("path", LESSONS + SOLUTIONS, ids=lambda p: p.stem)
def test_notebook_draws_with_what_plots_has(path):
    used = {name for cell in cells(path) for name in re.findall(r"\bplots\.(\w+)", "".join(cell["source"]))}
    assert not {name for name in used if not hasattr(plots, name)}


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson_has_the_parts_of_a_lesson(path):
    code = cells(path)
    assert code[0]["source"] == cells(LESSONS[0])[0]["source"], "the set-up cell is the same in all notebooks"
    assert f'RELEASE = "v{clipid_utils.__version__}"' in "".join(code[0]["source"])
    assert any("Ringkasan" in "".join(cell["source"]) for cell in cells(path, "markdown"))
    assert len([c for c in code if "key-figure" in c["metadata"].get("tags", ())]) == 1


def test_the_readers_own_towers_are_the_same_where_they_are_built_and_where_they_are_trained():
    built, trained = ({cell["id"]: cell["source"] for cell in cells(path)} for path in LESSONS if path.name[:3] in (
        "03_", "04_"))
    modules = ["my-attention", "my-mlp", "my-block", "my-image-tower", "my-text-tower", "my-clip", "copy-weights"]
    assert [built[name] for name in modules] == [trained[name] for name in modules]


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_lesson_is_easy_to_follow(path):
    """A header with prerequisites and times, no code without words before it, short cells, and lines that fit."""
    header = "".join(cells(path, "markdown")[0]["source"])
    assert all(f"**{part}" in header for part in ("Goal.", "The figure you will have made.", "You need", "Time:"))
    assert re.search(r"minutes? to read.*minutes? to run", header, re.DOTALL)
    kinds = [cell["cell_type"] for cell in json.loads(path.read_text())["cells"]]
    assert ("code", "code") not in list(zip(kinds, kinds[1:], strict=False))
    lengths = {cell["id"]: len(cell["source"]) for cell in cells(path)[1:]}
    assert max(lengths.values()) <= 20, lengths
    printed = "".join("".join(output.get("text", "")) for cell in cells(path) for output in cell["outputs"])
    assert max(map(len, printed.splitlines())) <= 130, "printed lines of at most 130 characters"
    titles = [line for cell in cells(path, "markdown") for line in "".join(cell["source"]).splitlines()
              if line.startswith("## ")]
    assert titles[-3:] == ["## Exercises", "## Do you remember?", "## Ringkasan"]
    optional = [" · Optional: " in title for title in titles[:-3]]
    assert optional == sorted(optional), "optional sections come last"
