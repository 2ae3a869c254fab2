"""Indonesian around a name: its classifier, and the sentences that templates make of it.

Indonesian counts with a classifier (kata penggolong) that depends on the thing: seekor kucing ("a tail of cat"),
seorang guru ("a person"), sebuah mobil ("a fruit"), setangkai mawar ("a stalk"). The words and the rules are data, in
`data/templates.json`. Training draws captions with them, and zero-shot classification uses them for its prompts.
"""

import functools
from pathlib import Path

from clipid_utils import paths
from clipid_utils.files import read_json


@functools.cache
def load_wording(path: str | Path | None = None) -> dict:
    """The templates and classifier tables of `data/templates.json`, or of a file of the same form.

    Keys: `naive`, `plain` and `templates` (lists with "{name}" or "{counted}"), `classifiers` (for each classifier the
    heads of its phrases, "" for none), `groups` (the classifier of a group of the dictionary); and `heads`, made here:
    the classifier of each head. Raises ValueError for a template without a place for a name, and for a head that is
    listed twice.
    """
    path = Path(path or paths.DATA / "templates.json")
    wording = read_json(path)
    pairs = [(head, classifier) for classifier, heads in wording["classifiers"].items() for head in heads]
    wording["heads"] = dict(pairs)
    for head, classifier in pairs:
        if wording["heads"][head] != classifier:
            raise ValueError(f"{path.name}: {head!r} is under {classifier!r} and {wording['heads'][head]!r}: keep one")
    for key in ("naive", "plain", "templates"):
        for template in wording[key]:
            if template.format(name="\0", counted="\0").count("\0") != 1:
                raise ValueError(f"{path.name}: {key}: {template!r} must have one of {{name}} and {{counted}}")
    return wording


def classifier_for(name: str, group: str | None = None, wording: dict | None = None) -> str:
    """The classifier of an Indonesian noun phrase: "seekor" for "kucing tidur", "" if it takes none.

    Indonesian phrases begin with their head. So the longest beginning of the name that is in the table decides; else
    the group (its English slug). Names that begin with a classifier or are plural ("kucing-kucing") take none.
    """
    wording = wording or load_wording()
    words = name.lower().replace(":", " ").replace(",", " ").split()
    if not words or words[0] in wording["classifiers"]:
        return ""
    for length in range(len(words), 0, -1):
        found = wording["heads"].get(" ".join(words[:length]))
        if found is not None:
            return found
    first, _, second = words[0].partition("-")
    return "" if second.startswith(first) and second else wording["groups"].get(group, "")


def counted(name: str, group: str | None = None, wording: dict | None = None) -> str:
    """The name after its classifier: "kucing tidur" -> "seekor kucing tidur", "hujan" -> "hujan"."""
    return f"{classifier_for(name, group, wording)} {name}".strip()


def fill(template: str, name: str, group: str | None = None, wording: dict | None = None) -> str:
    """One sentence of a template: "{name}" is the name alone, "{counted}" the name after its classifier."""
    return template.format(name=name, counted=counted(name, group, wording))


def group_phrase(group_id: str) -> str:
    """The Indonesian name of a group as people say it: "huruf & angka" -> "huruf dan angka"."""
    return group_id.replace("&", "dan")
