"""A checkpoint's model card: what it is, what it is for, how it was measured, and what it gets wrong.

    write_model_card("data/checkpoints/mini", license="apache-2.0")   # README.md, as the Hugging Face hub reads it

Every number is taken from the files of the folder: `config.json`, `metrics.json` (by `evaluate`), `recipe.json` and
`fit.json` (by the training). What they do not hold the card says is unknown. Words about the data are written here for
the one recipe whose data this project knows, and come from the caller for any other.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from clipid_utils.model.pretrained.processor_files import MODEL_TYPE

DATASET = ("picture-dictionary", "The picture dictionary (kamus bergambar)")  # all that `evaluate` measures on
LIBRARIES = {"vision-text-dual-encoder": "transformers"}  # who opens the folder, by config.json's model_type
TASKS = {"text_to_image": "Picture search by an Indonesian text", "image_to_text": "Indonesian name of a picture"}
ZERO_SHOT = {"group": "which group", "concept_within_group": "which concept of its group"}
SPLITS = {  # by the dictionary's `train`, which not every model was trained on
    "validation": "drawings of concepts and by artists that `train` has too; for making choices on",
    "unseen_artist": "concepts that `train` has, drawn by an artist that it lacks",
    "unseen_concept": "drawings of concepts that `train` lacks",
    "photographs": "photographs, which `train` lacks",
}

USE = """\
```python
import clipid_utils
from PIL import Image

model, processor = clipid_utils.load_clip("{path}")  # the folder, or its id on the hub
batch = processor(images=[Image.open("gambar.png")], text=["seekor kucing", "sebuah mobil"])
model(**batch).logits_per_image
```"""

INTENDED = """\
Teaching and trying out: searching a collection of pictures with Indonesian words, sorting pictures into classes that
Indonesian sentences name, comparing one's own training with this one. Measure it on your own pictures and words before
you rely on it.

Not intended: recognising or describing people, their identity, gender, age, origin, health or feelings; surveillance;
deciding anything about a person; moderating content; anything where a wrong picture harms someone. Other languages than
Indonesian were not measured."""

ANY_BIAS = """\
- **Language.** Write as the training captions do. Formal and colloquial Indonesian (*tidak*, *gak*), regional words,
  spelling mistakes and English loans are not told apart by the measurement above: no figure says how much is lost.
- **Words more than grammar.** CLIPs are known to lose negation, number, left and right, and who does what to whom.
  Nothing here measures it.
- **Always an answer.** Whatever is asked, some picture comes first. A similarity is no probability: on other pictures
  the same value means something else."""

# What is said of training by the recipe's name, as recipe.json has it: the data, and the limits that come of it.
RECIPES = {"mini": ("""\
The `train` split of the picture dictionary: emoji as OpenMoji and Twemoji draw them and, where Debian's packages were
at hand, as EmojiOne does, and Tux Paint's drawn stamps; each with the Indonesian name and keywords that people wrote
(Unicode CLDR, Tux Paint's translators). Nothing is machine translated. The pictures' licences are CC BY-SA (OpenMoji,
EmojiOne), CC BY (Twemoji) and GPL (Tux Paint), the words' the Unicode License. Versions, credits and known faults stand
in the dataset card, `data/README.md` of the project's repository.""", """\
- **Drawings, not photographs.** It knows emoji and clip art on white, and little else of the world.
- **The words of dictionaries.** Names and keywords are standard Indonesian, mostly short nouns and noun phrases.
  Colloquial words, whole descriptions, and what no caption held seldom find their pictures.
- **The world of emoji.** Much food and custom of Japan and the United States, little of Indonesia; many flags.
- **People.** They are sorted as Unicode sorts them: names say *pria* (man) and *wanita* (woman) of what is a haircut in
  the drawing, families and professions come in its pairs, and skin-tone variants were left out, so that people are
  nearly all yellow. The model repeats all of it and is not to be used on pictures of people.
- **Wrong captions.** Some of the stamps' names are wrong or English, and were left as they are.""")}
UNKNOWN_DATA = "What it was trained on is not recorded beside it, so its biases cannot be named here."


def write_model_card(
    folder: str | os.PathLike, *, name: str | None = None, license: str | None = None,
    base_model: Sequence[str] = (), datasets: Sequence[str] = (), training_data: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes `README.md` into a checkpoint folder, from the files that lie there, and returns its path.

    `name` is the folder's where none is given; the others are as in `model_card`. FileExistsError where a README.md is
    there already, unless `overwrite`; FileNotFoundError without config.json; ValueError for a file that is no JSON.
    """
    folder = Path(folder)
    found = {part: _read(folder / f"{part}.json") for part in ("config", "metrics", "recipe", "fit")}
    if found["config"] is None:
        raise FileNotFoundError(f"{folder / 'config.json'} not found: give write_model_card a checkpoint folder")
    card = folder / "README.md"
    if card.exists() and not overwrite:
        raise FileExistsError(f"{card} is there already: keep it, or write it anew with overwrite=True")
    text = model_card(
        name or folder.resolve().name, **found, license=license, base_model=base_model, datasets=datasets,
        training_data=training_data,
    )
    card.write_text(text, encoding="utf-8")
    return card


def model_card(
    name: str, config: Mapping, metrics: Mapping | None = None, recipe: Mapping | None = None,
    fit: Mapping | None = None, *, license: str | None = None, base_model: Sequence[str] = (),
    datasets: Sequence[str] = (), training_data: str | None = None,
) -> str:
    """The card as Markdown, with the front matter that the Hugging Face hub reads.

    `config`, `metrics`, `recipe` and `fit` are what the files of those names hold. `license` is the hub's word for it
    ("apache-2.0"), `base_model` and `datasets` are ids on the hub, and `training_data` is a paragraph on the data, for
    a model that is not of a recipe in `RECIPES`. Raises ValueError for metrics that `evaluate` has not written.
    """
    _check(metrics)
    results = list(_results(metrics)) if metrics else []
    data = ModelCardData(
        language="id", license=license, base_model=list(base_model) or None, datasets=list(datasets) or None,
        library_name=LIBRARIES.get(config.get("model_type"), MODEL_TYPE),
        pipeline_tag="zero-shot-image-classification", tags=["clip", "indonesian", "image-text-retrieval", "jax"],
        model_name=name, eval_results=results or None,
    )
    if not results:
        data.pop("model_name")  # the hub knows it only inside the results
    known_data, known_bias = RECIPES.get((recipe or {}).get("recipe"), (None, None))
    sections = {
        "Use": USE.format(path=name),
        "Intended use": INTENDED,
        "Training": "\n\n".join([training_data or known_data or UNKNOWN_DATA, *_training(base_model, recipe, fit)]),
        "Results": _results_text(metrics),
        "Limits and bias": "\n".join([*_measured_limits(metrics), *([known_bias] if known_bias else []), ANY_BIAS]),
        "Licence": f"The weights: {license}." if license else "None is stated. Ask the author before you use it.",
    }
    body = "\n\n".join([f"# {name}", _summary(config), *(f"## {title}\n\n{text}" for title, text in sections.items())])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _summary(config: Mapping) -> str:
    text = ("A CLIP for Bahasa Indonesia: an image tower and a text tower whose outputs can be compared, so that "
            "Indonesian words find pictures and pictures their words.")
    if config.get("model_type") != MODEL_TYPE:
        return text + " The towers' sizes are in `config.json`."
    vision, words = config["vision"], config["text"]
    return (f"{text} The image tower is a ViT of {vision['layers']} layers of width {vision['width']} on patches of "
            f"{vision['patch_size']} px at {vision['image_size']} px, the text tower has {words['layers']} layers of "
            f"width {words['width']}, and both end in {config['embed_dim']} dimensions.")


def _training(base_model: Sequence[str], recipe: Mapping | None, fit: Mapping | None) -> Iterator[str]:
    if base_model:
        yield f"It began as {' and '.join(base_model)}, and has their biases too."
    rows = [(key, value) for values in (recipe, fit) for key, value in (values or {}).items()
            if not isinstance(value, Mapping)]
    if rows:
        yield _table(("what", "value"), rows)
    if fit and any(isinstance(value, Mapping) for value in fit.values()):
        yield "The augmentation is in `fit.json`."


def _results(metrics: Mapping) -> Iterator[EvalResult]:
    """What the hub shows beside the card: retrieval both ways and zero-shot accuracy, of each split."""
    for split, row in _measured(metrics):
        common = {"dataset_type": DATASET[0], "dataset_name": DATASET[1], "dataset_split": split,
                  "dataset_revision": row.get("sha256")}
        for way, task in TASKS.items():
            summary = metrics["retrieval"][split][way]
            for metric in ("R@1", "R@5", "R@10", "MRR@10"):
                kind = metric.replace("MRR@", "mrr_at_").replace("R@", "recall_at_")
                yield EvalResult(task_type=f"{way.replace('_', '-')}-retrieval", task_name=task, metric_type=kind,
                                 metric_name=metric, metric_value=summary[metric]["value"], **common)
        for classes, task in ZERO_SHOT.items():
            accuracy = metrics["zero_shot"][split][classes]["templates"]["top1"]
            yield EvalResult(task_type="zero-shot-image-classification", task_name="Zero-shot classification",
                             metric_type="accuracy", metric_name=f"Top-1, {task}", metric_value=accuracy["value"],
                             **common)


def _results_text(metrics: Mapping | None) -> str:
    if not metrics:
        return ("Nothing was measured: there is no `metrics.json` beside this checkpoint. "
                "`python -m clipid_utils evaluate` writes it.")
    measured = list(_measured(metrics))
    retrieval, accuracy = metrics["retrieval"], metrics["zero_shot"]
    parts = ["On the picture dictionary; in brackets the 95% interval of a bootstrap over the queries."]
    parts.append(_table(("split", "pictures", "what it is"), [
        (split, row["pictures"] or "none: not measured", SPLITS.get(split, ""))
        for split, row in metrics["data"].items()]))
    for way, task in TASKS.items():
        parts.append(f"{task} (`{way}`):")
        parts.append(_table(("split", "queries", "candidates", "R@1", "R@10", "MRR@10"), [
            (split, retrieval[split][way]["queries"], retrieval[split][way]["candidates"],
             *(_interval(retrieval[split][way][metric]) for metric in ("R@1", "R@10", "MRR@10")))
            for split, _ in measured]))
    parts.append("Zero-shot, top-1, with Indonesian sentence templates:")
    parts.append(_table(("split", *ZERO_SHOT.values()), [
        (split, *(_interval(accuracy[split][classes]["templates"]["top1"]) for classes in ZERO_SHOT))
        for split, _ in measured]))
    if pixels := metrics.get("pixel_nearest_neighbour"):
        parts.append("For comparison, picture to picture by the nearest in plain pixels, without a model "
                     f"(`unseen_artist` among `train`): R@1 {_interval(pixels['R@1'])}.")
    checkpoint, versions = metrics["checkpoint"], metrics["versions"]
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    parts.append(f"Measured on the weights with fingerprint `{checkpoint['fingerprint']}`, seed {metrics['seed']}, "
                 f"with {packages}.")
    return "\n\n".join(parts)


def _measured_limits(metrics: Mapping | None) -> Iterator[str]:
    """Those that the figures themselves show."""
    if not metrics:
        yield "- **Unmeasured.** No figure says how good or how skewed this checkpoint is."
        return
    first = {split: metrics["retrieval"][split]["text_to_image"]["R@1"] for split, _ in _measured(metrics)}
    if "photographs" not in first:
        yield "- **Photographs** were not measured."
    shown = [f"{_interval(first[split])} on `{split}`" for split in SPLITS if split in first and split != "validation"]
    if shown:
        yield f"- **How far it carries.** The right picture comes first for this share of texts: {', '.join(shown)}."


def _check(metrics: Mapping | None) -> None:
    if metrics and (lacking := {"checkpoint", "seed", "versions", "data", "retrieval", "zero_shot"} - metrics.keys()):
        raise ValueError(f"the metrics have no {', '.join(sorted(lacking))}: `python -m clipid_utils evaluate` writes "
                         "those that a model card is made from")


def _measured(metrics: Mapping) -> list[tuple[str, Mapping]]:
    """The splits that had pictures."""
    return [(split, row) for split, row in metrics["data"].items() if row["pictures"]]


def _interval(figure: Mapping) -> str:
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _table(head: Sequence, rows: Sequence[Sequence]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _read(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): write it again, or remove it") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} cannot be read (it holds no object): write it again, or remove it")
    return values
