"""The value of machine-translated captions on the picture dictionary: three questions, one budget.

    .venv-bench/bin/python scripts/train_translator.py --without 0 --steps 1500   # and --without 1
    python scripts/added_pictures.py    # about half an hour on 2 cores a seed; writes data/added_pictures.json

The recipe of the shipped checkpoint is trained for `--steps` steps, with each of `--seeds` seeds, on four sets: the
dictionary's human captions; these and Open Clip Art's translated and filtered captions; these and Open Clip Art's
translated captions without any filter; and the dictionary's pictures with machine translations of its English. A name
that the translator learned by heart would not be a real translation, so each half of the names is translated by a model
that was trained without that half. A run that has ended is kept in build/added_pictures and is not repeated.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets
from recall_of_runs import Ranks, difference, line, recalls, text_ranks
from sacrebleu.metrics import CHRF
from translator_corpus import half_of

from clipid_utils import paths
from clipid_utils.data.batches.loader import PicturePairs, load_pairs
from clipid_utils.data.dictionary.build import load_picture_dictionary
from clipid_utils.data.dictionary.openclipart import load_openclipart, split_openclipart
from clipid_utils.data.report import Report
from clipid_utils.data.translation.machine_captions import (
    caption_checks,
    in_indonesian,
    named,
    with_good_captions,
    with_good_pictures,
)
from clipid_utils.data.translation.translate import Translator
from clipid_utils.inference.evaluate import PACKAGES, rounded
from clipid_utils.training.fit import fit
from clipid_utils.training.optimizers import muon
from clipid_utils.training.recipes import MINI, SOURCE_SIZE, new_mini, pairs_checksum
from clipid_utils.versions import versions

WORK, HALVES = Path("build/added_pictures"), Path("build/halves")
SPLITS = ("validation", "unseen_artist", "unseen_concept", "photographs")
COLUMNS = ("image", "name_id", "keywords_id", "group", "group_id", "has_text")
HUMAN, FILTERED, UNFILTERED, MACHINE = (
    "human captions", "and machine captions, filtered", "and machine captions, unfiltered", "machine captions alone")
QUESTIONS = {  # recall after the first set minus that after the second
    "what the added pictures bring": (FILTERED, HUMAN),
    "what the filters bring": (FILTERED, UNFILTERED),
    "what machine captions cost": (HUMAN, MACHINE),
}


def together(*parts: Dataset) -> PicturePairs:
    """Several sets of pictures with names and keywords, as one to train on."""
    parts = [part.select_columns(list(COLUMNS)) for part in parts]
    return load_pairs(concatenate_datasets([part.cast(parts[0].features) for part in parts]), SOURCE_SIZE)


def drawings(dictionary: DatasetDict) -> tuple[dict[str, Dataset], dict]:
    """Open Clip Art in Indonesian, unfiltered and filtered, and the counts of its reports."""
    whole, read = load_openclipart()
    split, parted = split_openclipart(whole, dictionary)
    rows = in_indonesian(named(split["train"]), Translator())
    captions, pictures = Report(), Report()
    kept = with_good_pictures(with_good_captions(rows, caption_checks(rows), captions), pictures)
    steps = {"package": read, "split": parted, "captions": captions, "pictures": pictures}
    counts = {step: {"kept": report.kept, "dropped": dict(report.dropped)} for step, report in steps.items()}
    unseen = {name.casefold() for name in dictionary["unseen_concept"]["name_id"]}
    said = sum(bool(unseen & {text.casefold() for text in (name, *keywords)})
               for name, keywords in zip(kept["name_id"], kept["keywords_id"], strict=True))
    return ({FILTERED: kept, UNFILTERED: rows},
            {"unfiltered": len(rows), "filtered": len(kept), "saying an unseen name": said, **counts})


def machine_captions(train: Dataset) -> tuple[Dataset, dict]:
    """The dictionary's `train` with captions from its English, each half by the model that did not learn from it, and
    how near these are to the human ones."""
    halves = np.array([half_of(name) for name in train["name_en"]])
    parts = [in_indonesian(train.select(np.flatnonzero(halves == half)), Translator(HALVES / f"half-{half}"))
             for half in (0, 1)]
    order = np.argsort(np.concatenate([np.flatnonzero(halves == half) for half in (0, 1)]), kind="stable")
    rows = concatenate_datasets(parts).select(order)
    pairs = sorted(set(zip(rows["name_id"], train["name_id"], strict=True)))
    found, expected = zip(*pairs, strict=True)
    figures = [json.loads((HALVES / f"half-{half}" / "metrics.json").read_text(encoding="utf-8")) for half in (0, 1)]
    return rows, {"chrF": CHRF().corpus_score(found, [expected]).score,
                  "exact": float(np.mean([f.lower() == e.lower() for f, e in pairs])), "names": len(pairs),
                  "translators": [{key: of[key] for key in ("settings", "test")} for of in figures]}


def trained(name: str, make: Callable[[], PicturePairs], seed: int, steps: int, dictionary) -> tuple[dict, dict]:
    """The ranks of a run on each split and how it ended; read from the folder of ended runs if they are there."""
    train, started = make(), time.time()
    config = dataclasses.replace(MINI, steps=steps, evaluate_every=10**6)
    settings = json.dumps([pairs_checksum(train), seed, dataclasses.asdict(config)], sort_keys=True)
    path = WORK / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.npz"
    if not path.is_file():
        model, processor = new_mini(train, seed=seed)
        result = fit(model, processor, train, None, config, seed=seed, optimizer=muon)
        if result.interrupted:
            raise SystemExit("stopped: the same command continues after the last whole run")
        end = [line for line in result.history if "loss" in line][-1]
        ranks = {split: text_ranks(result.model, processor, dictionary[split]) for split in SPLITS}
        end = {"step": end["step"], "loss": end["loss"], "pictures": len(train),
               "minutes": (time.time() - started) / 60}
        WORK.mkdir(parents=True, exist_ok=True)
        np.savez(path.with_suffix(".part.npz"), **ranks, end=json.dumps(end))
        path.with_suffix(".part.npz").replace(path)
    with np.load(path) as stored:
        ranks, end = {split: stored[split] for split in SPLITS}, json.loads(str(stored["end"]))
    print(f"seed {seed}, {name}: {end['pictures']:,} pictures, validation R@1 {(ranks['validation'] == 0).mean():.3f}, "
          f"{end['minutes']:.1f} minutes", flush=True)
    return ranks, end


def run(options: argparse.Namespace) -> dict:
    """The whole experiment, as one dict."""
    dictionary = load_picture_dictionary()
    human = dictionary["train"]
    added, counts = drawings(dictionary)
    machine, quality = machine_captions(human)
    sets = {HUMAN: lambda: together(human), FILTERED: lambda: together(human, added[FILTERED]),
            UNFILTERED: lambda: together(human, added[UNFILTERED]), MACHINE: lambda: together(machine)}
    ranks: dict[str, dict[str, Ranks]] = {split: {name: [] for name in sets} for split in SPLITS}
    ends: dict = {name: [] for name in sets}
    for seed in range(options.seeds):
        for name, make in sets.items():
            found, end = trained(name, make, seed, options.steps, dictionary)
            ends[name].append(end)
            for split in SPLITS:
                ranks[split][name].append(found[split])
    figures = {split: {"queries": len(of[HUMAN][0]), "candidates": len(dictionary[split]),
                       **{name: recalls(of[name]) for name in sets},
                       "differences": {question: difference(of[first], of[second])
                                       for question, (first, second) in QUESTIONS.items()}}
               for split, of in ranks.items()}
    settings = {"steps": options.steps, "seeds": options.seeds, "optimizer": "muon",
                "fit": dataclasses.asdict(dataclasses.replace(MINI, steps=options.steps))}
    return {"settings": settings, "versions": versions(PACKAGES), "openclipart": counts, "machine captions": quality,
            "runs": ends, "text_to_image": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=paths.DATA / "added_pictures.json")
    parser.add_argument("--steps", type=int, default=540)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    report = rounded(run(options), 4)
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for split, figures in report["text_to_image"].items():
        for name in (HUMAN, FILTERED, UNFILTERED, MACHINE):
            print(f"{split:14} {name:34} {line(figures[name])}")
        for question, found in figures["differences"].items():
            print(f"{split:14} {question:34} {line(found)}")
    print(f"all figures in {options.out}")


if __name__ == "__main__":
    main()
