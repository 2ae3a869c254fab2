"""Where the lines of a run go: its folder, and TensorBoard or Weights & Biases if they are asked for."""

import json
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from PIL import Image

import clipid_utils
from clipid_utils.files import json_lines, need, read_json, write_json, write_json_lines
from clipid_utils.versions import commit, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def environment() -> dict:
    """The environment of a run: versions, commit, devices and the command line, as in versions.json."""
    devices = jax.devices()
    return {
        **versions(PACKAGES), "clipid_utils": clipid_utils.__version__, "commit": commit(),
        "platform": devices[0].platform, "device_kind": devices[0].device_kind, "devices": len(devices),
        "processes": jax.process_count(), "command": sys.argv,
    }


def read_lines(path: Path, until: int | None = None) -> list[dict]:
    """The lines of a metrics.jsonl up to step `until`; a last line that is only half written is left out.

    Any other line that is not JSON raises ValueError with its number. A missing file has no lines.
    """
    found = list(json_lines(path)) if path.is_file() else []
    for number, _, problem in found[:-1]:
        if problem:
            raise ValueError(f"{path}:{number}: {problem}, or delete the line")
    return [line for _, line, problem in found if not problem and (until is None or line["step"] <= until)]


class RunLog:
    """The lines and pictures of a run: in memory (`history`) and, if there is a folder, on disk and in other places.

    The folder gets `fit.json` (the config), `versions.json`, `metrics.jsonl` and `samples/`, and `tensorboard/` with
    `tensorboard=True`; `wandb` is the name of a Weights & Biases project. With `resume_step`, lines after that step
    are deleted, and new ones follow; without it, all old lines are deleted. Nothing else in the folder is touched. If
    there are several processes, only the first writes; all of them have the history.
    """

    def __init__(
        self, folder: Path | None, config: dict, *, tensorboard: bool = False, wandb: str | None = None,
        resume_step: int | None = None,
    ):  # fmt: skip
        if folder is None and (tensorboard or wandb):
            raise ValueError("TensorBoard and Weights & Biases need a folder for the run: set out=")
        self.history: list[dict] = []
        if folder is not None and resume_step is not None:
            self.history = read_lines(Path(folder) / "metrics.jsonl", resume_step)
        self.folder = None if folder is None or jax.process_index() else Path(folder)
        self.tensorboard = self.wandb = None
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "fit.json", config)
        write_json_lines(self.folder / "metrics.jsonl", self.history)
        self._write_versions(resume_step)
        if tensorboard:
            self.tensorboard = _tensorboard(self.folder, 0 if resume_step is None else resume_step + 1)
        if wandb:
            self.wandb = _wandb(self.folder, wandb, config, resume_step is not None)

    def _write_versions(self, resume_step: int | None) -> None:
        """A run that resumes on a different machine keeps, under "before", what its first steps ran on."""
        path, now = self.folder / "versions.json", environment()
        if resume_step is not None and path.is_file():
            old = read_json(path)
            now["before"] = [*old.pop("before", []), {"until_step": resume_step, **old}]
        write_json(path, now)

    def log(self, line: dict) -> None:
        """Logs a line, which has a "step"; numbers become curves."""
        self.history.append(line)
        if self.folder is None:
            return
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.tensorboard is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self.tensorboard.add_scalar(name, value, line["step"])
        if self.wandb is not None:
            self.wandb.log(line)

    def picture(self, figure: "Figure", step: int) -> None:
        """Writes a figure as samples/step_000123.png; elsewhere its name is "retrieval"."""
        if self.folder is None:
            return
        path = self.folder / "samples" / f"step_{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
        if self.tensorboard is not None:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            self.tensorboard.add_image("retrieval", pixels, step, dataformats="HWC")
        if self.wandb is not None:
            self.wandb.log({"step": step, "retrieval": sys.modules["wandb"].Image(str(path))})

    def close(self) -> None:
        """Sends what TensorBoard and Weights & Biases have not written yet; the files are whole at all times."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def _tensorboard(folder: Path, first_step: int):
    """A writer that hides what older runs in the same folder wrote from `first_step` on."""
    # The suffix gives different names to two files that start in the same second
    return need("tensorboardX", "train").SummaryWriter(str(folder / "tensorboard"), purge_step=first_step,
                                                       filename_suffix=f".{first_step}")


def _wandb(folder: Path, project: str, config: dict, resume: bool):
    """The run of Weights & Biases whose name is in the folder's wandb_id.txt, or a new one.

    Its own counter only grows, and would refuse the steps that a resumed run repeats. So the curves are drawn over the
    logged "step".
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError("Weights & Biases is not installed: pip install wandb, then wandb login") from error
    file = folder / "wandb_id.txt"
    if not (resume and file.is_file()):
        file.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
    name = file.read_text(encoding="utf-8").strip()
    run = wandb.init(project=project, id=name, resume="allow", dir=str(folder), config=config)
    run.define_metric("*", step_metric="step")
    return run
