"""The Indonesian edition: catalogues of the notebooks' prose, and the Indonesian notebooks that are built from them.

    python site/indonesian.py update   # after a change of the English: new messages into site/locale
    python site/indonesian.py          # write notebooks/id/*.ipynb from the catalogues

A message is a paragraph, a heading, an item or a cell of a table, as Sphinx's gettext builder extracts it, in Markdown.
Code cells and outputs are those of the English notebook. A notebook, or the glossary, is in the edition if site/locale
has its catalogue.
"""

import json
import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path

from babel.messages.pofile import read_po
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parent.parent
LOCALE = ROOT / "site" / "locale"
CATALOGUES = LOCALE / "id" / "LC_MESSAGES" / "notebooks"
NOTEBOOKS = ROOT / "notebooks"
PARSER = MarkdownIt("commonmark").enable("table").use(dollarmath_plugin)
FIXED = {"<summary>Answers</summary>": "<summary>Jawaban</summary>"}  # HTML, which gettext leaves out


def lessons() -> list[Path]:
    """The English notebooks, and the glossary, that have a catalogue."""
    return [path for path in sorted(NOTEBOOKS.iterdir()) if (CATALOGUES / f"{path.stem}.po").is_file()]


def catalogue(lesson: Path) -> dict[str, str]:
    """The translation of each message of a notebook. Raises ValueError for one that is empty or fuzzy."""
    path = CATALOGUES / f"{lesson.stem}.po"
    with open(path, "rb") as file:
        messages = [message for message in read_po(file, locale="id") if message.id]
    if bad := [message.id for message in messages if message.fuzzy or not message.string]:
        raise ValueError(f"{path}: {len(bad)} messages have no translation or an outdated one (fuzzy). The first: "
                         f"{bad[0]!r}")
    return {message.id: message.string for message in messages}


def extract(lesson_files: list[Path], out: Path) -> None:
    """Sphinx's .pot files of notebooks, into the folder `out`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        (source / "notebooks").mkdir(parents=True)
        for path in lesson_files:
            shutil.copy(path, source / "notebooks")
        (source / "index.md").write_text("# Index\n\n```{toctree}\n:glob:\nnotebooks/*\n```\n", encoding="utf-8")
        settings = ["-Q", "-b", "gettext", "-c", str(ROOT / "site"), "-d", str(Path(folder, "trees"))]
        options = ["-D", "gettext_compact=0", "-D", "gettext_location=0"]
        if build_main([*settings, *options, str(source), str(out)]):
            raise SystemExit(1)
    (out / "index.pot").unlink()


def update(lesson_files: list[Path]) -> None:
    """Brings the catalogues up to date. New messages are empty, and changed ones are marked as fuzzy."""
    from sphinx_intl.basic import update as update_catalogues

    with tempfile.TemporaryDirectory() as folder:
        extract(lesson_files, Path(folder))
        update_catalogues(str(LOCALE), folder, ["id"], line_width=0)  # addresses stay whole for scripts/release.py


def translated(text: str, messages: dict[str, str]) -> str:
    """A Markdown cell with each message replaced. Raises KeyError for a message that the catalogue does not have."""
    lines = text.split("\n")
    for token in reversed(PARSER.parse(text)):  # from the end, so that line numbers stay right
        if token.type != "inline" or not token.content.strip():
            continue
        start, end = token.map
        first, last = token.content.split("\n")[0], token.content.split("\n")[-1]
        before = lines[start][: lines[start].index(first)]
        after = lines[end - 1][lines[end - 1].rindex(last) + len(last):]
        if end - start == 1:  # the cell of a table: the last place, because cells are replaced from the end
            before = lines[start][: lines[start].rindex(first)] if "|" in lines[start] else before
        lines[start:end] = [before + messages[" ".join(token.content.split("\n")).strip()] + after]
    text = "\n".join(lines)
    for english, indonesian in FIXED.items():
        text = text.replace(english, indonesian)
    return text


def moved(text: str, names: set[str]) -> str:
    """The text with its relative links as they are one folder deeper; notebooks of `names` are there, too."""
    def target(match: re.Match) -> str:
        address = match[1]
        is_near = address.split("#")[0] in names
        return f"]({address if is_near else posixpath.normpath(posixpath.join('..', address))})"

    text = re.sub(r"\]\((?![a-z]+:|#)([^)\s]+)\)", target, text)
    return re.sub(rf"(blob/[^/]+/|labpath=)notebooks/({'|'.join(map(re.escape, names))})", r"\1notebooks/id/\2", text)


def built(lesson: Path) -> str:
    """The Indonesian text of an English notebook (JSON) or of the glossary (Markdown)."""
    text, messages, names = lesson.read_text(encoding="utf-8"), catalogue(lesson), {path.name for path in lessons()}
    try:
        if lesson.suffix == ".md":
            return moved(translated(text, messages), names)
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = moved(translated("".join(cell["source"]), messages), names).splitlines(keepends=True)
    except KeyError as error:
        raise ValueError(f"{CATALOGUES / lesson.stem}.po has no message {error}: python site/indonesian.py update, "
                         "then translate it") from None
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["update"]:
        update([*lessons(), *(Path(name) for name in arguments[1:])])
        return
    for lesson in lessons():
        path = NOTEBOOKS / "id" / lesson.name
        path.parent.mkdir(exist_ok=True)
        path.write_text(built(lesson), encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
