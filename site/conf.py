"""Sphinx's settings for the course's site. site/build.py lays out the pages and runs Sphinx with these."""

import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

from docutils import nodes
from docutils.utils import new_document
from docutils.utils.math.latex2mathml import tex2mathml
from ipython_pygments_lexers import IPythonLexer
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # autodoc imports clipid_utils
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]

project = "CLIP-Indonesian"
author = "The CLIP-Indonesian authors"
copyright = f"{author}; text and code under Apache 2.0"
release = re.search(r'__version__ = "(.+)"', (ROOT / "clipid_utils" / "__init__.py").read_text(encoding="utf-8"))[1]
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton", "sphinx_design"]
nb_execution_mode = "off"  # notebooks are shown with the outputs that they have
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"

templates_path = []
html_theme = "sphinx_book_theme"
html_title = project
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["course.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = True  # the notebook that a page's download button gives
html_last_updated_fmt = None
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system has it
html_theme_options = {
    "repository_url": REPOSITORY,
    "repository_branch": f"v{release}",
    "path_to_docs": "",
    "use_repository_button": True,
    "use_issues_button": True,
    "launch_buttons": {
        "binderhub_url": "https://mybinder.org",
        "colab_url": "https://colab.research.google.com",
        "notebook_interface": "jupyterlab",
    },
    "search_bar_text": "Search the course",
    "toc_title": "On this page",
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search field is in the sidebar
    "show_toc_level": 2,
}
copybutton_selector = "div:not(.output) > div.highlight pre"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def link_to_repository(app, document) -> None:
    """Links to files of the repository that are no page of the site lead to the repository."""
    for link in list(document.findall(lambda node: node.get("reftype") == "myst" if isinstance(node, nodes.Element)
                                      else False)):
        if link.get("refdomain"):  # a page of the site
            continue
        name, _, anchor = link["reftarget"].partition("#")
        path = (ROOT / app.env.docname).parent.joinpath(name).resolve()
        if name and path.is_relative_to(ROOT) and path.exists():
            kind = "tree" if path.is_dir() else "blob"
            uri = f"{REPOSITORY}/{kind}/v{release}/{path.relative_to(ROOT).as_posix()}{'#' * bool(anchor)}{anchor}"
            link.replace_self(nodes.reference("", "", *link.children, refuri=uri))


def badges_to_text(app, document) -> None:
    """Badges are pictures on other servers: here they are buttons of text, which need no network."""
    for picture in list(document.findall(nodes.image)):
        if isinstance(picture.parent, nodes.reference) and urlsplit(picture["uri"]).scheme:
            picture.parent["classes"].append("launch")
            picture.replace_self(nodes.inline("", picture["alt"]))


def fold_optional(app, document) -> None:
    """Sections with `Optional`, or Opsional, in their title are folded; the reader opens them with one click."""
    for section in document.findall(nodes.section):
        title = section.next_node(nodes.title)
        if re.search(r"\bO(ptional|psional)\b", title.astext()):
            words = "Opsional: tampilkan bagian ini" if "Opsional" in title.astext() else "Optional: show this section"
            summary = f'<details class="optional"><summary>{words}</summary>'
            section.insert(section.index(title) + 1, nodes.raw("", summary, format="html"))
            section.append(nodes.raw("", "</details>", format="html"))


class Markdown(SphinxDirective):
    """Parses its content as Markdown, in a page of reStructuredText such as autodoc makes."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        part = new_document(self.get_source_info()[0], self.state.document.settings)
        MystParser().parse("\n".join(self.content), part)
        return part.children


def markdown_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are Markdown: one pair of backticks is code, and so is an indented block."""
    if what == "module":  # autodoc has removed the indentation of a docstring that ends with a block of code
        lines[:] = obj.__doc__.strip().splitlines()
    lines[:] = [".. markdown::", "", *(f"   {line}" for line in lines), ""]


def readable_signature(app, what, name, obj, options, signature, returns) -> tuple[str, str] | None:
    """Three dots stand for a default that has no form in Python; the settings of the command line are left out."""
    if signature:
        signature = re.sub(r"<function [\w.<>]+>|<factory>", "...", signature)
        signature = re.sub(r"~?(?:typing\.)?Annotated\[([^,\[\]]+), ~?tyro\.[^\[\]]+\]", r"\1", signature)
    return signature, returns


def skip_fields(app, what, name, obj, skip, options) -> bool | None:
    """Fields of a named tuple have no text of their own; its signature lists them."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def mathml(self, node) -> None:
    """Formulas are MathML, which browsers draw themselves: no script, no network."""
    block = isinstance(node, nodes.math_block)
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), True)}</div>' if block
                     else tex2mathml(node.astext()))
    raise nodes.SkipNode


def setup(app) -> None:
    app.connect("doctree-read", link_to_repository)
    app.connect("doctree-read", badges_to_text)
    app.connect("doctree-read", fold_optional)
    app.connect("autodoc-process-docstring", markdown_docstring)
    app.connect("autodoc-process-signature", readable_signature)
    app.connect("autodoc-skip-member", skip_fields)
    app.add_directive("markdown", Markdown)
    app.add_lexer("python", IPythonLexer)  # cells and a page have lines such as `!git clone`
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
nb_render_markdown_format = "gfm"  # tables in the outputs of cells
