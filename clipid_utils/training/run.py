"""A run of training from outside: its folder, its clock, and how it is stopped."""

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from clipid_utils import metrics as scores
from clipid_utils.data.batches.loader import PicturePairs
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.embed import embed_pixels, embed_texts
from clipid_utils.model.pretrained.load import load_clip
from clipid_utils.model.pretrained.save import save_clip
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.training.checkpoint import Checkpoints
from clipid_utils.training.distributed import Placed
from clipid_utils.training.log import RunLog, retrieval_sample
from clipid_utils.training.step import TrainState


def validation_recall(model: HybridCLIP, processor: CLIPProcessor, pairs: PicturePairs) -> dict[str, float]:
    """Recall@1, 5 and 10, text to picture and back, by the pictures' names; concepts of one name count as right."""
    image_embeds = embed_pixels(model, processor.normalize(pairs.images))
    unique, first = np.unique(pairs.concepts, return_index=True)
    text_embeds = embed_texts(model, processor, [pairs.names[i] for i in first])
    similarity, right = text_embeds @ image_embeds.T, unique[:, None] == pairs.concepts[None, :]
    to_picture, to_text = scores.recall_at_k(similarity, right), scores.recall_at_k(similarity.T, right.T)
    return {f"text_to_picture_R@{k}": v for k, v in to_picture.items()} | {
        f"picture_to_text_R@{k}": v for k, v in to_text.items()
    }


class Run:
    """What a run leaves behind: its log, the best weights so far, and the states from which it can go on."""

    def __init__(
        self, path: Path | None, settings: dict, processor: CLIPProcessor, dtype, keeps_states: bool, resume: bool,
        sinks: dict,
    ):
        self.path, self.processor, self.dtype = None if path is None else Path(path), processor, dtype
        self.best: HybridCLIP | None = None
        self.best_recall = -math.inf
        self.keeps_states = self.path is not None and keeps_states
        self.states = None
        if self.keeps_states or self.path is not None and (self.path / "checkpoints").is_dir():
            self.states = Checkpoints(self.path / "checkpoints")
        self.start = None if self.states is None else self.states.latest()
        if self.start is not None and not resume:
            raise FileExistsError(f"{self.path} holds a run at step {self.start}: go on with it (resume=True, "
                                  "--resume), or name another folder")
        if self.start is not None:
            check_same(self.path / "fit.json", settings)
        self.lines = RunLog(self.path, settings, resume_step=self.start, **sinks)

    def close(self) -> None:
        """Waits for what is still being written."""
        try:
            self.lines.close()
        finally:
            if self.states is not None:
                self.states.close()

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes, and there is a folder."""
        return self.path is not None and jax.process_index() == 0

    @property
    def kept(self) -> str:
        """Where to go on after a failure, in words."""
        best = self.path is not None and self.best is not None
        step = None if self.states is None else self.states.latest()
        if step is not None:
            where = f", from the weights in {self.path / 'best'}" if best else ""
            return f"{self.path} goes on from step {step} with the same settings alone: start in another folder{where}"
        return f"the best weights before it are in {self.path / 'best'}" if best else "nothing was saved before it"

    def save_weights(self, name: str, model: HybridCLIP) -> None:
        if self.writes:
            save_clip(model, self.processor, self.path / name)

    def save_state(self, placed: Placed, state: TrainState, data: Iterator, progress: dict) -> None:
        """Keeps all that the run needs to go on from here."""
        extra = progress | {"best_recall": self.best_recall if self.best else None}
        self.states.save(progress["step"], placed.pack(state), data=data, extra=extra)

    def restore(self, placed: Placed, state: TrainState, data: Iterator) -> tuple[TrainState, dict]:
        """The state of the last checkpoint, with the feed set to where it was; `progress` as it was saved."""
        state, progress = self.states.restore(placed.pack(state), data=data)
        if progress["best_recall"] is not None:
            self.best_recall = progress["best_recall"]
            self.best = load_clip(self.path / "best", dtype=self.dtype)[0]
        return placed.unpack(state), progress

    def evaluate(
        self, validation: PicturePairs | None, samples: Sequence[str], model: HybridCLIP, line: dict
    ) -> None:
        """Logs the validation recall, and keeps `model` where text to picture R@1 is the best yet (ties: the later)."""
        recall = {} if validation is None else validation_recall(model, self.processor, validation)
        line = {**line, **recall}
        if line not in self.lines.history:  # it is, where a resumed run was killed before its next checkpoint
            self.lines.log(line)
        if samples and validation is not None:
            figure = retrieval_sample(model, self.processor, validation, samples)
            self.lines.picture("retrieval", figure, line["step"])
        first = recall.get("text_to_picture_R@1", self.best_recall)
        if first >= self.best_recall:
            self.best_recall, self.best = first, model
            self.save_weights("best", model)


def check_same(path: Path, settings: dict) -> None:
    """Raises ValueError where a run is to go on with other settings than it began with."""
    settings, began = json.loads(json.dumps(settings)), json.loads(path.read_text(encoding="utf-8"))
    other = [words for name, value in settings.items() for words in _differences(name, began.get(name), value)]
    if other:
        raise ValueError(f"{path} began with {'; '.join(other)}: resume with the same settings, or name another folder")


def _differences(name: str, before, now) -> Iterator[str]:
    """In words, as deep inside as they are; `name` is dotted, as an option of the command line."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from _differences(f"{name}.{key}", before.get(key), now.get(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from _differences(f"{name}.{number}", one, other)
    elif before != now:
        yield f"{name} {before!r}, now {now!r}"


def of_all(count: int) -> int:
    """The sum of a count over all processes; all of them must call it."""
    return count if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(count)).sum())


class Clock:
    """Seconds since the last line, and those of them in which the devices had nothing to do for want of data.

    A batch that took long counts only where the step before it was over when it came. `pause` leaves out what is no
    training.
    """

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.start, self.waited, self.examples = time.perf_counter(), 0.0, 0

    def next(self, source: Iterator[dict], running: jax.Array | None, batch_size: int) -> dict:
        """The next batch of `source`; `running` is a result of the step before, None at the start."""
        before = time.perf_counter()
        try:
            batch = next(source)
        except StopIteration:
            raise ValueError("the data ended before the run: a feed repeats its data as long as it is asked") from None
        if running is None or running.is_ready():
            self.waited += time.perf_counter() - before
        self.examples += batch_size
        return batch

    @contextmanager
    def pause(self):
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before

    def figures(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        return {"examples_per_second": self.examples / elapsed, "data_wait_fraction": self.waited / elapsed}


@contextmanager
def interruptible():
    """Yields a function of the step that says whether to stop: after Ctrl-C, or SIGTERM, with which a machine is taken.

    The signals do not break into a step, whose old state is already given away. With several processes all stop after
    the same step. Outside the main thread, where no signal arrives, only that is asked.
    """

    def ask(*_) -> None:
        if several:
            signal.raise_signal(signal.SIGTERM)  # JAX listens for it, and tells the other processes
        else:
            asked.set()

    asked, several = threading.Event(), jax.process_count() > 1
    main = threading.current_thread() is threading.main_thread()
    caught = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, ask) for number in caught} if main else {}
    try:
        yield lambda step: multihost_utils.reached_preemption_sync_point(step) if several else asked.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: JAX's own, which Python cannot set
