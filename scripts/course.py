"""Runs the course: every notebook in order, each in a new kernel; writes executed notebooks, pages and one table.

    python scripts/course.py                     # notebooks/*.ipynb to build/course/
    python scripts/course.py notebooks/04*.ipynb # some of them
    python scripts/course.py --in-place          # the outputs into notebooks/, as they are committed; no pages

The pages are those of the site (site/build.py), with the outputs of this run, and the table is the first of them.
The key figure of a notebook is the last line of text that its code cell with the tag `key-figure` prints.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, CellExecutionError, CellTimeoutError, DeadKernelError
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# The course needs no hub. Without these settings a library asks for one and waits, in a room without a network.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass
class Result:
    """Time, memory and key figure of one notebook; `error` reports the cell that failed, and is empty if none did."""

    name: str
    title: str
    seconds: float
    peak_bytes: int
    key_figure: str
    error: str = ""

    def cells(self) -> tuple[str, str, str, str]:
        """The row of the table: notebook, minutes, peak memory, key figure."""
        figure = "FAILED" if self.error else self.key_figure
        return self.name, f"{self.seconds / 60:.1f}", f"{self.peak_bytes / 1e6:.0f} MB", figure


class MemoryWatch:
    """Samples the resident memory of all child processes together while it is entered; `peak` is in bytes."""

    def __init__(self, interval: float = 0.2):
        self.interval, self.peak = interval, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        own = me.cmdline()
        while not self._stop.is_set():
            total = 0
            for child in me.children(recursive=True):
                try:
                    # A child that has just been forked still has this program's memory, and its command line or none.
                    if child.cmdline() not in ([], own):
                        total += child.memory_info().rss
                except psutil.Error:  # the process has ended in the meantime
                    pass
            self.peak = max(self.peak, total)
            self._stop.wait(self.interval)


def output_text(cell) -> str:
    """The text that a code cell shows: its printed lines, then the plain form of its result."""
    printed = [o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"]
    results = [o.data.get("text/plain", "") for o in cell.outputs if o.output_type == "execute_result"]
    return "\n".join(printed + results)


def key_figure(notebook) -> str:
    """The last line of text from the last cell tagged `key-figure`; empty if there is none."""
    for cell in reversed(notebook.cells):
        if cell.cell_type == "code" and "key-figure" in cell.metadata.get("tags", ()):
            lines = output_text(cell).strip().splitlines()
            return lines[-1].strip() if lines else ""
    return ""


def title(notebook) -> str:
    """The notebook's first heading, without its marks."""
    for cell in notebook.cells:
        found = re.search(r"^#+\s+(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if found:
            return found[1].strip()
    return ""


def failure(name: str, notebook, index: int, error: Exception) -> str:
    """A report of an error: notebook, cell (counted from 1), the first lines of the cell, and the error."""
    cell = notebook.cells[index]
    lines = cell.source.splitlines()
    source = "\n".join("    " + line for line in lines[:6] + (["…"] if len(lines) > 6 else []))
    if isinstance(error, CellExecutionError):
        reason = f"{error.ename}: {error.evalue}"
    elif isinstance(error, DeadKernelError):
        reason = f"the kernel died, most often because the memory is full: lower the settings; see {name}.log"
    else:
        reason = str(error).strip().splitlines()[0]
    return f"{name}, cell {index + 1} of {len(notebook.cells)}:\n{source}\n{reason}"


def run_notebook(path: Path, out: Path, timeout: float, on_cell=lambda index, count: None) -> tuple[object, Result]:
    """Executes one notebook in a new kernel, up to the first error, and returns it with its `Result`.

    `timeout` is the limit for one cell in seconds. `on_cell(index, count)` is called before each cell. Messages of the
    kernel itself go to a log in the folder `out`.
    """
    notebook = nbformat.read(path, as_version=4)
    at = 0

    def start(cell, cell_index):
        nonlocal at
        at = cell_index
        on_cell(cell_index, len(notebook.cells))

    client = NotebookClient(
        notebook,
        kernel_name="python3",  # in an environment, Jupyter prefers the kernel of that environment
        timeout=timeout,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=start,
    )
    # A MPLBACKEND from the shell would keep figures out of the notebook.
    environment = {**OFFLINE, **{k: v for k, v in os.environ.items() if k != "MPLBACKEND"}}
    error, began = "", time.monotonic()
    with MemoryWatch() as memory, open(out / f"{path.name}.log", "w") as log:
        try:
            client.execute(env=environment, stdout=log, stderr=log)
        except (CellControlSignal, CellTimeoutError, DeadKernelError) as e:
            error = failure(path.name, notebook, at, e)
    seconds = time.monotonic() - began
    return notebook, Result(path.stem, title(notebook), seconds, memory.peak, key_figure(notebook), error)


def drop_widgets(notebook) -> None:
    """Removes widgets: without a kernel they show nothing, and a page with them asks the network for code."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", ())]


def shrink_pictures(notebook) -> None:
    """Reduces figures to 256 colours if that makes them smaller: a third of the size, with no visible difference."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", ()):
                with Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))) as picture:
                    small = io.BytesIO()
                    picture.convert("RGB").quantize(256).save(small, "PNG", optimize=True)
                encoded = base64.b64encode(small.getvalue()).decode()
                output.data["image/png"] = min(output.data["image/png"], encoded, key=len)


def clean_metadata(notebook) -> None:
    """Removes metadata that differs between machines or runs."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})


def table(results: list[Result]) -> str:
    """The results as aligned columns of text; the last line has the sum of the minutes and the highest peak."""
    total = Result("all", "", sum(r.seconds for r in results), max(r.peak_bytes for r in results), "")
    rows = [("notebook", "minutes", "peak memory", "key figure")] + [r.cells() for r in [*results, total]]
    name, minutes, memory = (max(len(row[i]) for row in rows) for i in range(3))
    lines = [f"{a:{name}}  {b:>{minutes}}  {c:>{memory}}  {d}".rstrip() for a, b, c, d in rows]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def front_page(results: list[Result]) -> str:
    """The first page, in Markdown: a table with one row for each notebook, linked to its page."""
    rows = ["| notebook | minutes | peak memory | key figure |", "|---|--:|--:|---|"]
    for r in results:
        name, minutes, memory, figure = r.cells()
        figure = re.sub(r"([\\`*_\[\]<>|$~])", r"\\\1", figure)  # the signs of Markdown, as they are
        rows.append(f"| [{r.title or name}](notebooks/{name}.ipynb) | {minutes} | {memory} | {figure} |")
    return "\n".join(["# The course, executed on this machine", "", *rows, ""])


def write_pages(results: list[Result], out: Path) -> bool:
    """Writes the pages of the site with the notebooks in the folder `out`; False if Sphinx could not, and says why."""
    front = out / "index.md"
    front.write_text(front_page(results), encoding="utf-8")
    command = [sys.executable, ROOT / "site" / "build.py", "--notebooks", out, "--front", front, "--out", out]
    return subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


def run_course(notebooks: list[Path], out: Path, timeout: float, in_place: bool = False) -> list[Result]:
    """Executes the notebooks in order into `out` and prints a line for each; a failure ends the course."""
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for number, path in enumerate(notebooks, 1):
        line = f"[{number}/{len(notebooks)}] {path.stem}"

        def on_cell(index, count, line=line):
            if sys.stdout.isatty():
                print(f"\r{line}: cell {index + 1} of {count}", end="", flush=True)

        notebook, result = run_notebook(path, out, timeout, on_cell)
        drop_widgets(notebook)
        shrink_pictures(notebook)
        nbformat.write(notebook, out / path.name)
        results.append(result)
        print(("\r" if sys.stdout.isatty() else "") + f"{line}: " + ", ".join(result.cells()[1:]), flush=True)
        if result.error:
            break
        if in_place:
            clean_metadata(notebook)
            nbformat.write(notebook, path)
    return results


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if a notebook failed, 2 if there is no notebook."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: notebooks/*.ipynb in order")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "course", help="default: build/course")
    parser.add_argument("--timeout", type=float, default=1800, help="limit for one cell in seconds; default: 1800")
    parser.add_argument("--in-place", action="store_true", help="write the outputs into the notebooks, and no pages")
    options = parser.parse_args(arguments)
    notebooks = options.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb"))
    if not notebooks:
        print(f"no notebook in {ROOT / 'notebooks'}: is the clone complete?", file=sys.stderr)
        return 2
    try:
        results = run_course(notebooks, options.out, options.timeout, options.in_place)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print("\n" + table(results), flush=True)
    has_pages = options.in_place or write_pages(results, options.out)
    if not has_pages:
        print(f"\nThe pages could not be written; the executed notebooks are in {options.out}", file=sys.stderr)
    elif not options.in_place:
        print(f"\nTo read: {options.out / 'index.html'}")
    if results[-1].error:
        print(f"\nStopped at {results[-1].error}", file=sys.stderr)
    return int(bool(results[-1].error) or not has_pages)


if __name__ == "__main__":
    sys.exit(main())
