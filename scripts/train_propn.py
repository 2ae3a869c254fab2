"""Train the proper-noun tagger on one CoNLL-U file and measure it on another: writes data/propn.npz and propn.json.

    python scripts/train_propn.py id_gsd-ud-dev.conllu id_gsd-ud-test.conllu

Both files are UD_Indonesian-GSD's (Universal Dependencies, CC BY-SA 4.0), whose column 4 is the part of speech. The
sets of features are compared by cross-validation on the first file; the second is only measured on. Few things are
named in these texts, and in captions little else: the emoji's Indonesian names and keywords in CLDR (Unicode License
3.0), fetched as the picture dictionary's are, stand among the training sentences as words that are no proper nouns, but
for a tenth of the emoji, by which it is measured how many captions of things would be dropped. `--only NAME` measures
one of TRIED and leaves the others' figures as they are.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from clipid_utils.data.cleaning.proper_nouns import (
    PARTS,
    WORDS,
    capitals,
    forms,
    save_tagger,
    shape,
    spelling,
    split_words,
    train,
)
from clipid_utils.data.dictionary.artists import read_names
from clipid_utils.data.dictionary.fetch import fetch_npm, read_sources
from clipid_utils.data.dictionary.splits import UNSEEN_CONCEPTS, share
from clipid_utils.paths import CACHE, DATA

FORMS = ("as written", "small letters", "capital on every word")
FOLDS = 3
CUTS = (4, 6, 8)  # words of a caption, in the test of the decision
LIMIT = 0.8  # share of proper nouns from which a caption is dropped


def neighbours(words: Sequence[str], i: int) -> list[str]:
    """Features of the words on both sides; tried, not used."""
    near = {j: words[i + j].lower() if 0 <= i + j < len(words) else "." for j in (-2, -1, 1, 2)}
    return [*(f"{j}={word}" for j, word in near.items()), *(f"{j}s={near[j][-3:]}" for j in (-1, 1)),
            f"{near[-1]}_{shape(words[i])}"]


TRIED = {
    "capitals": {"parts": (capitals,)},
    "capitals, spelling, without dropping rare or random features": {"parts": PARTS, "rare": 1, "drop": 0.0},
    "capitals, spelling": {"parts": PARTS},
    "capitals, spelling, neighbours": {"parts": (capitals, spelling, neighbours)},
    "capitals, spelling, names of things": {"parts": PARTS},
}  # fmt: skip
USED = "capitals, spelling, names of things"


def read_sentences(path: Path) -> list[tuple[list[str], list[bool]]]:
    """The sentences of a CoNLL-U file: words and which are proper nouns, without punctuation, as captions are split."""
    sentences = []
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        columns = [line.split("\t") for line in block.splitlines() if line[:1].isdigit()]
        words = [(row[1], row[3] == "PROPN") for row in columns if row[0].isdigit() and WORDS.search(row[1])]
        if words:
            sentences.append(([word for word, _ in words], [tag for _, tag in words]))
    return sentences


def read_things() -> tuple[list[list[str]], list[list[str]]]:
    """The emoji's Indonesian names and keywords without a capital, as words; and the names of those held out."""
    sources = read_sources(DATA / "sources.json")
    packages = {name: fetch_npm(name, pin, CACHE) for name, pin in sources["npm"].items() if "cldr" in name}
    learned, held = set(), set()
    for concept, (name, keywords) in read_names(packages, "id").items():
        out = share(concept) < UNSEEN_CONCEPTS
        texts = [name] if out else [name, *keywords]
        (held if out else learned).update(text for text in texts if text == text.lower())
    return tuple([words for text in sorted(part) if (words := split_words(text))] for part in (learned, held - learned))


def measure_things(tag: Callable, things: list) -> dict[str, dict]:
    """The share of names of things that would be dropped for proper nouns, by their number of words, in each form."""
    return {f"{count} words": {"names": len(part)} | {
        form: round(float(np.mean([np.mean(tag(forms(words)[number])) >= LIMIT for words in part])), 3)
        for number, form in enumerate(FORMS) if number}
        for count in (1, 2, 3) if (part := [words for words in things if min(len(words), 3) == count])}


def capital(words: Sequence[str]) -> list[bool]:
    """The simple rule: a capital is a proper noun."""
    return [word[0] != word[0].lower() for word in words]


def capital_inside(words: Sequence[str]) -> list[bool]:
    """The better rule: a capital is a proper noun, but not on the first word."""
    return [i > 0 and word[0] != word[0].lower() for i, word in enumerate(words)]


def agreement(found: Iterable[bool], gold: Iterable[bool]) -> dict[str, float]:
    """Precision, recall and F1, with the number of true ones."""
    found, gold = np.array(list(found), bool), np.array(list(gold), bool)
    both = int((found & gold).sum())
    precision, recall = both / max(int(found.sum()), 1), both / max(int(gold.sum()), 1)
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return {"precision": round(precision, 3), "recall": round(recall, 3), "f1": round(f1, 3), "gold": int(gold.sum())}


def measure(tag: Callable, sentences: list) -> dict[str, dict]:
    """How well a tagger finds the proper nouns, word by word, in each form of the sentences."""
    report = {}
    for number, form in enumerate(FORMS):
        found = [flag for words, _ in sentences for flag in tag(forms(words)[number])]
        report[form] = agreement(found, (flag for _, tags in sentences for flag in tags))
    return report


def measure_decision(tag: Callable, sentences: list) -> dict[str, dict]:
    """How well "at least LIMIT proper nouns" is decided for captions cut from the sentences, in each form.

    A caption is 4, 6 or 8 words of a sentence in a row, cut at every fourth word; a caption's true decision is that of
    the true tags. Cuts overlap, so that the counts are no independent samples.
    """
    cuts = [(words[i : i + n], tags[i : i + n]) for words, tags in sentences for n in CUTS
            for i in range(0, len(words) - n + 1, 4)]
    report = {"captions": len(cuts)}
    for number, form in enumerate(FORMS):
        found = [np.mean(tag(forms(words)[number])) >= LIMIT for words, _ in cuts]
        report[form] = agreement(found, (np.mean(tags) >= LIMIT for _, tags in cuts))
    return report


def cross_validate(sentences: list, more: list, options: dict, seed: int, folds: int) -> dict[str, float]:
    """The mean F1 over parts of the sentences, each measured by a tagger trained on the other parts and `more`."""
    scores = []
    for fold in range(folds):
        rest = [sentence for i, sentence in enumerate(sentences) if i % folds != fold]
        report = measure(train(rest + more, seed=seed, **options).tag, sentences[fold::folds])
        scores.append([report[form]["f1"] for form in FORMS])
    return dict(zip(FORMS, np.mean(scores, 0).round(3).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("train", type=Path, help="the CoNLL-U file to train on")
    parser.add_argument("test", type=Path, help="the CoNLL-U file to measure on")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of propn.npz and propn.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TRIED, help="measure this one and keep the recorded figures of the others")
    parser.add_argument("--folds", type=int, default=FOLDS, help="of the cross-validation; 0 leaves it out")
    options = parser.parse_args()
    learned, tested = read_sentences(options.train), read_sentences(options.test)
    things, held = read_things()
    files, recorded = (options.train, options.test), options.out / "propn.json"
    report = json.loads(recorded.read_text(encoding="utf-8")) if options.only else {"taggers": {}}
    report |= {"command": "python scripts/train_propn.py " + " ".join(path.name for path in files),
               "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
               "words": {name: sum(len(words) for words, _ in part)
                         for name, part in (("train", learned), ("test", tested))}, "things": len(things)}
    if not options.only:
        report["rules"] = {rule.__doc__.split(":")[1].strip(" ."): {
            "words": measure(rule, tested), "decision": measure_decision(rule, tested)}
            for rule in (capital, capital_inside)}
    for name in [options.only] if options.only else TRIED:
        more = [(words, [False] * len(words)) for words in things] if "things" in name else []
        tagger = train(learned + more, seed=options.seed, **TRIED[name])
        if name == USED:
            save_tagger(tagger, options.out / "propn.npz")
        report["taggers"][name] = {"words": measure(tagger.tag, tested),
                                   "decision": measure_decision(tagger.tag, tested),
                                   "things dropped": measure_things(tagger.tag, held)}
        if options.folds:
            scores = cross_validate(learned, more, TRIED[name], options.seed, options.folds)
            report["taggers"][name]["cross-validated F1"] = scores
        print(name, json.dumps(report["taggers"][name], indent=1), flush=True)
        report["used"] = USED
        recorded.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
