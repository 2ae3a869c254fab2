"""The work of `clipid search`: one query, or one query a line."""

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from clipid_utils import load_clip
from clipid_utils.inference.index import PictureIndex, build_index
from clipid_utils.inference.search import query_embeds, search
from clipid_utils.inference.sheet import check_sheet, write_sheet
from clipid_utils.paths import CACHE

PICTURE = "gambar"  # `gambar: a.jpg` is a query by a picture
HELP = f"one query a line: words (kucing tidur), or a picture ({PICTURE}: foto.jpg); Ctrl-D ends"


def search_folder(
    folder: Path, query: str = "", image: Path | None = None, *, model: str, k: int = 12, sheet: Path | None = None
) -> None:
    """Prints the scores and paths of the k pictures in a folder that fit words, a picture, or both, the best first.

    Without a query, each line of stdin is one. A line that cannot be answered gives one line on stderr. Every answer
    writes the file `sheet` again (see `write_sheet`). Raises the errors of `check_sheet`, `load_clip`, `build_index`
    and `query_embeds`, those about the query and the sheet before the folder is indexed.
    """
    if k < 1:
        raise ValueError(f"-k must be 1 or more, not {k}")
    if sheet is not None:
        check_sheet(sheet, folder)
    clip, text = load_clip(model), query.strip() or None
    asked = text is not None or image is not None
    vector = query_embeds(*clip, text, image) if asked else None
    index = build_index(*clip, folder, cache=CACHE / "search")
    if asked:
        return _answer(index, vector, k, sheet, text, image)
    print(HELP, file=sys.stderr)
    for text, image in _queries():
        try:
            _answer(index, query_embeds(*clip, text, image), k, sheet, text, image)
        except BrokenPipeError:  # nobody reads the answers
            raise
        except (ValueError, OSError) as error:
            print(f"clipid search: {error}", file=sys.stderr)
        else:
            print(flush=True)


def _answer(
    index: PictureIndex, vector: np.ndarray, k: int, sheet: Path | None, text: str | None, image: Path | None
) -> None:
    """Prints the results of one query, and writes its sheet."""
    (scores,), (rows,) = search(index, vector, k)
    for score, row in zip(scores, rows, strict=True):
        print(f"{score:.3f}  {index.source / index.keys[row]}")
    if sheet is not None:
        write_sheet(sheet, index, scores, rows, text, image)


def _queries() -> Iterator[tuple[str | None, Path | None]]:
    """The text or the picture of each line of stdin that is not blank, with a prompt in a terminal."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  input() then has a history
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 would end the loop
    while True:
        try:
            line = input("cari> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()  # the shell's prompt starts on a line of its own
            return
        word, colon, path = line.partition(":")
        if colon and word.rstrip().lower() == PICTURE:
            yield None, Path(path.strip()).expanduser()
        elif line:
            yield line, None
