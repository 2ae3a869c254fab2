"""Train the proper-noun tagger on one CoNLL-U file and measure it on another: writes data/propn.npz and propn.json.

    python scripts/train_propn.py id_gsd-ud-dev.conllu id_gsd-ud-test.conllu

Both files are from UD_Indonesian-GSD (Universal Dependencies, CC BY-SA 4.0); column 4 is the part of speech. The sets
of features are compared by cross-validation on the first file. The second file is only for the final figures. These
texts have few names of things, but captions have little else. So the emoji's Indonesian names and keywords in CLDR
(Unicode License 3.0) are added to the training sentences as words that are not proper nouns. A tenth of the emoji is
held out, to measure how many names of things the filter would drop. `--only NAME` measures one of TRIED and keeps the
figures of the others.
"""

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from clipid_utils.data.cleaning.proper_nouns import (
    MODEL,
    PARTS,
    SLOTS,
    WORDS,
    Tagger,
    capitals,
    encode,
    shape,
    spelling,
    split_words,
)
from clipid_utils.data.dictionary.artists import read_names
from clipid_utils.data.dictionary.fetch import fetch_npm
from clipid_utils.data.dictionary.splits import UNSEEN_CONCEPTS, share
from clipid_utils.files import read_json, whole_file, write_json
from clipid_utils.paths import CACHE, DATA

FORMS = ("as written", "small letters", "capital on every word")
FOLDS = 3
CUTS = (4, 6, 8)  # words of a caption, in the test of the decision
LIMIT = 0.8  # share of proper nouns from which a caption is dropped


def neighbours(words: Sequence[str], i: int) -> list[str]:
    """Features of the neighbouring words; tried, not used."""
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


def train(
    sentences: Sequence[tuple[Sequence[str], Sequence[bool]]], *, seed: int, epochs: int = 6, parts: tuple = PARTS,
    rare: int = 2, drop: float = 0.15,
) -> Tagger:
    """A tagger from sentences (words, and whether each is a proper noun). The same seed gives the same tagger.

    Each sentence is also shown in lower case and with a capital on every word, as captions are often written: so the
    tagger learns to decide without capitals. Features of fewer than `rare` sentences are left out, and at each step a
    random share `drop` of the others: so the tagger depends less on single words.
    """
    rng = np.random.default_rng(seed)
    encoded = [[(encode(form, parts), tags) for form in forms(words)] for words, tags in sentences]
    known = common_slots(encoded, rare)
    examples = [([([s for s in features if s in known], *after) for features, *after in words], tags)
                for group in encoded for words, tags in group]
    weights, sums, seen = [0.0] * SLOTS, [0.0] * SLOTS, 0
    for _ in range(epochs):
        for row in rng.permutation(len(examples)):
            before = False
            for (features, *after), gold in zip(*examples[row], strict=True):
                used = features + after[before]
                used = [s for s, drawn in zip(used, rng.random(len(used)), strict=True) if drawn >= drop]
                before, seen = sum([weights[s] for s in used]) > 0, seen + 1
                if before != gold:
                    step = 1.0 if gold else -1.0
                    for s in used:
                        weights[s] += step
                        sums[s] += step * seen
    average = np.array(weights) - np.array(sums) / max(seen, 1)  # the mean of the weights over all steps
    return Tagger(average.astype(np.float32), parts)


def common_slots(encoded: list[list[tuple]], rare: int) -> set[int]:
    """The slots of the features that at least `rare` sentences have."""
    counts = Counter(s for group in encoded for s in {s for words, _ in group for word in words for s in word[0]})
    return {s for s, count in counts.items() if count >= rare}


def forms(words: Sequence[str]) -> list[list[str]]:
    """A text as it is, in lower case, and with a capital on every word."""
    return [list(words), [word.lower() for word in words], [word[:1].upper() + word[1:] for word in words]]


def save_tagger(tagger: Tagger, path: os.PathLike = MODEL) -> None:
    """Writes the weights that are not 0, in half precision. The file does not store `parts`: they must be PARTS."""
    slots = np.flatnonzero(tagger.weights.astype(np.float16))
    with whole_file(path) as file:
        np.savez_compressed(file, slots=slots.astype(np.uint16), weights=tagger.weights[slots].astype(np.float16))


def read_sentences(path: Path) -> list[tuple[list[str], list[bool]]]:
    """The sentences of a CoNLL-U file as (words, whether each is a proper noun), split like captions."""
    sentences = []
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        columns = [line.split("\t") for line in block.splitlines() if line[:1].isdigit()]
        words = [(row[1], row[3] == "PROPN") for row in columns if row[0].isdigit() and WORDS.search(row[1])]
        if words:
            sentences.append(([word for word, _ in words], [tag for _, tag in words]))
    return sentences


def read_things() -> tuple[list[list[str]], list[list[str]]]:
    """The words of the emoji's Indonesian names and keywords without a capital, and of the names held out."""
    sources = read_json(DATA / "sources.json")
    packages = {name: fetch_npm(name, pin, CACHE) for name, pin in sources["npm"].items() if "cldr" in name}
    learned, held = set(), set()
    for concept, (name, keywords) in read_names(packages, "id").items():
        out = share(concept) < UNSEEN_CONCEPTS
        texts = [name] if out else [name, *keywords]
        (held if out else learned).update(text for text in texts if text == text.lower())
    return tuple([words for text in sorted(part) if (words := split_words(text))] for part in (learned, held - learned))


def measure_things(tag: Callable, things: list) -> dict[str, dict]:
    """The share of names of things that the filter would drop, by number of words, in each form."""
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
    """Precision, recall and F1, with the number of true cases."""
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

    A caption is 4, 6 or 8 consecutive words of a sentence, starting at every fourth word. Its true decision follows
    from the true tags. The captions overlap, so they are not independent samples.
    """
    cuts = [(words[i : i + n], tags[i : i + n]) for words, tags in sentences for n in CUTS
            for i in range(0, len(words) - n + 1, 4)]
    report = {"captions": len(cuts)}
    for number, form in enumerate(FORMS):
        found = [np.mean(tag(forms(words)[number])) >= LIMIT for words, _ in cuts]
        report[form] = agreement(found, (np.mean(tags) >= LIMIT for _, tags in cuts))
    return report


def cross_validate(sentences: list, more: list, options: dict, seed: int, folds: int) -> dict[str, float]:
    """The mean F1 over parts of the sentences, each tagged by a tagger trained on the other parts and `more`."""
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
    report = read_json(recorded) if options.only else {"taggers": {}}
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
        write_json(recorded, report, indent=1)


if __name__ == "__main__":
    main()
