"""Writes a checkpoint's model card: its purpose, its training, its figures and its limits.

    write_model_card("data/checkpoints/mini", license="apache-2.0")   # README.md, as the Hugging Face hub reads it

Every number comes from the folder's files: `config.json`, `metrics.json` (written by `clipid evaluate`), `recipe.json`
and `fit.json` (written by the training). The text is in `card_template.md`. Words about the data are there for the
project's own recipe; for other data they come from the caller.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from clipid_utils.files import need, whole_file
from clipid_utils.model.pretrained.processor_files import MODEL_TYPE, read_json

TEMPLATE = Path(__file__).with_name("card_template.md")
DATASET = ("picture-dictionary", "The picture dictionary (kamus bergambar)")  # all that `evaluate` measures on
TASKS = {"text_to_image": "Picture search by an Indonesian text", "image_to_text": "Indonesian name of a picture"}
ZERO_SHOT = {"group": "group", "concept_within_group": "concept within its group"}
SPLITS = {  # of the dictionary; a model may be trained on other data than its `train`
    "validation": "drawings of concepts and by artists that `train` has too; used to make choices",
    "unseen_artist": "concepts that `train` has, drawn by an artist that it lacks",
    "unseen_concept": "drawings of concepts that `train` lacks",
    "photographs": "photographs, which `train` lacks",
}


def write_model_card(
    folder: str | os.PathLike, *, name: str | None = None, license: str | None = None, base_model: Sequence[str] = (),
    training_data: str | None = None, overwrite: bool = False,
) -> Path:
    """Writes `README.md`, with the front matter that the Hugging Face hub reads, into a checkpoint folder.

    `name` is the folder's by default, `license` the hub's word for it ("apache-2.0"), and `base_model` ids on the hub.
    `training_data` is a paragraph about the data, for a model that the project's recipe did not train. Returns the
    path. Raises FileExistsError if README.md exists and `overwrite` is False, FileNotFoundError without config.json,
    and ValueError for a file that is not JSON, or for metrics without the keys that `clipid evaluate` writes.
    """
    folder = Path(folder).expanduser()
    files = ("config", "metrics", "recipe", "fit")
    config, metrics, recipe, fit = (read_json(folder / f"{file}.json") for file in files)
    if not config:
        raise FileNotFoundError(f"{folder / 'config.json'} not found: give write_model_card a checkpoint folder")
    if metrics and (lacking := {"checkpoint", "seed", "versions", "data", "retrieval", "zero_shot"} - metrics.keys()):
        raise ValueError(f"{folder / 'metrics.json'} has no {', '.join(sorted(lacking))}: `clipid evaluate` writes it")
    card, name = folder / "README.md", name or folder.resolve().name
    if card.exists() and not overwrite:
        raise FileExistsError(f"{card} exists: keep it, or replace it with overwrite=True")
    need("jinja2", "train")
    measured = [split for split, row in metrics.get("data", {}).items() if row["pictures"]]
    results = list(_results(metrics, measured))
    data = ModelCardData(
        language="id", license=license, base_model=list(base_model) or None,
        library_name=MODEL_TYPE if config.get("model_type") == MODEL_TYPE else "transformers",
        pipeline_tag="zero-shot-image-classification", tags=["clip", "indonesian", "image-text-retrieval", "jax"],
        model_name=name if results else None, eval_results=results or None,  # the name is only inside the results
    )
    settings = [(key, value) for values in (recipe, fit) for key, value in values.items()
                if not isinstance(value, Mapping)]
    text = ModelCard.from_template(
        data, str(TEMPLATE), name=name, config=config, metrics=metrics, measured=measured, recipe=recipe,
        settings=settings, more_in_fit=any(isinstance(value, Mapping) for value in fit.values()),
        base_models=list(base_model), training_data=training_data, licence=license, splits=SPLITS, tasks=TASKS,
        zero_shot=ZERO_SHOT,
    )
    with whole_file(card) as file:
        file.write(str(text).encode())
    return card


def _results(metrics: Mapping, measured: Sequence[str]) -> Iterator[EvalResult]:
    """The figures that the hub shows beside the card: retrieval both ways and zero-shot accuracy, of each split."""
    for split in measured:
        common = {"dataset_type": DATASET[0], "dataset_name": DATASET[1], "dataset_split": split,
                  "dataset_revision": metrics["data"][split].get("sha256")}
        for way, task in TASKS.items():
            for metric in ("R@1", "R@5", "R@10", "MRR@10"):
                kind = metric.replace("MRR@", "mrr_at_").replace("R@", "recall_at_")
                yield EvalResult(task_type=f"{way.replace('_', '-')}-retrieval", task_name=task, metric_type=kind,
                                 metric_name=metric, metric_value=metrics["retrieval"][split][way][metric]["value"],
                                 **common)
        for classes, task in ZERO_SHOT.items():
            accuracy = metrics["zero_shot"][split][classes]["templates"]["top1"]
            yield EvalResult(task_type="zero-shot-image-classification", task_name="Zero-shot classification",
                             metric_type="accuracy", metric_name=f"Top-1, {task}", metric_value=accuracy["value"],
                             **common)
