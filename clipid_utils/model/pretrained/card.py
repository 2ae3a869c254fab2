"""Writes a checkpoint's model card: its purpose, its training, its figures and its limits.

    write_model_card("data/checkpoints/mini", license="apache-2.0")   # README.md, as the Hugging Face hub reads it

Every number comes from the folder's files: `config.json`, `metrics.json` (written by `clipid evaluate`), `recipe.json`
and `fit.json` (written by the training). The text is in `card_template.md`. It describes the data of the project's own
recipe; for other data the caller gives the description.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from clipid_utils.files import whole_file
from clipid_utils.model.pretrained.processor_files import MODEL_TYPE, read_json

TEMPLATE = Path(__file__).with_name("card_template.md")


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
    measured = [split for split, row in metrics.get("data", {}).items() if row["pictures"]]
    data = ModelCardData(
        language="id", license=license, base_model=list(base_model) or None,
        library_name=MODEL_TYPE if config.get("model_type") == MODEL_TYPE else "transformers",
        pipeline_tag="zero-shot-image-classification", tags=["clip", "indonesian", "image-text-retrieval", "jax"],
    )
    settings = [(key, value) for values in (recipe, fit) for key, value in values.items()
                if not isinstance(value, Mapping)]
    text = ModelCard.from_template(
        data, str(TEMPLATE), name=name, config=config, metrics=metrics, measured=measured, recipe=recipe,
        settings=settings, more_in_fit=any(isinstance(value, Mapping) for value in fit.values()),
        base_models=list(base_model), training_data=training_data, licence=license,
    )
    with whole_file(card) as file:
        file.write(str(text).encode())
    return card
