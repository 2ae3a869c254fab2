"""The training loop: progress, metrics as JSON lines, validation recall, the best checkpoint kept."""

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from clipid_utils import metrics as scores
from clipid_utils.data.loader import PicturePairs, batches
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.convert import save_clip
from clipid_utils.model.embed import embed_pixels, embed_texts
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.training.augment import AugmentConfig
from clipid_utils.training.loss import clip_loss, siglip_loss
from clipid_utils.training.step import adamw, init_state, make_step, warmup_cosine


@dataclass(frozen=True)
class FitConfig:
    """What a run is made of; written into its folder as `fit.json`."""

    epochs: int = 10
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup: float = 0.05  # of all steps
    clip_norm: float = 1.0
    caption_tokens: int = 24
    drop_path: float = 0.0
    keep_patches: int | None = None
    image_image: float = 0.0  # weight of the loss between pictures of one concept
    group_concepts: bool = False  # pictures of one concept stand in one batch
    average_decay: float = 0.999
    evaluate_every: int = 10  # epochs
    log_every: int = 10  # steps
    augmentation: AugmentConfig | None = field(default_factory=AugmentConfig)


@dataclass
class FitResult:
    """`history` holds the lines of metrics.jsonl; `model` the averaged weights at the best validation recall."""

    model: HybridCLIP
    history: list[dict]
    interrupted: bool


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
    """What a run leaves behind: its history, in memory and as `metrics.jsonl`, and the checkpoints in its folder."""

    def __init__(self, path: Path | None, config: FitConfig, processor: CLIPProcessor):
        self.path, self.processor = None if path is None else Path(path), processor
        self.history: list[dict] = []
        self.best: HybridCLIP | None = None
        self.best_recall = -math.inf
        if self.path is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "fit.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
            (self.path / "metrics.jsonl").write_text("")

    @property
    def kept(self) -> Path | None:
        """The folder of the best weights so far, where there are any on disk."""
        return None if self.path is None or self.best is None else self.path / "best"

    def log(self, line: dict) -> None:
        self.history.append(line)
        if self.path is not None:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def save(self, name: str, model: HybridCLIP) -> None:
        if self.path is not None:
            save_clip(model, self.processor, self.path / name)

    def evaluate(self, model: HybridCLIP, validation: PicturePairs | None, line: dict) -> None:
        """Logs the validation recall, and keeps `model` where text to picture R@1 is the best yet (ties: the later)."""
        recall = {} if validation is None else validation_recall(model, self.processor, validation)
        self.log({**line, **recall})
        first = recall.get("text_to_picture_R@1", self.best_recall)
        if first >= self.best_recall:
            graph, params = nnx.split(model)
            # Copies, since the next step gives the memory of these away
            self.best_recall, self.best = first, nnx.merge(graph, jax.tree.map(jnp.array, params))
            self.save("best", self.best)


class Clock:
    """Seconds since the last line, and those of them spent waiting for data; `pause` leaves out what is no training."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.start, self.waited, self.examples = time.perf_counter(), 0.0, 0

    def waiting(self, source: Iterator[dict]) -> Iterator[dict]:
        """The batches of `source`, with the time that each one took counted as waiting."""
        while True:
            before = time.perf_counter()
            batch = next(source, None)
            self.waited += time.perf_counter() - before
            if batch is None:
                return
            self.examples += len(batch["images"])
            yield batch

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
    """Yields an event that Ctrl-C sets, instead of breaking into a step whose old state is already given away.

    Outside the main thread, where no signal arrives, the event is never set.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGINT, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def check_finite(values: dict[str, float], step: int, kept: Path | None) -> None:
    """Raises FloatingPointError where the loss, or the gradient behind it, is no number any more, with what to try."""
    if not all(map(math.isfinite, values.values())):
        raise FloatingPointError(
            f"the loss is {values['loss']} at step {step} (gradient norm {values['gradient_norm']:.3g}, logit_scale "
            f"{values['logit_scale']:.3g}): lower learning_rate or clip_norm; "
            + ("nothing was saved before it" if kept is None else f"the best weights before it are in {kept}")
        )


def fit(
    model: HybridCLIP, processor: CLIPProcessor, train: PicturePairs, validation: PicturePairs | None,
    config: FitConfig, *, seed: int, out: Path | None = None, loss: Callable = clip_loss, optimizer: Callable = adamw,
    on_log: Callable[[list[dict]], None] | None = None, progress: bool = True,
) -> FitResult:
    """Trains on one device and returns the best averaged weights; `model` itself is left as it was.

    `train.images` may be larger than the model's pictures where there is an augmentation, which samples them down;
    `validation.images` must have the model's size. `loss` and `optimizer` are called as `clip_loss` and `step.adamw`
    are. Every `log_every` steps a line of metrics goes to `out/metrics.jsonl` and to `on_log(history)`; every
    `evaluate_every` epochs the weights, averaged over the steps, are measured on `validation` and the best ones kept in
    `out/best` (without validation: the last ones). Ctrl-C ends the run after the step it is in: the weights so far
    stand in `out/last`. Raises ValueError for a batch of one pair or an empty caption and FloatingPointError when the
    loss is not finite.
    """
    if config.batch_size < 2:
        raise ValueError("batch_size is 1: a contrastive loss needs at least 2 pairs, and learns from many")
    if loss is siglip_loss and model.logit_bias is None or loss is clip_loss and model.logit_bias is not None:
        raise ValueError("siglip_loss needs a model with CLIPConfig(logit_bias=-10.0), clip_loss one with None")
    steps = config.epochs * (len(train) // config.batch_size)
    schedule = warmup_cosine(config.learning_rate, steps, round(config.warmup * steps))
    transform = optimizer(schedule, config.weight_decay, config.clip_norm)
    graph, state = init_state(model, transform, seed)
    step = make_step(
        graph, transform, image_mean=processor.image_mean, image_std=processor.image_std,
        augmentation=config.augmentation, loss=loss, drop_path=config.drop_path, keep_patches=config.keep_patches,
        image_image=config.image_image, average_decay=config.average_decay,
    )
    run, clock, cut_before = Run(out, config, processor), Clock(), processor.truncated
    with tqdm(total=steps, desc="training", unit=" steps", disable=not progress) as bar, interruptible() as asked:
        done = 0
        try:
            for epoch in range(config.epochs):
                for batch in clock.waiting(batches(train, processor.tokenize, config.batch_size, seed=seed, epoch=epoch,
                                                   length=config.caption_tokens, group_concepts=config.group_concepts)):
                    state, values = step(state, batch)
                    done += 1
                    bar.update()
                    if done % config.log_every == 0 or done == steps:
                        values = {name: float(value) for name, value in values.items()}
                        check_finite(values, done, run.kept)
                        run.log({"step": done, "epoch": epoch + 1, **values, "log_batch": math.log(config.batch_size),
                                 "learning_rate": float(schedule(done - 1)), **clock.figures(),
                                 "truncated": processor.truncated - cut_before})
                        bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
                        clock.restart()
                        if on_log is not None:
                            with clock.pause():
                                on_log(run.history)
                    if asked.is_set():
                        raise KeyboardInterrupt
                if (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs:
                    check_finite({name: float(value) for name, value in values.items()}, done, run.kept)
                    with clock.pause():
                        run.evaluate(nnx.merge(graph, state.average), validation, {"step": done, "epoch": epoch + 1})
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        last = nnx.merge(graph, state.average)
        run.save("last", last)
        where = "" if out is None else f" in {Path(out) / 'last'}"
        print(f"interrupted at step {done} of {steps}: the weights so far are kept{where}")
        run.best = run.best or last
    return FitResult(run.best, run.history, interrupted)
