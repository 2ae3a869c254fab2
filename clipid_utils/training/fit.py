"""Training of a whole model: `fit`, its settings and its result."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Int

from clipid_utils.data.batches.loader import Feed, PicturePairs, dictionary_feed
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.training.alarms import Alarms, check_finite
from clipid_utils.training.augment import AugmentConfig
from clipid_utils.training.distributed import Placed, jit_form, make_mesh
from clipid_utils.training.loop import Loop, fitting_batch, no_progress
from clipid_utils.training.loss import clip_loss, siglip_loss
from clipid_utils.training.optimizers import adamw, warmup_cosine, with_rates
from clipid_utils.training.processes import from_all, say
from clipid_utils.training.run_folder import RunFolder
from clipid_utils.training.step import TrainState, assemble, init_state, make_update


@dataclass(frozen=True)
class TrainingConfig:
    """Settings that `fit` and stage 1 share; written into a run's folder as `fit.json`."""

    epochs: int = 10  # passes over the data
    batch_size: int = 256  # pairs a step, of all devices together; a smaller set of pictures is one batch
    learning_rate: float = 1e-3  # the peak, after the warm-up; then half a cosine down to 0
    weight_decay: float = 0.1  # share of each matrix that a step takes away, times the learning rate
    warmup: float = 0.05  # share of all steps in which the learning rate rises from 0
    clip_norm: float = 1.0  # largest norm of the gradient; for adabelief: against its weights' norm, unit by unit
    log_every: int = 10  # steps between two lines of metrics.jsonl
    trainable: tuple[str, ...] = ("*",)  # patterns of dotted parameter paths; the others are frozen


@dataclass(frozen=True)
class FitConfig(TrainingConfig):
    """Settings of `fit`."""

    caption_tokens: int = 24  # longest caption in tokens; longer ones are cut, and counted
    drop_path: float = 0.0  # chance to skip the image tower's last layer; less for earlier ones, half for the text's
    keep_patches: int | None = None  # patches of each picture that go through the tower, drawn each time; none: all
    image_image: float = 0.0  # weight of the loss between pictures of one concept
    group_concepts: bool = False  # pictures of one concept are in one batch
    average_decay: float = 0.999  # of the weights' running average, which is evaluated and kept; 0: no average
    evaluate_every: int = 10  # epochs; steps of a stream, which has none
    augmentation: AugmentConfig | None = field(default_factory=AugmentConfig)
    steps: int | None = None  # in place of epochs; a stream needs it
    # Not a dict: tyro would make one option for each entry of a dict, and other patterns could not be given
    rates: MutableMapping[str, float] = field(default_factory=dict)
    """Patterns, each with a factor on the learning rate; the first that fits counts."""
    layer_decay: float = 1.0  # factor on the learning rate, for each layer further from a tower's end
    chunks: int = 1  # parts in which the batch goes through the towers (gradient cache)
    remat: bool = False  # compute blocks again in the backward pass, to save memory
    checkpoint_every: int = 0  # steps; with 0 there are none, and a run that is stopped cannot be resumed


@dataclass
class FitResult:
    """`model` has the averaged weights at the best validation recall; `history` has the lines of metrics.jsonl."""

    model: HybridCLIP
    history: list[dict]
    interrupted: bool


def _check(
    model: HybridCLIP, feed: Feed, validation: PicturePairs | None, config: FitConfig, loss: Callable, mesh: Mesh
) -> None:
    size = model.config.vision.image_size
    if validation is not None and validation.images.shape[1:3] != (size, size):
        raise ValueError(f"the validation pictures have {validation.images.shape[1]} pixels a side and the model takes "
                         f"{size}: load them at {size}")
    if loss is siglip_loss and model.logit_bias is None or loss is clip_loss and model.logit_bias is not None:
        raise ValueError("siglip_loss needs a model with CLIPConfig(logit_bias=-10.0), clip_loss one with None")
    check_batch(feed.batch_size, config.chunks, mesh)
    if config.steps is None and feed.steps_per_epoch is None:
        raise ValueError("a stream has no epochs to count: set FitConfig.steps, and evaluate_every, which counts steps "
                         "of a stream")


def check_batch(size: int, chunks: int, mesh: Mesh) -> None:
    """Raises ValueError for a batch that the devices cannot share."""
    devices = mesh.shape["data"]
    if size < 2 or size % (devices * chunks):
        raise ValueError(f"batch_size {size} cannot be divided over {devices} devices in {chunks} chunks: choose a "
                         f"multiple of {devices * chunks} that is at least 2, or mesh=make_mesh(…) of fewer devices")


def _pictures_feed(
    pairs: PicturePairs, processor: CLIPProcessor, config: FitConfig, seed: int, mesh: Mesh
) -> tuple[Feed, FitConfig]:
    """Batches of pictures in memory, and the config with the batch size that they can fill."""
    size = fitting_batch(config.batch_size, len(pairs), multiple=mesh.shape["data"] * config.chunks)
    feed = dictionary_feed(
        pairs, processor.tokenize, size, seed=seed, length=config.caption_tokens, group_concepts=config.group_concepts,
        process_index=jax.process_index(), process_count=jax.process_count())
    return feed, dataclasses.replace(config, batch_size=size)


def fit(
    model: HybridCLIP, processor: CLIPProcessor, train: PicturePairs | Feed, validation: PicturePairs | None,
    config: FitConfig, *, seed: int, out: Path | None = None, loss: Callable = clip_loss, optimizer: Callable = adamw,
    form: Callable = jit_form, mesh: Mesh | None = None, resume: bool = False, overwrite: bool = False,
    samples: Sequence[str] = (), sinks: dict | None = None, on_log: Callable[[list[dict]], None] | None = None,
    progress: bool = True, score: Callable[[HybridCLIP], float] | None = None, start: float = -math.inf,
) -> FitResult:
    """Trains on all devices and returns the best averaged weights; `model` itself does not change.

    `train` is pictures in memory, or a feed of `loader`. The pictures may be larger than the model's if there is an
    augmentation, which samples them down; `validation.images` must have the model's size. `loss` and `optimizer` are
    called as `clip_loss` and `optimizers.adamw` are; `form` and `mesh` say how the step runs on the devices
    (`distributed`). Every `log_every` steps a line of metrics goes to `out/metrics.jsonl`, to `on_log(history)` and to
    `sinks`, the options of `RunLog`; what `alarms` finds in it is a warning. Every `evaluate_every` epochs the averaged
    weights are measured on `validation`, and the best ones are kept in `out/best` (without validation: the last ones),
    with a picture of what they find for the queries `samples`.

    With `config.checkpoint_every` the whole state is kept in `out/checkpoints`, and `resume` continues from the last
    one, if there is one, to the same weights as a run that was never stopped. Ctrl-C and SIGTERM end the run after the
    current step: its state is kept, and its weights are in `out/last`. `overwrite` deletes an earlier run in `out`.

    With a `score`, higher is better, it is measured in place of the recall. The best model is kept, `model` itself if
    none has more than its own score `start`, and the run ends when several evaluations in a row are not better.

    Raises ValueError for a batch of one pair, validation pictures of a different size, an empty caption, or a config
    that changed before resuming; FileExistsError if `out` has an earlier run; FloatingPointError if the loss is not
    finite.
    """
    mesh = mesh or make_mesh()
    feed, config = (train, config) if isinstance(train, Feed) else _pictures_feed(train, processor, config, seed, mesh)
    _check(model, feed, validation, config, loss, mesh)
    steps = config.epochs * feed.steps_per_epoch if config.steps is None else config.steps
    schedule = warmup_cosine(config.learning_rate, steps, round(config.warmup * steps))
    graph, state, placed = _compiled(model, processor, config, seed, schedule, optimizer, loss, form, mesh)
    folder = RunFolder(out, dataclasses.asdict(config) | {"seed": seed}, processor, model.vision.dtype, resume=resume,
                       keeps_states=bool(config.checkpoint_every), overwrite=overwrite, sinks=sinks, score=score)
    if score is not None and folder.start is None:
        folder.keep(model, start)
    if validation is None:
        say("no validation pictures (--validation): recall is not measured, and the last weights are kept")
    alarms = Alarms(steps, round(config.warmup * steps), chance_is_log_batch=loss is clip_loss)

    def evaluate(model: HybridCLIP, line: dict) -> bool:
        folder.evaluate(validation, samples, model, line)
        return score is not None and no_progress(folder.lines.history, start)

    state = placed.place(state)  # the same name: a second reference would keep the first state's memory to the end
    try:
        last, done, stopped = _train(folder, graph, placed, state, feed, steps, config, schedule, alarms, evaluate,
                                     on_log, progress)
    finally:
        folder.close()
    if stopped:
        folder.save_weights("last", last)
        where = "" if out is None else f" in {Path(out) / 'last'}"
        again = "; resume=True (--resume) continues from here" if folder.keeps_states else ""
        say(f"interrupted at step {done} of {steps}: the weights so far are kept{where}{again}")
    return FitResult(folder.best or last, folder.lines.history, stopped)


def _compiled(
    model: HybridCLIP, processor: CLIPProcessor, config: FitConfig, seed: int, schedule: Callable, optimizer: Callable,
    loss: Callable, form: Callable, mesh: Mesh,
) -> tuple[nnx.GraphDef, TrainState, Placed]:
    """The model's structure, its first state, and the step."""
    layers = {"vision": model.config.vision.layers, "text": model.config.text.layers}
    transform = with_rates(optimizer(schedule, config.weight_decay, config.clip_norm), config.rates, config.layer_decay,
                           layers)
    graph, state = init_state(model, transform, seed, config.trainable)
    settings = ("augmentation", "drop_path", "keep_patches", "image_image", "average_decay", "chunks", "remat")
    return graph, state, form(functools.partial(
        make_update, graph, transform, image_mean=processor.image_mean, image_std=processor.image_std, loss=loss,
        **{name: getattr(config, name) for name in settings}), mesh)


def _train(
    folder: RunFolder, graph: nnx.GraphDef, placed: Placed, state: TrainState, feed: Feed, steps: int,
    config: FitConfig, schedule: Callable, alarms: Alarms, evaluate: Callable, on_log: Callable | None, progress: bool,
) -> tuple[HybridCLIP, int, bool]:
    """The model at the end of the loop, the number of its last step, and whether it was stopped before the end."""
    data, start, cut = iter(feed.dataset), {"step": 0, "evaluation_due": False, "truncated": 0}, 0
    shared: list[int] = []  # pairs that share their caption, in each batch before the first line of the log
    if folder.start is not None:
        state, start = folder.restore(placed, state, data)
    for line in folder.lines.history:
        alarms(line)  # an alarm from before the run was stopped is not repeated

    def model(state: TrainState) -> HybridCLIP:
        parts = {part: placed.collect(getattr(state, part)) for part in ("average", "frozen")}
        return assemble(graph, state._replace(**parts))

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        nonlocal cut
        cut += int(batch.pop("truncated").sum())
        if start["step"] + len(shared) < config.log_every and "caption_ids" in batch:
            shared.append(count_shared(batch["caption_ids"]))
        return placed.step(state, placed.feed(batch))

    def truncated() -> dict[str, int]:
        return {"truncated": start["truncated"] + sum(from_all(cut))}

    def log(line: dict) -> None:
        line |= {"log_batch": math.log(feed.batch_size)} | truncated()
        folder.lines.log(line)
        if any(shared) and line["step"] == min(config.log_every, steps):
            say(f"{sum(shared)} of the first {len(shared) * feed.batch_size} pairs share their caption with a pair of "
                "their batch: both are right answers")
        for alarm in alarms(line):
            # The file as the repository names it, so that no notebook shows the path of a machine
            warnings.warn_explicit(f"step {alarm['step']}: {alarm['message']}", UserWarning,
                                   "clipid_utils/training/fit.py", 0)
            folder.lines.log(alarm)
        if on_log is not None:
            on_log(folder.lines.history)

    def save(state: TrainState, place: dict) -> None:
        folder.save_state(placed, state, data, place | truncated())

    loop = Loop(
        steps, feed.batch_size, feed.steps_per_epoch, schedule, config.log_every, log,
        evaluate=lambda state, line: evaluate(model(state), line),
        evaluate_every=config.evaluate_every * (feed.steps_per_epoch or 1),
        save=save if folder.keeps_states else None, save_every=config.checkpoint_every,
        check=lambda line: check_finite(line, folder.kept), progress=progress)
    state, done, stopped = loop.run(step, state, data, start=start["step"], evaluation_due=start["evaluation_due"])
    return model(state) if stopped or folder.best is None else folder.best, done, stopped


def count_shared(caption_ids: Int[np.ndarray, "b 2"]) -> int:
    """How many pairs of a batch, of all processes together, share their caption with a different pair."""
    ids = np.concatenate(from_all(np.asarray(caption_ids).tolist()))
    _, counts = np.unique(ids, axis=0, return_counts=True)
    return int(counts[counts > 1].sum())
