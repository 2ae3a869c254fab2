"""Distillation on the picture dictionary: an English teacher, and an Indonesian student that sees no pictures.

    python scripts/distill_dictionary.py    # about 37 minutes on 2 cores; writes data/distillation.json

A CLIP of the mini preset learns the English names and keywords of the training pictures. Its text tower then teaches a
new one the Indonesian of the same concepts, from sentence pairs only. The script measures how well each finds the
pictures of `validation` and `unseen_artist` by name: the teacher in English, the student in Indonesian, the teacher in
Indonesian (the case without a student), and a text tower like the student's that learned as many Indonesian captions
from the pictures, with the same frozen image tower.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset
from distillation import DistillConfig, Parallel, distill, parallel_features, with_text_tower
from flax import nnx

from clipid_utils import paths
from clipid_utils.data.batches.loader import Feed, PicturePairs, load_pairs
from clipid_utils.data.batches.prefetch import Steps
from clipid_utils.data.captions import flip_allowed, sample_caption
from clipid_utils.data.dictionary.build import load_picture_dictionary
from clipid_utils.files import usable_threads
from clipid_utils.inference.evaluate import PACKAGES, retrieval_both_ways, rounded
from clipid_utils.model.clip import HybridCLIP, TextEncoder
from clipid_utils.model.config import PRESETS
from clipid_utils.model.embed import embed_pixels
from clipid_utils.model.processor import CLIPProcessor, train_wordpiece
from clipid_utils.training.fit import FitConfig, fit
from clipid_utils.training.optimizers import adamw, muon
from clipid_utils.training.recipes import MINI, SOURCE_SIZE
from clipid_utils.versions import versions
from clipid_utils.wording import fill, group_phrase

SPLITS = ("validation", "unseen_artist")
# English templates, and Indonesian ones with the same meaning; the teacher learns the left side of each
TEMPLATES = [
    ("a picture of {name}", "gambar {counted}"), ("a photo of {name}", "foto {counted}"),
    ("an illustration of {name}", "ilustrasi {name}"), ("an icon of {name}", "ikon {name}"),
    ("a painting of {name}", "lukisan {counted}"), ("a cartoon picture of {name}", "gambar kartun {counted}"),
    ("this is {name}", "ini {counted}"), ("{name} on a white background", "{counted} berlatar putih"),
]
ENGLISH = tuple(english for english, _ in TEMPLATES)
TEACHER = dataclasses.replace(MINI, epochs=50, evaluate_every=10)
STUDENT = DistillConfig(epochs=20)
DIRECT = FitConfig(learning_rate=1e-3, weight_decay=0.01, caption_tokens=MINI.caption_tokens,
                   keep_patches=MINI.keep_patches, trainable=("text.*", "logit_scale"), log_every=20)


def english_pairs(rows: Dataset, size: int) -> PicturePairs:
    """A split's pictures with their English names and keywords; the group is a keyword, as in Indonesian."""
    pairs, names = load_pairs(rows, size), list(rows["name_en"])
    number = {name: i for i, name in enumerate(sorted({name.lower() for name in names}))}
    keywords = [list(dict.fromkeys([*words, group])) for words, group in zip(rows["keywords_en"], rows["group"],
                                                                           strict=True)]
    may_flip = [flip_allowed(*row) for row in zip(names, keywords, rows["has_text"], strict=True)]
    return dataclasses.replace(pairs, names=names, keywords=keywords, may_flip=np.array(may_flip),
                               concepts=np.array([number[name.lower()] for name in names], np.int32))


def english_feed(pairs: PicturePairs, processor: CLIPProcessor, config: FitConfig, seed: int) -> Feed:
    """Batches as those of `dictionary_feed` with `group_concepts`, with the English templates."""
    steps = len(pairs) // config.batch_size

    def make(step: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(step, steps)
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(pairs))
        order = order[np.argsort(rng.permutation(pairs.concepts.max() + 1)[pairs.concepts[order]], kind="stable")]
        rows = order[place * config.batch_size : (place + 1) * config.batch_size]
        rng = np.random.default_rng([seed, epoch, 1 + place])
        captions = [sample_caption(pairs.names[row], pairs.keywords[row], rng, pairs.groups[row], ENGLISH)
                    for row in rows]
        return {"images": pairs.images[rows], "concepts": pairs.concepts[rows], "may_flip": pairs.may_flip[rows],
                **processor.tokenize(captions, config.caption_tokens, mark_truncated=True)}

    return Feed(Steps(make, threads=usable_threads()), config.batch_size, steps)


def sentence_pairs(rows: Dataset, templates: int, seed: int) -> Iterator[tuple[str, str]]:
    """For each concept its name, the name with its group, its keywords, and the name in some of the templates.

    The keywords of the two languages correspond only as lists, not one by one.
    """
    rng, columns = np.random.default_rng([seed, 7]), ("name_en", "name_id", "keywords_en", "keywords_id", "group",
                                                      "group_id")
    concepts = {row[:2]: row for row in zip(*(rows[column] for column in columns), strict=True)}
    for english, indonesian, words_en, words_id, group, group_id in concepts.values():
        yield english, indonesian
        yield f"{english}, {group}", f"{indonesian}, {group_phrase(group_id)}"
        if words_en and words_id:
            yield ", ".join(words_en[:4]), ", ".join(words_id[:4])
        for place in rng.permutation(len(TEMPLATES))[:templates]:
            left, right = TEMPLATES[place]
            yield fill(left, english), fill(right, indonesian, group)


def new_processor(texts: list[str], vocabulary: int) -> CLIPProcessor:
    return CLIPProcessor(train_wordpiece(texts, vocabulary), PRESETS["mini"].vision.image_size, MINI.caption_tokens)


def text_tower(processor: CLIPProcessor, seed: int) -> TextEncoder:
    """A mini text tower with random weights for the processor's vocabulary."""
    mini = PRESETS["mini"]
    config = dataclasses.replace(mini.text, vocab_size=processor.tokenizer.get_vocab_size())
    return TextEncoder(config, mini.embed_dim, rngs=nnx.Rngs(seed))


def find(model: HybridCLIP, processor: CLIPProcessor, rows: Dataset, pixels: np.ndarray, names: str) -> dict:
    """Text to picture as `evaluate` measures it, with the names of a column as queries."""
    asked = {"concept": rows["concept"], "name_id": rows[names]}
    image_embeds = embed_pixels(model, processor.normalize(pixels))
    found = retrieval_both_ways(model, processor, asked, image_embeds)["text_to_image"]
    return {key: found[key] for key in ("R@1", "R@10", "queries", "candidates")}


def run(options: argparse.Namespace) -> dict:
    """The whole experiment, as one dict."""
    dictionary, seed, minutes, started = load_picture_dictionary(), options.seed, {}, time.time()

    def lap(name: str) -> None:
        nonlocal started
        minutes[name], started = round((time.time() - started) / 60, 1), time.time()

    train = dictionary["train"]
    if options.pictures:
        train = train.shuffle(seed=seed).select(range(options.pictures))
    size, sentences = PRESETS["mini"].vision.image_size, list(sentence_pairs(train, options.templates, seed))
    english, indonesian = (list(side) for side in zip(*sentences, strict=True))

    teacher_processor = new_processor(english, PRESETS["mini"].text.vocab_size)
    mini = dataclasses.replace(PRESETS["mini"], text=text_tower(teacher_processor, seed).config)
    teacher_config = dataclasses.replace(TEACHER, epochs=options.teacher_epochs)
    taught = fit(HybridCLIP(mini, rngs=nnx.Rngs(seed)), teacher_processor,
                 english_feed(english_pairs(train, SOURCE_SIZE), teacher_processor, teacher_config, seed),
                 english_pairs(dictionary["validation"], size), teacher_config, seed=seed, optimizer=muon)
    teacher = taught.model
    lap("teacher")

    processor = new_processor(english + indonesian, options.vocabulary)
    unseen = list(dict.fromkeys(zip(*(dictionary["unseen_concept"][name] for name in ("name_en", "name_id")),
                                    strict=True)))
    parallel: list[Parallel] = [parallel_features(teacher.text, teacher_processor, *zip(*pairs, strict=True))
                                for pairs in (sentences, unseen)]
    config = dataclasses.replace(STUDENT, epochs=options.epochs)
    student = distill(text_tower(processor, seed + 1), processor, *parallel, config, seed=seed)
    lap("student")

    steps = student.history[-1]["step"] * config.batch_size // DIRECT.batch_size
    direct_config = dataclasses.replace(DIRECT, steps=steps)
    direct = fit(with_text_tower(teacher, text_tower(processor, seed + 1)), processor, load_pairs(train, SOURCE_SIZE),
                 load_pairs(dictionary["validation"], size), direct_config, seed=seed, optimizer=adamw)
    lap("direct")

    asked = {"teacher, English": (teacher, teacher_processor, "name_en"),
             "student, Indonesian": (with_text_tower(teacher, student.student), processor, "name_id"),
             "teacher, Indonesian": (teacher, teacher_processor, "name_id"),
             "trained with pictures, Indonesian": (direct.model, processor, "name_id")}
    pixels = {split: load_pairs(dictionary[split], size).images for split in SPLITS}
    figures = {split: {name: find(model, own, dictionary[split], pixels[split], names)
                       for name, (model, own, names) in asked.items()} for split in SPLITS}
    lap("evaluation")
    settings = {"seed": seed, "teacher": dataclasses.asdict(teacher_config), "student": dataclasses.asdict(config),
                "direct": dataclasses.asdict(direct_config), "vocabulary": {
                    "teacher": teacher.config.text.vocab_size, "student": student.student.config.vocab_size}}
    data = {"pictures": len(train), "sentence_pairs": len(sentences), "held_out_pairs": len(unseen)}
    return {"settings": settings, "versions": versions(PACKAGES), "data": data, "minutes": minutes,
            "text_to_image": figures, "curve": [line for line in student.history if "R@1" in line],
            "teacher_curve": [line for line in taught.history if "text_to_picture_R@1" in line]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=paths.DATA / "distillation.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-epochs", type=int, default=TEACHER.epochs)
    parser.add_argument("--epochs", type=int, default=STUDENT.epochs, help="epochs of the distillation")
    parser.add_argument("--templates", type=int, default=4, help="sentences with a template for each concept")
    parser.add_argument("--vocabulary", type=int, default=6000, help="the student's size, both languages")
    parser.add_argument("--pictures", type=int, help="fewer pictures to train on, for a trial")
    options = parser.parse_args()
    report = rounded(run(options), 4)
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for split, figures in report["text_to_image"].items():
        for name, found in figures.items():
            print(f"{split:14} {name:34} " + "  ".join(
                f"{key} {found[key]['value']:.3f} [{found[key]['low']:.3f}, {found[key]['high']:.3f}]"
                for key in ("R@1", "R@10")))
    print(f"{sum(report['minutes'].values()):.1f} minutes, all figures in {options.out}")


if __name__ == "__main__":
    main()
