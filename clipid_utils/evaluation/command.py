"""The work of `clipid evaluate`: one model into its metrics.json, or several on tasks."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from clipid_utils.data.dictionary.build import load_picture_dictionary
from clipid_utils.evaluation.suite import as_table, evaluate_models, figure
from clipid_utils.files import write_json
from clipid_utils.inference.evaluate import evaluate_checkpoint
from clipid_utils.model.pretrained.hub import fetch_checkpoint
from clipid_utils.paths import CHECKPOINTS, IN_CLONE


def evaluate_several(models: Sequence[str], tasks: Sequence[str], out: Path | None) -> None:
    """Prints the table of all models and tasks, and writes `out` (evaluation.json) and the figure beside it.

    Raises ValueError for an `out` that is no .json, and the errors of `evaluate_models`.
    """
    out = out or Path("evaluation.json")
    if out.suffix != ".json":
        raise ValueError(f"{out}: name a file that ends in .json; the figure goes beside it")
    _check_writable(out)
    report = evaluate_models(models, tasks)
    print(as_table(report))
    write_json(out, report, indent=1)
    figure(report).savefig(out.with_suffix(".png"), dpi=150)
    print(f"all figures: {out}, and as a picture: {out.with_suffix('.png')}")


def evaluate_one(model: str, out: Path | None) -> None:
    """Measures a model on the picture dictionary and writes `out`, by default metrics.json in its folder.

    A shipped model of an installed package and a model of the hub are measured into metrics.json here.
    """
    folder = fetch_checkpoint(model)
    if out is None:
        is_own = IN_CLONE if folder.is_relative_to(CHECKPOINTS) else Path(model).expanduser().exists()
        out = (folder if is_own else Path()) / "metrics.json"
    _check_writable(out)
    report = evaluate_checkpoint(folder, load_picture_dictionary())
    print(json.dumps(report["retrieval"], indent=1))
    write_json(out, report, indent=1)
    print(f"all figures: {out}")


def _check_writable(out: Path) -> None:
    """Raises OSError if the file could not be written, before the minutes that measuring takes."""
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder: name a file with --out")
    nearest = next(folder for folder in out.absolute().parents if folder.exists())  # the folders below it are made
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file, not a folder: name a file elsewhere with --out")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"{nearest} cannot be written to: name a file elsewhere with --out")
