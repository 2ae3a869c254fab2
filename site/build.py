"""Builds the site of the course from site/, the notebooks, README and the two cards of data/.

    python site/build.py        # the notebooks as they are committed, to build/site/index.html
    python site/build.py --notebooks build/course --front build/course/index.md --out build/course

The second form is that of `make course`: its notebooks have just been executed, its first page is the table of the run,
and it leaves the API reference and the demo out. Only the first form takes a warning for an error and checks every
link. Neither needs a network.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "site"
COPIED = ("README.md", "notebooks/glossary.md", "notebooks/tpu.md", "data/README.md", "data/checkpoints/README.md",
          "data/images/search.png")
LESSONS = "[0-9][0-9]*_*.ipynb"  # 02b_jax_and_nnx too
PARTS = {"inference": "Search and zero-shot"}  # titles of API pages that are not the name of the part
INDONESIAN = ROOT / "notebooks" / "id"
DEMO = ROOT / "build" / "page"


def imported_modules() -> list[str]:
    """The modules that the notebooks, README and the data card import: the API that a reader meets."""
    found = {"clipid_utils"}
    for path in (*ROOT.glob("notebooks/**/*.ipynb"), ROOT / "README.md", ROOT / "data" / "README.md"):
        for package, names in re.findall(r"\bfrom (clipid_utils[\w.]*) import ([\w, ]*)", path.read_text("utf-8")):
            found |= {package, *(f"{package}.{name}" for name in re.findall(r"\w+", names))}
    return sorted(module for module in found if documented(ROOT.joinpath(*module.split("."))))


def documented(path: Path) -> bool:
    """Whether a path is a module, or a package with names of its own."""
    package = path / "__init__.py"
    return path.with_suffix(".py").is_file() or package.is_file() and "import" in package.read_text(encoding="utf-8")


def api_pages() -> dict[str, str]:
    """The pages of the API reference by their path: one for the main names, one for each part of the library."""
    parts: dict[str, list[str]] = {}
    for module in imported_modules():
        names = module.split(".")[1:]
        parts.setdefault(names[0] if len(names) > 1 else "", []).append(module)
    main, *single = parts.pop("")
    pages = {f"api/{part}.md": api_page(PARTS.get(part, part.capitalize()), modules)
             for part, modules in parts.items()} | {"api/more.md": api_page("Figures, metrics, files", single)}
    contents = "\n".join(["```{toctree}", ":hidden:", "", *parts, "more", "```"])
    front = (SITE / "api.md").read_text(encoding="utf-8")
    return pages | {"api/index.md": front.replace("<!-- pages -->", contents)}


def api_page(title: str, modules: list[str]) -> str:
    """A page with a section for each module."""
    text = [f"# {title}\n"]
    for module in modules:
        short = module.removeprefix("clipid_utils.")
        imported = "   :imported-members:\n" if module == "clipid_utils.plots" else ""
        text.append(f"## {short}\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n{imported}```\n")
    return "\n".join(text)


def cards(lessons: list[Path]) -> str:
    """A card for each notebook: its title, and the words that README's table has for it."""
    readme, text = (ROOT / "README.md").read_text(encoding="utf-8"), ["::::{grid} 1 2 2 2\n:gutter: 3\n"]
    told = dict(re.findall(r"\]\((notebooks/\S+?\.ipynb)\) \| (.+?) \|", readme))
    for path in lessons:
        heading = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()[0]
        words = told.get(f"notebooks/{path.name}", "")
        text.append(f":::{{grid-item-card}} {heading.lstrip('# ')}\n:link: /notebooks/{path.stem}\n:link-type: doc\n")
        text.append(f"{words[:1].upper()}{words[1:]}\n:::\n")
    return "\n".join([*text, "::::\n"])


def with_setup_folded(path: Path) -> str:
    """A notebook whose first code cell, the same in all notebooks, is folded on its page."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = next((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), {"metadata": {}})
    first["metadata"].setdefault("tags", []).append("hide-input")
    return json.dumps(notebook, ensure_ascii=False)


def lay_out(source: Path, notebooks: Path, front: Path | None) -> None:
    """Writes the pages into the folder `source`, at the paths of the repository, so that links between them hold."""
    lessons = sorted(notebooks.glob(LESSONS))
    if not lessons:
        raise SystemExit(f"no notebook in {notebooks}: is the clone complete?")
    pages = {name: (ROOT / name).read_bytes() for name in COPIED}
    pages |= {f"notebooks/{path.name}": with_setup_folded(path).encode() for path in lessons}
    if front is None:
        pages |= {f"notebooks/id/{path.name}": with_setup_folded(path).encode() for path in INDONESIAN.glob(LESSONS)}
        pages |= {f"notebooks/id/{path.name}": path.read_bytes() for path in INDONESIAN.glob("*.md")}
    index = (SITE / "index.md").read_text(encoding="utf-8")
    address = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    index = index.replace("{{ repository }}", address).replace("{{ folder }}", address.rsplit("/", 1)[1])
    if front is None:
        index = index.replace("<!-- cards -->", cards(lessons))
        pages |= {name: text.encode() for name, text in api_pages().items()}
    else:
        contents = index[index.index("<!-- contents -->"):].replace("\napi/index\n", "\n")
        contents = re.sub(r"```{toctree}\n:caption: Bahasa Indonesia\n.*?```\n", "", contents, flags=re.DOTALL)
        index = front.read_text(encoding="utf-8") + "\n" + contents
    if front is None and (DEMO / "index.html").exists():
        pages["demo.md"] = (SITE / "demo.md").read_bytes()
    else:
        index = index.replace("\ndemo\n", "\n")
    pages["index.md"] = index.encode()
    for name, data in pages.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)


class Links(HTMLParser):
    """The targets of a page's links and the anchors that it has."""

    def __init__(self, text: str):
        super().__init__()
        self.targets, self.anchors = [], {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found[name] for name in ("id", "name") if found.get(name)}
        self.targets += [found[name] for name in ("href", "src") if found.get(name)]


def bad_links(out: Path) -> list[str]:
    """A line for each link that leads nowhere. Addresses of other servers are only checked in their form."""
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in sorted(out.rglob("*.html"))
             if path.relative_to(out).parts[0] not in ("_static", "demo")}
    bad = []
    for page, links in pages.items():
        for target in links.targets:
            address = urlsplit(target)
            if address.scheme in ("http", "https"):
                right = "." in address.netloc or address.hostname == "localhost"
            elif address.scheme:
                right = address.scheme in ("mailto", "data")
            else:
                path = (page.parent / unquote(address.path)).resolve() if address.path else page
                path = path / "index.html" if path.is_dir() else path
                right = path.is_file() and (path not in pages or unquote(address.fragment) in pages[path].anchors)
            if not right:
                bad.append(f"{page.relative_to(out)}: {target} leads nowhere")
    return bad


def build(out: Path, notebooks: Path, front: Path | None = None) -> int:
    """Builds the site into the folder `out`; the exit status is 0 if there is nothing to mend."""
    strict = ["--fail-on-warning", "--keep-going"] if front is None else []
    with tempfile.TemporaryDirectory() as folder:
        source, trees = Path(folder, "source"), Path(folder, "trees")
        lay_out(source, notebooks, front)
        settings = ["-q", *strict, "-j", "auto", "-b", "html", "-c", str(SITE), "-d", str(trees)]
        if build_main([*settings, str(source), str(out)]):
            return 1
    if front is not None:
        return 0
    if (DEMO / "index.html").exists():
        shutil.copytree(DEMO, out / "demo", dirs_exist_ok=True)
    else:
        print(f"The site has no page for the demo, since {DEMO / 'index.html'} is missing")
    bad = bad_links(out)
    print("\n".join(bad), end="\n" * bool(bad), file=sys.stderr)
    return int(bool(bad))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", help="default: build/site")
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", help="default: notebooks")
    parser.add_argument("--front", type=Path, help="Markdown of the first page, in place of that of site/index.md")
    options = parser.parse_args(arguments)
    status = build(options.out, options.notebooks, options.front)
    if not status:
        print(f"To read: {options.out / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
