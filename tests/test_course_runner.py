"""scripts/course.py on small notebooks that are made here."""

import ast
import base64
import html
import io
import re
import sys

import course
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image


def write(folder, name, *cells, heading="# A notebook", tagged=None):
    """A notebook of one heading and the given code cells; the one numbered `tagged` shows the key figure."""
    code = [new_code_cell(source) for source in cells]
    if tagged is not None:
        code[tagged].metadata["tags"] = ["key-figure"]
    path = folder / name
    nbformat.write(new_notebook(cells=[new_markdown_cell(heading), *code]), path)
    return path


def test_course_executes_in_order_in_fresh_kernels_of_this_python(tmp_path, capsys):
    first = write(
        tmp_path,
        "00_a.ipynb",
        "import os, sys\nx = 1\nprint(sys.executable)",
        "print('ignored')\nprint('R@1: 0.52')",
        "os.environ['HF_HUB_OFFLINE'], os.getcwd()",
        heading="# Start & search",
        tagged=1,
    )
    second = write(tmp_path, "01_b.ipynb", "'x' in globals()", tagged=0)
    out = tmp_path / "build"
    assert course.main(["--out", str(out), str(first), str(second)]) == 0

    a, b = (nbformat.read(out / path.name, as_version=4) for path in (first, second))
    assert a.cells[1].outputs[0].text.strip() == sys.executable
    assert ast.literal_eval(a.cells[3].outputs[0].data["text/plain"]) == ("1", str(tmp_path))  # IPython breaks lines
    assert b.cells[1].outputs[0].data["text/plain"] == "False"  # the first notebook's x is not here
    assert not nbformat.read(first, as_version=4).cells[1].outputs  # the source stays as it was

    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("[1/2] 00_a: ") and lines[0].endswith("R@1: 0.52")
    assert lines[1].startswith("[2/2] 01_b: ") and lines[1].endswith("False")
    assert re.search(r"^00_a +0\.\d +\d+ MB +R@1: 0\.52$", printed, re.MULTILINE)
    index = (out / "index.html").read_text()
    assert 'href="notebooks/00_a.html"' in index and "Start &amp; search" in index
    assert "R@1: 0.52" in html.unescape(re.sub(r"<.*?>", "", index))
    assert sys.executable in (out / "notebooks" / "00_a.html").read_text()


def test_failing_notebook_names_its_cell_and_ends_the_course(tmp_path, capsys, monkeypatch):
    fronts = []
    monkeypatch.setattr(course, "write_pages", lambda results, out: fronts.append(course.front_page(results)) or True)
    bad = write(tmp_path, "00_bad.ipynb", "x = 1", "# divide\ny = x / 0", "never = 1")
    after = write(tmp_path, "01_after.ipynb", "1")
    assert course.main(["--out", str(tmp_path / "build"), str(bad), str(after)]) == 1
    told = capsys.readouterr()
    assert "00_bad.ipynb, cell 3 of 4:" in told.err
    assert "    # divide\n    y = x / 0\nZeroDivisionError: division by zero" in told.err
    assert "FAILED" in told.out
    assert (tmp_path / "build" / "00_bad.ipynb").exists() and not (tmp_path / "build" / "01_after.ipynb").exists()
    assert len(fronts) == 1 and "](notebooks/00_bad.ipynb)" in fronts[0] and "| FAILED |" in fronts[0]
    assert "01_after" not in fronts[0]


@pytest.mark.parametrize(
    ("source", "reason"),
    [("import os\nos._exit(1)", "the kernel died"), ("import time\ntime.sleep(60)", "timed out")],
    ids=["dead kernel", "too long"],
)
def test_dead_kernel_and_endless_cell_are_reported_as_such(tmp_path, capsys, monkeypatch, source, reason):
    monkeypatch.setattr(course, "write_pages", lambda results, out: True)
    path = write(tmp_path, "00_bad.ipynb", "x = 1", source)
    assert course.main(["--out", str(tmp_path / "build"), "--timeout", "10", str(path)]) == 1
    told = capsys.readouterr().err
    assert "00_bad.ipynb, cell 3 of 3:" in told and source.splitlines()[0] in told and reason in told


def test_peak_memory_counts_the_kernel_and_its_children(tmp_path):
    plain = write(tmp_path, "plain.ipynb", "1")
    hungry = write(
        tmp_path,
        "hungry.ipynb",
        "import subprocess, sys\n"
        "hold = \"import time; x = b'1' * 400_000_000; time.sleep(5)\"\n"
        "subprocess.run([sys.executable, '-c', hold], check=True)",
    )
    _, before = course.run_notebook(plain, tmp_path, timeout=60)
    _, after = course.run_notebook(hungry, tmp_path, timeout=60)
    assert 400e6 < after.peak_bytes and before.peak_bytes + 300e6 < after.peak_bytes < 1200e6


def test_in_place_keeps_outputs_and_nothing_of_the_run(tmp_path):
    path = write(tmp_path, "00_a.ipynb", "1 + 1", "print('a')\nprint('b')")
    assert course.main(["--in-place", "--out", str(tmp_path / "build"), str(path)]) == 0
    kept = nbformat.read(path, as_version=4)
    assert [cell.get("execution_count") for cell in kept.cells] == [None, 1, 2]
    assert kept.cells[1].outputs[0].data["text/plain"] == "2" and kept.cells[2].outputs[0].text == "a\nb\n"
    assert dict(kept.metadata.language_info) == {"name": "python"}
    assert all(not cell.metadata for cell in kept.cells)
    assert str(tmp_path) not in path.read_text()


def test_figures_are_made_small_and_widgets_left_out(tmp_path):
    path = write(
        tmp_path,
        "00_a.ipynb",
        "import io\nimport numpy as np\nfrom IPython.display import Image\nfrom PIL import Image as P\n"
        "rng = np.random.default_rng(0)\nfile = io.BytesIO()\n"
        "P.fromarray(rng.integers(0, 256, (64, 64, 3), dtype='uint8')).save(file, 'PNG')\nImage(file.getvalue())",
        "import ipywidgets\nipywidgets.Text('kucing')",
    )
    assert course.main(["--in-place", "--out", str(tmp_path / "build"), str(path)]) == 0
    kept = nbformat.read(path, as_version=4)
    picture = base64.b64decode(kept.cells[1].outputs[0].data["image/png"])
    assert len(picture) < 64 * 64 * 2  # of 3 bytes a pixel, random colours
    assert Image.open(io.BytesIO(picture)).size == (64, 64)
    assert not kept.cells[2].outputs and "widgets" not in kept.metadata


def test_missing_sphinx_leaves_the_notebooks_and_is_an_error(tmp_path, capsys, monkeypatch):
    path, out = write(tmp_path, "00_a.ipynb", "1 + 1"), tmp_path / "build"
    monkeypatch.setattr(course, "ROOT", tmp_path)  # without site/build.py
    assert course.main(["--out", str(out), str(path)]) == 1
    assert f"The pages could not be written; the executed notebooks are in {out}" in capsys.readouterr().err
    assert nbformat.read(out / "00_a.ipynb", as_version=4).cells[1].outputs
