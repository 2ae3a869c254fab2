"""Indonesian captions by machine for pictures that have English ones, and the gates that such captions go through.

    rows = in_indonesian(named(drawings), Translator())          # Open Clip Art's, or the dictionary's own English
    rows = with_good_captions(rows, caption_gates(rows), report)
    rows = with_good_pictures(rows, another_report)

Notebook 02 goes through this step by step; scripts/added_pictures.py trains on what comes out.
"""

from collections.abc import Callable, Iterator

from datasets import Dataset

from clipid_utils.data.cleaning.filters import (
    common_captions,
    filter_pictures,
    flat,
    language,
    length,
    near_pictures,
    placeholders,
    proper_nouns,
    repeated_pictures,
    size,
)
from clipid_utils.data.cleaning.proper_nouns import load_tagger
from clipid_utils.data.dictionary.openclipart import tidy_title
from clipid_utils.data.report import Report
from clipid_utils.data.translation.checks import GATES, Gate, each, pass_gates
from clipid_utils.data.translation.translate import Translation

# Folders of Open Clip Art whose drawings read wrong in a mirror: letters, flags, maps, keys
HAVE_TEXT = frozenset({"signs_and_symbols", "logos", "buttons", "geography", "computer", "education"})
MOST_OF_A_TITLE = 20  # drawings of one title: above, it is a series', such as "AIGA Symbol Signs"


def named(openclipart: Dataset) -> Dataset:
    """Rows of `load_openclipart` with the columns `name_en`, the tidied title, and `has_text`, as the dictionary has
    them; titles of which nothing is left are left out."""
    names = [tidy_title(title) for title in openclipart["title_en"]]
    rows = openclipart.add_column("name_en", names)
    rows = rows.add_column("has_text", [group in HAVE_TEXT for group in openclipart["group"]])
    return rows.select([row for row, name in enumerate(names) if name])


def in_indonesian(rows: Dataset, translate: Callable[[list[str]], list[Translation]]) -> Dataset:
    """Rows with `name_id`, `keywords_id`, `group_id` and, where they have a `description_en`, `description_id`.

    Each is the translation of the column of that name in English, and replaces the column where there is one. What
    could not be translated stays English, and `name_mark` and `description_mark` say why; "" stays "".
    """
    columns = {"name_id": rows["name_en"][:], "group_id": [group.replace("_", " ") for group in rows["group"]]}
    if "description_en" in rows.column_names:
        columns["description_id"] = rows["description_en"][:]
    keywords = rows["keywords_en"][:]
    texts = sorted({text for column in (*columns.values(), *keywords) for text in column})
    found = dict(zip(texts, translate(texts), strict=True))
    marks = {name.replace("_id", "_mark"): [found[text].mark for text in column]
             for name, column in columns.items() if name != "group_id"}
    columns = {name: [found[text].text for text in column] for name, column in columns.items()} | marks
    columns["keywords_id"] = [[found[word].text for word in words] for words in keywords]
    for name, column in columns.items():
        rows = rows.remove_columns(name) if name in rows.column_names else rows
        rows = rows.add_column(name, column)
    return rows


def caption_gates(rows: Dataset) -> dict[str, Gate]:
    """What a name or a description of `rows` goes through, in this order: checks of the English, `GATES`, checks of the
    Indonesian. Each looks at pairs of the two."""
    titles = [{"captions": [name]} for name in rows["name_en"]]
    return {
        "English: its length": of_english(length((1, 30), (3, 200))),
        "English: another language": of_english(language("en", least=0.02)),
        "English: the title of a series": of_english(common_captions(titles, MOST_OF_A_TITLE)),
        **GATES,
        "Indonesian: its length": of_indonesian(length((1, 30), (3, 200))),
        "Indonesian: proper nouns": of_indonesian(proper_nouns(load_tagger())),
    }


def of_english(check: Callable[[str], str | None]) -> Gate:
    """A caption filter as a gate of pairs, which looks at the English."""
    return each(lambda english, indonesian: check(english) or "")


def of_indonesian(check: Callable[[str], str | None]) -> Gate:
    """A caption filter as a gate of pairs, which looks at the Indonesian."""
    return each(lambda english, indonesian: check(indonesian) or "")


def with_good_captions(rows: Dataset, gates: dict[str, Gate], report: Report) -> Dataset:
    """The rows of which a caption passes the gates: the name, or else the description, which then is `name_id`.

    The report counts captions, names and descriptions together; what the translator marked passes no gate. Keywords
    that do not pass `GATES` go uncounted, and with them those that are still as they were: a keyword more is not worth
    an English word.
    """
    captions, names = [], {}
    for kind in ("name", "description"):
        columns = (rows[f"{kind}_{part}"][:] for part in ("en", "id", "mark"))
        for row, (english, indonesian, mark) in enumerate(zip(*columns, strict=True)):
            if mark and english:
                report.drop(f"not translated: {mark}", english)
            elif english:
                captions.append((row, english, indonesian))
    for place, _, indonesian in pass_gates(((english, ind) for _, english, ind in captions), gates, report):
        names.setdefault(captions[place][0], indonesian)
    kept, words = sorted(names), []
    rows = rows.select(kept)
    if not kept:  # to which `datasets` can add no column
        return rows
    for english, indonesian in zip(rows["keywords_en"], rows["keywords_id"], strict=True):
        pairs = [(word, text) for word, text in zip(english, indonesian, strict=True) if word.lower() != text.lower()]
        words.append(list(dict.fromkeys(text for _, _, text in pass_gates(pairs, GATES, Report()))))
    rows = rows.remove_columns(["name_id", "keywords_id"])
    return rows.add_column("name_id", [names[row] for row in kept]).add_column("keywords_id", words)


def with_good_pictures(rows: Dataset, report: Report) -> Dataset:
    """The rows whose picture passes the filters; the report names the others by their `name_id`."""

    def records() -> Iterator[dict]:
        for number, (image, name) in enumerate(zip(rows["image"], rows["name_id"], strict=True)):
            yield {"image": image, "captions": [name], "row": number}

    checks = (size(), flat(), repeated_pictures(), placeholders(records()), near_pictures())
    return rows.select([record["row"] for record in filter_pictures(records(), report, *checks)])
