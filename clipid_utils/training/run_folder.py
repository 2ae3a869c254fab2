"""A run's folder: its log, its best weights, and the checkpoints from which it resumes."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from clipid_utils.data.batches.loader import PicturePairs
from clipid_utils.files import read_json
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.embed import embed_pictures, embed_texts
from clipid_utils.model.pretrained.load import load_clip
from clipid_utils.model.pretrained.save import save_clip
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.training.checkpoint import Checkpoints, differences
from clipid_utils.training.distributed import Placed
from clipid_utils.training.log import RunLog
from clipid_utils.training.processes import from_first
from clipid_utils.training.step import TrainState
from clipid_utils.training.validation import retrieval_grid, validation_recall

WEIGHTS = ("best", "last")  # subfolders with a model


class RunFolder:
    """The files of a run in `path`; None leaves nothing, and the log and the best model are in memory.

    Raises FileExistsError for a folder that has the model of an earlier run, if the caller does not say `resume` or
    `overwrite`, which deletes it; ValueError for a run that began with different settings.
    """

    def __init__(
        self, path: Path | None, settings: dict, processor: CLIPProcessor, dtype, *, keeps_states: bool = False,
        resume: bool = False, overwrite: bool = False, sinks: dict | None = None,
        score: Callable[[HybridCLIP], float] | None = None,
    ):
        self.score = score
        self.path, self.processor, self.dtype = None if path is None else Path(path), processor, dtype
        self.best: HybridCLIP | None = None
        self.best_recall = -math.inf
        self.keeps_states = self.path is not None and keeps_states
        if self.path is not None and overwrite and not resume:
            self._delete_old()
        self.states = None
        if self.keeps_states or self.path is not None and (self.path / "checkpoints").is_dir():
            self.states = Checkpoints(self.path / "checkpoints")
        self.start = None if self.states is None else self.states.latest()
        if self.path is not None:
            self._check_old(settings, resume)
        self.lines = RunLog(self.path, settings, resume_step=self.start, **(sinks or {}))

    def _delete_old(self) -> None:
        if jax.process_index() == 0:
            for name in (*WEIGHTS, "checkpoints", "samples"):
                shutil.rmtree(self.path / name, ignore_errors=True)
        from_first(None)  # the others wait

    def _check_old(self, settings: dict, resume: bool) -> None:
        """Raises an error if this run would destroy an older one, or continue it with different settings."""
        if self.start is not None:
            if not resume:
                raise FileExistsError(f"{self.path} has a run at step {self.start}: continue it (resume=True, "
                                      "--resume), replace it (overwrite=True), or use a different folder")
            return check_same(self.path / "fit.json", settings)
        found = from_first([name for name in WEIGHTS if (self.path / name).is_dir()])
        if found and not (resume and self.keeps_states):  # else it was stopped before its first checkpoint
            raise FileExistsError(f"{self.path} has a trained model ({', '.join(found)}) and no checkpoint to resume "
                                  "from: replace it (overwrite=True), or use a different folder")

    def close(self) -> None:
        """Waits until everything is written."""
        try:
            self.lines.close()
        finally:
            if self.states is not None:
                self.states.close()

    @property
    def kept(self) -> str:
        """Where to continue after a failure, in words."""
        best = self.path is not None and self.best is not None
        step = None if self.states is None else self.states.latest()
        if step is not None:
            where = f", from the weights in {self.path / 'best'}" if best else ""
            return f"{self.path} resumes from step {step}, with the same settings only: start in a new folder{where}"
        return f"the best weights before it are in {self.path / 'best'}" if best else "nothing was saved before it"

    def save_weights(self, name: str, model: HybridCLIP) -> None:
        if self.path is not None and jax.process_index() == 0:
            save_clip(model, self.processor, self.path / name)

    def save_state(self, placed: Placed, state: TrainState, data: Iterator, progress: dict) -> None:
        """Saves everything that the run needs to resume from here."""
        extra = progress | {"best_recall": self.best_recall if self.best else None}
        self.states.save(progress["step"], placed.pack(state), data=data, extra=extra)

    def restore(self, placed: Placed, state: TrainState, data: Iterator) -> tuple[TrainState, dict]:
        """The state of the last checkpoint, and `progress` as it was saved; sets `data` to where it was."""
        state, progress = self.states.restore(placed.pack(state), data=data)
        if progress["best_recall"] is not None:
            self.best_recall = progress["best_recall"]
            self.best = load_clip(self.path / "best", dtype=self.dtype)[0]
        return placed.unpack(state), progress

    def evaluate(
        self, validation: PicturePairs | None, samples: Sequence[str], model: HybridCLIP, line: dict
    ) -> None:
        """Logs the validation recall, and keeps `model` if text to picture R@1 is the best so far (ties: the later).

        With a `score` that is logged, and `model` is kept if it is the best (ties: the earlier). The first process
        measures, and tells the others.
        """
        recall, figure = {}, None
        if self.score is not None and jax.process_index() == 0:
            recall = {"score": self.score(model)}
        elif validation is not None and jax.process_index() == 0:
            embeds = embed_pictures(model, self.processor, validation.images, progress=False)[0]
            recall = validation_recall(model, self.processor, validation, embeds)
            if samples and self.path is not None:
                similarity = embed_texts(model, self.processor, samples) @ embeds.T
                figure = retrieval_grid(similarity, validation, samples)
        line = {**line, **from_first(recall)}
        if line not in self.lines.history:  # a run that was killed before its next checkpoint has logged it already
            self.lines.log(line)
        if figure is not None:
            self.lines.picture(figure, line["step"])
        first = line.get("score", line.get("text_to_picture_R@1", self.best_recall))
        if first > self.best_recall or first == self.best_recall and self.score is None:
            self.keep(model, first)

    def keep(self, model: HybridCLIP, recall: float) -> None:
        """Makes a model the best one."""
        self.best_recall, self.best = recall, model
        self.save_weights("best", model)


def check_same(path: Path, settings: dict) -> None:
    """Raises ValueError if a run is to resume with settings that differ from those in `path`."""
    settings, began = json.loads(json.dumps(settings)), read_json(path)
    changed = "; ".join(differences({name: began.get(name) for name in settings}, settings))
    if changed:
        raise ValueError(f"{path} began with {changed}: resume with the same settings, or use a different folder")
