"""The Indonesian notebooks: built from the catalogues, complete, up to date, with the code of the English ones."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from babel.messages.pofile import read_po

ROOT = Path(__file__).resolve().parent.parent
CODE = r"`[^`]+`"


@pytest.fixture(scope="module")
def indonesian():
    spec = importlib.util.spec_from_file_location("indonesian", ROOT / "site" / "indonesian.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_workshops_notebooks_are_there(indonesian):
    names = {path.stem for path in indonesian.lessons()}
    assert {"00_start_here", "06_zero_shot", "07_picture_search", "glossary"} <= names
    assert {path.stem for path in (ROOT / "notebooks" / "id").iterdir()} == names


def test_catalogues_have_the_messages_of_sphinx_and_no_others(indonesian, tmp_path):
    """None is missing, and none is left of an older text. `catalogue` refuses empty and outdated translations."""
    indonesian.extract(indonesian.lessons(), tmp_path)
    for lesson in indonesian.lessons():
        with open(tmp_path / "notebooks" / f"{lesson.stem}.pot", "rb") as file:
            expected = {message.id for message in read_po(file) if message.id}
        assert indonesian.catalogue(lesson).keys() == expected, "python site/indonesian.py update"


def test_committed_notebooks_are_those_that_the_catalogues_give(indonesian):
    for lesson in indonesian.lessons():
        committed = (ROOT / "notebooks" / "id" / lesson.name).read_text(encoding="utf-8")
        assert committed == indonesian.built(lesson), "make indonesian"


def test_code_and_outputs_are_those_of_the_english_notebook(indonesian):
    for lesson in (path for path in indonesian.lessons() if path.suffix == ".ipynb"):
        ours, theirs = (json.loads(path.read_text(encoding="utf-8"))["cells"]
                        for path in (ROOT / "notebooks" / "id" / lesson.name, lesson))
        assert [cell["id"] for cell in ours] == [cell["id"] for cell in theirs]
        assert [cell for cell in ours if cell["cell_type"] == "code"] == [
            cell for cell in theirs if cell["cell_type"] == "code"]


def test_translations_keep_links_numbers_and_names_in_code(indonesian):
    def parts(text):
        numbers = re.findall(r"\d+", re.sub(r"(?<=\d)[.,](?=\d)", "", re.sub(rf"{CODE}|\]\([^)]*\)", "", text)))
        return Counter(re.findall(r"\]\(([^)\s]+)\)", text)), Counter(numbers), Counter(re.findall(CODE, text))

    for lesson in indonesian.lessons():
        for english, translation in indonesian.catalogue(lesson).items():
            assert parts(english) == parts(translation), f"{english}\n{translation}"


def test_a_cell_is_translated_in_place(indonesian):
    """Headings, paragraphs of several lines, lists, tables, quotes and formulas."""
    cell = ("## 1 · Search\n\nOne line\nand `code`.\n\n- a [link](01_b.ipynb)\n  of two lines\n- b\n\n"
            "| x | b |\n|---|---|\n| b | b |\n\n$$x^2$$\n\n> quoted\n\n"
            "<details><summary>Answers</summary>\n\n1. b\n</details>")
    messages = {"1 · Search": "1 · Cari", "One line and `code`.": "Satu baris dan `code`.",
                "a [link](01_b.ipynb) of two lines": "[tautan](01_b.ipynb)", "b": "B", "x": "X", "quoted": "dikutip"}
    assert indonesian.translated(cell, messages) == (
        "## 1 · Cari\n\nSatu baris dan `code`.\n\n- [tautan](01_b.ipynb)\n- B\n\n| X | B |\n|---|---|\n"
        "| B | B |\n\n$$x^2$$\n\n> dikutip\n\n<details><summary>Jawaban</summary>\n\n1. B\n</details>")
    with pytest.raises(KeyError):
        indonesian.translated(cell, {})


def test_links_lead_to_the_same_places_from_one_folder_deeper(indonesian):
    text = ("[a](06_z.ipynb#b) [c](01_p.ipynb) [d](../data/README.md) [e](glossary.md#loss) [f](#g) [h](https://i.org) "
            "https://x/blob/v1/notebooks/06_z.ipynb v1?labpath=notebooks/06_z.ipynb")
    assert indonesian.moved(text, {"06_z.ipynb"}) == (
        "[a](06_z.ipynb#b) [c](../01_p.ipynb) [d](../../data/README.md) [e](../glossary.md#loss) [f](#g) "
        "[h](https://i.org) https://x/blob/v1/notebooks/id/06_z.ipynb v1?labpath=notebooks/id/06_z.ipynb")


def test_an_empty_or_outdated_translation_is_an_error(indonesian, tmp_path, monkeypatch):
    monkeypatch.setattr(indonesian, "CATALOGUES", tmp_path)
    for text in ('msgid "a"\nmsgstr ""\n', '#, fuzzy\nmsgid "a"\nmsgstr "b"\n'):
        (tmp_path / "00_a.po").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="1 messages have no translation or an outdated one"):
            indonesian.catalogue(Path("00_a.ipynb"))
