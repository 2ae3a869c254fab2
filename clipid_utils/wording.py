"""Indonesian around a name: the classifier that belongs to it, and the sentences it is put into.

Indonesian counts with a classifier (kata penggolong) that depends on what is counted: seekor kucing (by the tail),
seorang guru (by the person), sebuah mobil (by the fruit), setangkai mawar (by the stalk). The words and the rules are
data, `data/templates.json`; training draws captions with them, zero-shot classification asks with them.
"""

import functools
import json
from pathlib import Path

from clipid_utils import paths


@functools.cache
def load_wording(path: str | Path | None = None) -> dict:
    """The templates and classifier tables of `data/templates.json`, or of a file of the same form.

    Keys: `naive`, `plain` and `templates` (lists with "{name}" or "{counted}"), `classifiers` (the heads of phrases
    that each takes, "" for those that take none), `groups` (the classifier of a group of the dictionary), `default`;
    and `heads`, made here: the classifier of each head. Raises ValueError for a template without a place for a name and
    for a head listed twice.
    """
    path = Path(path or paths.DATA / "templates.json")
    wording = json.loads(path.read_text(encoding="utf-8"))
    pairs = [(head, classifier) for classifier, heads in wording["classifiers"].items() for head in heads]
    wording["heads"] = dict(pairs)
    for head, classifier in pairs:
        if wording["heads"][head] != classifier:
            raise ValueError(f"{path.name}: {head!r} stands under {classifier!r} and {wording['heads'][head]!r}")
    for key in ("naive", "plain", "templates"):
        for template in wording[key]:
            if template.format(name="\0", counted="\0").count("\0") != 1:
                raise ValueError(f"{path.name}: {key}: {template!r} must hold one of {{name}} and {{counted}}")
    return wording


def classifier_for(name: str, group: str | None = None, wording: dict | None = None) -> str:
    """The classifier of an Indonesian noun phrase: "seekor" for "kucing tidur", "" where none belongs.

    Indonesian phrases begin with their head, so the longest beginning of the name found in the table decides; then the
    group (its English slug); then the default. A name that begins with a classifier of its own gets no second one.
    """
    wording = wording or load_wording()
    words = name.lower().replace(":", " ").replace(",", " ").split()
    if words and words[0] in wording["classifiers"]:
        return ""
    for length in range(len(words), 0, -1):
        found = wording["heads"].get(" ".join(words[:length]))
        if found is not None:
            return found
    return wording["groups"].get(group, wording["default"])


def counted(name: str, group: str | None = None, wording: dict | None = None) -> str:
    """The name after its classifier: "kucing tidur" -> "seekor kucing tidur", "hujan" -> "hujan"."""
    return f"{classifier_for(name, group, wording)} {name}".strip()


def fill(template: str, name: str, group: str | None = None, wording: dict | None = None) -> str:
    """One sentence of a template: "{name}" is the bare name, "{counted}" the name after its classifier."""
    return template.format(name=name, counted=counted(name, group, wording))


def group_phrase(group_id: str) -> str:
    """The Indonesian name of a group as one would say it: "huruf & angka" -> "huruf dan angka"."""
    return group_id.replace("&", "dan")
