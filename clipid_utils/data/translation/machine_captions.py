"""Machine-made Indonesian captions for pictures with English ones, and the checks that such captions go through.

    rows = in_indonesian(named(drawings), Translator())          # of Open Clip Art, or the dictionary's own English
    rows = with_good_captions(rows, caption_checks(rows), report)
    rows = with_good_pictures(rows, second_report)

Notebook 02 does this step by step; scripts/added_pictures.py trains on the result.
"""

from collections.abc import Callable, Iterator

from datasets import Dataset, concatenate_datasets

from clipid_utils.data.cleaning import filters
from clipid_utils.data.cleaning.proper_nouns import load_tagger
from clipid_utils.data.dictionary.openclipart import tidy_title
from clipid_utils.data.report import Report
from clipid_utils.data.translation.checks import CHECKS, PairCheck, filter_pairs
from clipid_utils.data.translation.translate import Translation

# Folders of Open Clip Art whose drawings are wrong when they are mirrored: letters, flags, maps, keys
HAVE_TEXT = frozenset({"signs_and_symbols", "logos", "buttons", "geography", "computer", "education"})
MAX_OF_A_TITLE = 20  # drawings with one title; a title of more is that of a series, such as "AIGA Symbol Signs"


def named(openclipart: Dataset) -> Dataset:
    """Rows of `load_openclipart` with `name_en`, the tidied title, and `has_text`, two columns of the dictionary.

    Rows are left out if nothing of their title is left.
    """
    names = [tidy_title(title) for title in openclipart["title_en"]]
    rows = openclipart.add_column("name_en", names)
    rows = rows.add_column("has_text", [group in HAVE_TEXT for group in openclipart["group"]])
    return rows.select([row for row, name in enumerate(names) if name])


def in_indonesian(rows: Dataset, translate: Callable[[list[str]], list[Translation]]) -> Dataset:
    """Rows with `name_id`, `keywords_id`, `group_id` and, if they have a `description_en`, `description_id`.

    Each is the translation of the English column, and replaces an older column of its name. A text that could not be
    translated stays English, and `name_mark` and `description_mark` say why; "" stays "".
    """
    columns = {"name": rows["name_en"][:], "group": [group.replace("_", " ") for group in rows["group"]]}
    if "description_en" in rows.column_names:
        columns["description"] = rows["description_en"][:]
    keywords = rows["keywords_en"][:]
    texts = sorted({text for column in (*columns.values(), *keywords) for text in column})
    found = dict(zip(texts, translate(texts), strict=True))
    made = {f"{name}_id": [found[text].text for text in column] for name, column in columns.items()}
    made |= {f"{name}_mark": [found[text].mark for text in columns[name]] for name in columns if name != "group"}
    return _with_columns(rows, made | {"keywords_id": [[found[word].text for word in words] for words in keywords]})


def _with_columns(rows: Dataset, columns: dict[str, list]) -> Dataset:
    rows = rows.remove_columns([name for name in columns if name in rows.column_names])
    return concatenate_datasets([rows, Dataset.from_dict(columns)], axis=1)


def caption_checks(rows: Dataset) -> dict[str, PairCheck]:
    """The checks of a name or a description of `rows`: those of the English, `CHECKS`, and those of the Indonesian."""
    titles = [{"captions": [name]} for name in rows["name_en"]]
    return {
        "English: its length": _on_side(0, filters.length((1, 30), (3, 200))),
        "English: another language": _on_side(0, filters.language("en", least=0.02)),
        "English: the title of a series": _on_side(0, filters.common_captions(titles, MAX_OF_A_TITLE)),
        **CHECKS,
        "Indonesian: its length": _on_side(1, filters.length((1, 30), (3, 200))),
        "Indonesian: proper nouns": _on_side(1, filters.proper_nouns(load_tagger())),
    }


def _on_side(side: int, check: Callable[[str], str | None]) -> PairCheck:
    """A caption filter as a check of pairs that looks at one side: 0 for the English, 1 for the Indonesian."""
    return lambda pairs: [check(pair[side]) or "" for pair in pairs]


def with_good_captions(rows: Dataset, checks: dict[str, PairCheck], report: Report) -> Dataset:
    """The rows with a caption that passes the checks: the name, or else the description, which then is `name_id`.

    The report counts names and descriptions together; a text that the translator marked does not pass. Keywords that
    do not pass `CHECKS`, or are still English, are left out and not counted: one more keyword is not worth an English
    word.
    """
    captions, names = [], {}
    for kind in ("name", "description"):
        columns = (rows[f"{kind}_{part}"][:] for part in ("en", "id", "mark"))
        for row, (english, indonesian, mark) in enumerate(zip(*columns, strict=True)):
            if mark and english:
                report.drop(f"not translated: {mark}", english)
            elif english:
                captions.append((row, (english, indonesian)))
    for place, _, indonesian in filter_pairs((pair for _, pair in captions), checks, report):
        names.setdefault(captions[place][0], indonesian)
    rows, words = rows.select(sorted(names)), []
    for english, indonesian in zip(rows["keywords_en"], rows["keywords_id"], strict=True):
        pairs = [pair for pair in zip(english, indonesian, strict=True) if pair[0].lower() != pair[1].lower()]
        words.append(list(dict.fromkeys(text for _, _, text in filter_pairs(pairs, CHECKS, Report()))))
    return _with_columns(rows, {"name_id": [names[row] for row in sorted(names)], "keywords_id": words})


def with_good_pictures(rows: Dataset, report: Report) -> Dataset:
    """The rows whose picture passes the filters; the report names the others by their `name_id`."""
    def records() -> Iterator[dict]:
        for number, (image, name) in enumerate(zip(rows["image"], rows["name_id"], strict=True)):
            yield {"image": image, "captions": [name], "row": number}

    checks = (filters.size(), filters.flat(), filters.repeated_pictures(), filters.placeholders(records()),
              filters.near_pictures())
    return rows.select([record["row"] for record in filters.filter_pictures(records(), report, *checks)])
