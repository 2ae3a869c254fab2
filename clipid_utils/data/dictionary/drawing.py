"""The pictures of rows, drawn by several processes and kept in parts.

resvg holds Python's lock while it draws, so threads alone gain little. The processes run `rasterise` as a script:
Python's own pools would import a script without a main guard again, or copy a process with JAX's threads.
"""

import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet
from tqdm.auto import tqdm

from clipid_utils.data.dictionary import rasterise
from clipid_utils.files import usable_threads, whole_file

PART = 400  # drawings kept at a time: an interrupted run draws at most these again
MOST_SECONDS = 600  # for one process and its share of a part


def draw_rows(rows: list[dict], render: str, folder: Path, name: str) -> Iterator[dict]:
    """The rows with their `png`: their `drawing`, a path or the text of an SVG, drawn by a function of `rasterise`.

    `png` is None for an empty drawing or one that cannot be drawn. The pictures are kept in `folder` in parts, so an
    interrupted run continues. Raises RuntimeError if a process ends before it has drawn its share.
    """
    for start in tqdm(range(0, len(rows), PART), desc=f"drawing {name}"):
        part = rows[start : start + PART]
        # Named by its drawings: the same parts of other rows have other names
        number = hashlib.sha256("\n".join([render, *(row["source"] for row in part)]).encode()).hexdigest()[:12]
        path = folder / f"{number}.parquet"
        if not path.exists():
            table = pyarrow.table({"png": pyarrow.array(draw(render, [row["drawing"] for row in part]), "binary")})
            with whole_file(path) as file:
                pyarrow.parquet.write_table(table, file)
        pngs = pyarrow.parquet.read_table(path)["png"].to_pylist()
        yield from (row | {"png": png} for row, png in zip(part, pngs, strict=True))


def draw(render: str, drawings: list[str | Path]) -> list[bytes | None]:
    """The PNG of each drawing, or None, by one process for each core. Raises RuntimeError if a process fails."""
    count = usable_threads()
    shares = [[(render, drawing) for drawing in drawings[first::count]] for first in range(count)]
    with ThreadPoolExecutor(count) as threads:
        drawn = list(threads.map(_draw_share, shares))
    return [drawn[number % count][number // count] for number in range(len(drawings))]


def _draw_share(tasks: list[tuple[str, str | Path]]) -> list[bytes | None]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # -P: the neighbours of the script are not modules of their own
    done = subprocess.run([sys.executable, "-P", rasterise.__file__], input=pickle.dumps(tasks), capture_output=True,
                          env=environment, timeout=MOST_SECONDS)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"a process that draws pictures failed: {reason[-1]}")
    return pickle.loads(done.stdout)
