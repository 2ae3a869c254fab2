"""Where the lines of a run go: its folder, and TensorBoard or Weights & Biases where asked."""

import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Float
from PIL import Image

import clipid_utils
from clipid_utils.data.batches.loader import PicturePairs
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.embed import embed_pixels, embed_texts
from clipid_utils.model.processor import CLIPProcessor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The clone's commit, with -dirty where files differ from it; None outside a clone or without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def versions() -> dict:
    """What a run ran on: versions, commit, devices and the command line, as versions.json holds them."""
    devices = jax.devices()
    return {
        "python": platform.python_version(), **{name: _version(name) for name in PACKAGES},
        "clipid_utils": clipid_utils.__version__, "commit": _commit(), "platform": devices[0].platform,
        "device_kind": devices[0].device_kind, "devices": len(devices), "processes": jax.process_count(),
        "command": sys.argv,
    }  # fmt: skip


def read_lines(path: Path, until: int | None = None) -> list[dict]:
    """The lines of a metrics.jsonl, up to step `until`; a last line that was only half written is left out.

    Raises ValueError, with its number, for any other line that is no JSON. No file is no lines.
    """
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(f"{path}:{number}: no JSON ({error}): mend or remove this line") from error
    return [line for line in lines if until is None or line["step"] <= until]


def _replace(path: Path, text: str) -> None:
    """Writes a file so that it is always whole: another process reads the old one or the new one."""
    whole = path.with_name(path.name + ".part")
    whole.write_text(text, encoding="utf-8")
    os.replace(whole, path)


class RunLog:
    """The lines and pictures of a run, in memory (`history`) and, where there is a folder, on disk and in other places.

    The folder gets `fit.json` (the config), `versions.json`, `metrics.jsonl` and `samples/`, and `tensorboard/` with
    `tensorboard=True`; `wandb` is the name of a Weights & Biases project. With `resume_step` the lines and samples up
    to that step stay, later ones go, and all goes on from there; without it the folder's old lines and samples go.
    Nothing else in the folder is touched. Of several processes only the first writes; every one has the history.
    """

    def __init__(
        self, folder: Path | None, config: dict, *, tensorboard: bool = False, wandb: str | None = None,
        resume_step: int | None = None,
    ):  # fmt: skip
        if folder is None and (tensorboard or wandb):
            raise ValueError("TensorBoard and Weights & Biases need the run's folder: give out=")
        self.history: list[dict] = []
        if folder is not None and resume_step is not None:
            self.history = read_lines(Path(folder) / "metrics.jsonl", resume_step)
        self.folder = None if folder is None or jax.process_index() else Path(folder)
        self.tensorboard = self.wandb = None
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self.folder / "fit.json", json.dumps(config, indent=2) + "\n")
        _replace(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.history))
        self._write_versions(resume_step)
        for path in (self.folder / "samples").glob("step_*.png"):
            if resume_step is None or int(path.stem.removeprefix("step_")) > resume_step:
                path.unlink()
        if tensorboard:
            self.tensorboard = _tensorboard(self.folder, 0 if resume_step is None else resume_step + 1)
        if wandb:
            self.wandb = _wandb(self.folder, wandb, config, resume_step is not None)

    def _write_versions(self, resume_step: int | None) -> None:
        """A run that went on elsewhere keeps, under "before", what its first steps ran on."""
        path, now = self.folder / "versions.json", versions()
        if resume_step is not None and path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            now["before"] = [*old.pop("before", []), {"until_step": resume_step, **old}]
        _replace(path, json.dumps(now, indent=2) + "\n")

    def log(self, line: dict) -> None:
        """One line, which has a "step": numbers become curves, texts (an alarm) notes."""
        self.history.append(line)
        if self.folder is None:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.tensorboard is not None:
            for name, value in line.items():
                if isinstance(value, str):
                    self.tensorboard.add_text(name, value, line["step"])
                elif name != "step" and isinstance(value, int | float):
                    self.tensorboard.add_scalar(name, value, line["step"])
        if self.wandb is not None:
            self.wandb.log(line)

    def picture(self, name: str, picture: "Figure | np.ndarray", step: int) -> None:
        """A figure, or an array uint8 [H, W, 3], as samples/step_000123.png; elsewhere it is called `name`."""
        if self.folder is None:
            return
        path = self.folder / "samples" / f"step_{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        if not isinstance(picture, np.ndarray):
            file = io.BytesIO()
            picture.savefig(file, format="png")
            picture = np.asarray(Image.open(file).convert("RGB"))
        Image.fromarray(picture).save(path)
        if self.tensorboard is not None:
            self.tensorboard.add_image(name, picture, step, dataformats="HWC")
        if self.wandb is not None:
            self.wandb.log({"step": step, name: sys.modules["wandb"].Image(str(path))})

    def close(self) -> None:
        """Hands over what TensorBoard and Weights & Biases still hold back; the files are whole at all times."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _tensorboard(folder: Path, first_step: int):
    """A writer that hides what older runs in the same folder wrote from `first_step` on."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard files need tensorboardX: pip install tensorboardX") from error
    # The suffix keeps two files apart that start in the same second
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step, filename_suffix=f".{first_step}")


def _wandb(folder: Path, project: str, config: dict, resume: bool):
    """The run of Weights & Biases whose name stands in the folder's wandb_id.txt, or a new one.

    Its own counter only ever grows, and would refuse the steps that a resumed run takes again: the curves are drawn
    over the logged "step" instead.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError("Weights & Biases is not installed: pip install wandb, then wandb login") from error
    file = folder / "wandb_id.txt"
    if not (resume and file.is_file()):
        _replace(file, uuid.uuid4().hex + "\n")
    name = file.read_text(encoding="utf-8").strip()
    run = wandb.init(project=project, id=name, resume="allow", dir=str(folder), config=config)
    run.define_metric("*", step_metric="step")
    return run


def retrieval_sample(
    model: HybridCLIP, processor: CLIPProcessor, pairs: PicturePairs, queries: Sequence[str], k: int = 5
) -> "Figure":
    """What the model finds for each query among the pictures of `pairs`, which have its size, as `retrieval_grid`."""
    pixels = embed_pixels(model, processor.normalize(pairs.images))
    return retrieval_grid(embed_texts(model, processor, queries) @ pixels.T, pairs, queries, k)


def retrieval_grid(
    similarity: Float[np.ndarray, "Q N"], pairs: PicturePairs, queries: Sequence[str], k: int = 5
) -> "Figure":
    """The k best pictures of each query, a row a query; those whose name the query is are framed as right."""
    from clipid_utils.plots import search_grid

    k = min(k, len(pairs))
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    right = [pairs.names[i].lower() == query.lower() for query, row in zip(queries, best, strict=True) for i in row]
    scores = np.take_along_axis(similarity, best, axis=1).ravel()
    names = [pairs.names[i] for i in best.ravel()]
    figure = search_grid("", list(pairs.images[best.ravel()]), scores, names, right, columns=k)
    for row, query in enumerate(queries):
        figure.axes[row * k].set_ylabel(textwrap.fill(query, 18), fontsize=9)
    return figure
