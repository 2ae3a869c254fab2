"""Indonesian around a name: its classifier, and the sentences that templates make of it.

Indonesian counts with a classifier (kata penggolong) that depends on the thing: seekor kucing ("a tail of cat"),
seorang guru ("a person"), sebuah mobil ("a fruit"), setangkai mawar ("a stalk"). The words and the rules are data, in
`data/templates.json`. Training draws captions with them, and zero-shot classification uses them for its prompts.
"""

import functools

from clipid_utils.files import read_json
from clipid_utils.paths import DATA


@functools.cache
def load_wording() -> dict:
    """The templates and classifier tables of `data/templates.json`.

    Keys: `naive`, `plain` and `templates` (lists with "{name}" or "{counted}"), `classifiers` (for each classifier the
    heads of its phrases, "" for none), `groups` (the classifier of a group of the dictionary); and `heads`, made here:
    the classifier of each head.
    """
    wording = read_json(DATA / "templates.json")
    wording["heads"] = {head: classifier for classifier, heads in wording["classifiers"].items() for head in heads}
    return wording


def classifier_for(name: str, group: str | None = None) -> str:
    """The classifier of an Indonesian noun phrase: "seekor" for "kucing tidur", "" if it takes none.

    Indonesian phrases begin with their head. So the longest beginning of the name that is in the table decides; else
    the group (its English slug). Names that begin with a classifier or are plural ("kucing-kucing") take none.
    """
    wording = load_wording()
    words = name.lower().replace(":", " ").replace(",", " ").split()
    if not words or words[0] in wording["classifiers"]:
        return ""
    for length in range(len(words), 0, -1):
        found = wording["heads"].get(" ".join(words[:length]))
        if found is not None:
            return found
    first, _, second = words[0].partition("-")
    return "" if second.startswith(first) and second else wording["groups"].get(group, "")


def counted(name: str, group: str | None = None) -> str:
    """The name after its classifier: "kucing tidur" -> "seekor kucing tidur", "hujan" -> "hujan"."""
    return f"{classifier_for(name, group)} {name}".strip()


def fill(template: str, name: str, group: str | None = None) -> str:
    """One sentence of a template: "{name}" is the name alone, "{counted}" the name after its classifier."""
    return template.format(name=name, counted=counted(name, group))


def group_phrase(group_id: str) -> str:
    """The Indonesian name of a group as people say it: "huruf & angka" -> "huruf dan angka"."""
    return group_id.replace("&", "dan")
