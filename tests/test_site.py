"""The site of the course: its contents, its glossary, and one small build. `make site` builds and checks all of it."""

import fnmatch
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import clipid_utils

ROOT = Path(__file__).resolve().parent.parent
GLOSSARY = ROOT / "notebooks" / "glossary.md"
SITE = ROOT / "site"
LESSONS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
ENTRY = re.compile(r"^### (.+)\n\n\*(.+?)\*\. (.+)\n", re.MULTILINE)
LESSON = """# 00 · A lesson

[![Open in Colab](https://example.org/badge.svg)](https://example.org/00)
See the [licence](../LICENSE), the [solutions](solutions) and the [data card](../data/README.md#2-open-clip-art).

$$x^2$$

## Optional: more

This is folded.
"""


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_site", SITE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def laid_out(build, tmp_path_factory):
    """The folder of sources that Sphinx gets."""
    folder = tmp_path_factory.mktemp("source")
    build.lay_out(folder, ROOT / "notebooks", None)
    return folder


@pytest.fixture(scope="module")
def page(build, tmp_path_factory):
    """The built page of one small notebook."""
    folder = tmp_path_factory.mktemp("course")
    error = new_output("error", ename="KeyError", evalue="x", traceback=["\x1b[31mKeyError\x1b[0m: 'x'"])
    cells = [new_markdown_cell(LESSON), new_code_cell("!ls"), new_code_cell("{}['x']", outputs=[error])]
    python = {"language_info": {"name": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=python), folder / "00_lesson.ipynb")
    (folder / "index.md").write_text("# The first page\n", encoding="utf-8")
    assert build.build(folder / "out", folder, folder / "index.md") == 0
    assert "The first page" in (folder / "out" / "index.html").read_text(encoding="utf-8")
    return (folder / "out" / "notebooks" / "00_lesson.html").read_text(encoding="utf-8")


def glossary():
    return ENTRY.findall(GLOSSARY.read_text(encoding="utf-8"))


def anchors():
    """The anchors of the terms; JupyterLab, GitHub and the site give a heading the same one only in lower case."""
    return {term.replace(" ", "-") for term, _, _ in glossary()}


def test_settings_can_be_read_and_have_the_release():
    path = list(sys.path)
    try:
        settings = runpy.run_path(str(SITE / "conf.py"))
    finally:
        sys.path[:] = path
    assert settings["release"] == clipid_utils.__version__ and settings["nb_execution_mode"] == "off"
    assert not [name for name in settings["extensions"] if importlib.util.find_spec(name) is None]
    for name in settings["html_css_files"] + [Path(settings["html_logo"]).name]:
        assert (SITE / "_static" / name).is_file()


def test_every_notebook_is_in_the_contents_and_has_a_card(laid_out):
    index = (laid_out / "index.md").read_text(encoding="utf-8")
    pattern = re.search(r"^notebooks/\[.*$", index, re.MULTILINE)[0]
    pages = [path.relative_to(laid_out).with_suffix("").as_posix() for path in (laid_out / "notebooks").glob("*.ipynb")]
    assert sorted(fnmatch.filter(pages, pattern)) == [f"notebooks/{name}" for name in LESSONS]
    assert re.findall(r"^:link: /notebooks/(.+)$", index, re.MULTILINE) == LESSONS
    assert "{{" not in index and "<!-- cards" not in index


def test_every_page_is_in_the_contents(laid_out):
    contents = (laid_out / "index.md").read_text(encoding="utf-8") + (laid_out / "api" / "index.md").read_text("utf-8")
    pages = {path.relative_to(laid_out).with_suffix("").as_posix() for path in laid_out.rglob("*.md")}
    lines = {line.split("<")[-1].rstrip(">") for line in contents.splitlines()}
    assert pages - {"index"} == {page for page in pages if page in lines or page.removeprefix("api/") in lines}


def test_every_glossary_term_is_unique_and_has_both_languages_and_a_sentence():
    headings = re.findall(r"^#{2,} .+$", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    terms = [term for term, _, _ in glossary()]
    assert terms == [heading[4:] for heading in headings if heading.startswith("### ")]
    assert len(terms) >= 60 and len(set(terms)) == len(terms)
    assert [term for term in terms if not re.fullmatch(r"[a-z0-9]+(?:[ -][a-z0-9]+)*", term)] == []
    assert ("caption", "takarir") in [(term, indonesian) for term, indonesian, _ in glossary()]
    assert [term for term, _, sentence in glossary() if not sentence.endswith(".")] == []


def test_glossary_is_in_alphabetical_order():
    headings = re.findall(r"^##+ (.+)$", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    letters = {term[0].upper() for term, _, _ in glossary()}
    terms = [term for term, _, _ in glossary()]
    order = sorted([*terms, *letters], key=lambda name: name.lower().replace("-", " "))
    assert headings == order


def test_every_link_to_a_term_has_its_term():
    links = re.findall(r"\]\(#(.+?)\)", GLOSSARY.read_text(encoding="utf-8"))
    pages = [*SITE.glob("*.md"), *ROOT.glob("notebooks/**/*.ipynb"), ROOT / "notebooks" / "tpu.md"]
    for path in pages:
        links += re.findall(r"\bglossary\.(?:md|html)#([^)\s\"\\]+)", path.read_text(encoding="utf-8"))
    assert "cosine-similarity" in links and set(links) - anchors() == set()


def test_api_has_each_module_that_the_notebooks_import_once(build):
    pages = build.api_pages()
    modules = [name for text in pages.values() for name in re.findall(r"automodule:: (\S+)", text)]
    assert len(modules) == len(set(modules)) and set(modules) == set(build.imported_modules())
    assert {"clipid_utils", "clipid_utils.inference.search", "clipid_utils.plots"} <= set(modules)
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("made", [True, False])
def test_demo_has_a_page_only_if_it_was_made(build, tmp_path, monkeypatch, made):
    monkeypatch.setattr(build, "DEMO", tmp_path / "demo")
    (tmp_path / "demo").mkdir()
    if made:
        (tmp_path / "demo" / "index.html").touch()
    build.lay_out(tmp_path / "source", ROOT / "notebooks", None)
    assert ("\ndemo\n" in (tmp_path / "source" / "index.md").read_text(encoding="utf-8")) is made
    assert (tmp_path / "source" / "demo.md").exists() is made


def test_links_to_files_of_the_repository_lead_there(page):
    address = f"https://github.com/galuhsahid/clip-indonesian/{{}}/v{clipid_utils.__version__}/"
    assert f'href="{address.format("blob")}LICENSE"' in page
    assert f'href="{address.format("tree")}notebooks/solutions"' in page
    assert 'href="../data/README.html#2-open-clip-art"' in page or 'href="../data/README.html#open-clip-art"' in page


def test_page_needs_no_network_and_folds_what_is_optional(page):
    assert "badge.svg" not in page and ">Open in Colab<" in page
    assert not re.search(r'(?:src|<link[^>]*href)="https?://', page)
    assert "<math" in page
    assert '<span class="ne">KeyError</span>' in page and "\x1b" not in page  # colours of a terminal are the page's
    folded = page[page.index('<details class="optional">'):]
    assert "This is folded." in folded[: folded.index("</details>")]


@pytest.mark.parametrize("link, right", [
    ("b.html", True), ("b.html#here", True), ("#top", True), ("folder/", True), ("https://example.org/x", True),
    ("mailto:a@example.org", True), ("c.html", False), ("b.html#there", False), ("https:///x", False),
    ("https://nowhere", False), ("javascript:x", False)])
def test_links_that_lead_nowhere_are_found(build, tmp_path, link, right):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "index.html").write_text("")
    (tmp_path / "a.html").write_text(f'<a href="{link}">a</a>')
    (tmp_path / "b.html").write_text('<p id="here"><img src="a.html"></p>')
    assert build.bad_links(tmp_path) == ([] if right else [f"a.html: {link} leads nowhere"])


def test_workflow_publishes_the_folder_that_make_site_fills():
    workflow = (ROOT / ".github" / "workflows" / "site.yml").read_text(encoding="utf-8")
    assert "run: make site" in workflow and "path: build/site" in workflow
