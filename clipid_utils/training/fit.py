"""The training loop: steps, lines of the log, alarms, evaluations, checkpoints."""

import dataclasses
import functools
import math
import warnings
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh
from tqdm.auto import tqdm

from clipid_utils.data.batches.loader import Feed, PicturePairs, dictionary_feed
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.training.alarms import Alarms, check_finite
from clipid_utils.training.augment import AugmentConfig
from clipid_utils.training.distributed import Placed, jit_form, make_mesh
from clipid_utils.training.loss import clip_loss, siglip_loss
from clipid_utils.training.optimizers import adamw, warmup_cosine, with_rates
from clipid_utils.training.run import Clock, Run, interruptible, of_all
from clipid_utils.training.step import TrainState, assemble, init_state, leaf_names, make_update


@dataclass(frozen=True)
class FitConfig:
    """What a run is made of; written into its folder as `fit.json`."""

    epochs: int = 10  # passes over the data
    batch_size: int = 256  # pairs a step, of all devices together
    learning_rate: float = 1e-3  # its peak, after the warm-up; then half a cosine down to 0
    weight_decay: float = 0.1  # share of each matrix that a step takes away, times the learning rate
    warmup: float = 0.05  # share of all steps in which the learning rate rises from 0
    clip_norm: float = 1.0  # largest norm of the gradient; for adabelief: against its weights' norm, unit by unit
    caption_tokens: int = 24  # longest caption in tokens; what is cut off is counted
    drop_path: float = 0.0  # chance that the image tower's last layer is skipped, less before it; half for the text's
    keep_patches: int | None = None  # patches of each picture that go through the tower, drawn anew; none: all
    image_image: float = 0.0  # weight of the loss between pictures of one concept
    group_concepts: bool = False  # pictures of one concept stand in one batch
    average_decay: float = 0.999  # of the weights' running average, a step; it is evaluated and kept; 0: none
    evaluate_every: int = 10  # epochs; steps of a stream, which has none
    log_every: int = 10  # steps between two lines of metrics.jsonl
    augmentation: AugmentConfig | None = field(default_factory=AugmentConfig)
    steps: int | None = None  # in place of epochs; a stream has none to count
    trainable: tuple[str, ...] = ("*",)  # patterns of dotted parameter paths; what fits none stays as it is
    # No dict: of one with entries tyro makes an option for each of them, and other patterns could not be given
    rates: MutableMapping[str, float] = field(default_factory=dict)
    """Patterns, each with a factor on the learning rate; the first that fits counts."""
    layer_decay: float = 1.0  # factor on the learning rate, for each layer further from a tower's end
    chunks: int = 1  # parts in which the batch goes through the towers (gradient cache)
    remat: bool = False  # blocks computed anew in the backward pass
    checkpoint_every: int = 0  # steps; 0 keeps none, and a run that is stopped cannot be resumed


@dataclass
class FitResult:
    """`history` holds the lines of metrics.jsonl; `model` the averaged weights at the best validation recall."""

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
    if feed.batch_size < 2:
        raise ValueError("batch_size is 1: a contrastive loss needs at least 2 pairs, and learns from many")
    if loss is siglip_loss and model.logit_bias is None or loss is clip_loss and model.logit_bias is not None:
        raise ValueError("siglip_loss needs a model with CLIPConfig(logit_bias=-10.0), clip_loss one with None")
    if feed.batch_size % (mesh.shape["data"] * config.chunks):
        raise ValueError(f"batch_size {feed.batch_size} cannot be cut over {mesh.shape['data']} devices in "
                         f"{config.chunks} chunks: choose a multiple of {mesh.shape['data'] * config.chunks}, or "
                         "mesh=make_mesh(…) of fewer devices")
    if config.steps is None and feed.steps_per_epoch is None:
        raise ValueError("a stream has no epochs to count: set FitConfig.steps, and evaluate_every, which counts steps "
                         "of a stream")


def fit(
    model: HybridCLIP, processor: CLIPProcessor, train: PicturePairs | Feed, validation: PicturePairs | None,
    config: FitConfig, *, seed: int, out: Path | None = None, loss: Callable = clip_loss, optimizer: Callable = adamw,
    form: Callable = jit_form, mesh: Mesh | None = None, resume: bool = False, samples: Sequence[str] = (),
    sinks: dict | None = None, on_log: Callable[[list[dict]], None] | None = None, progress: bool = True,
) -> FitResult:
    """Trains on all devices and returns the best averaged weights; `model` itself is left as it was.

    `train` is pictures in memory or a feed of `loader`'s. Pictures may be larger than the model's where there is an
    augmentation, which samples them down; `validation.images` must have the model's size. `loss` and `optimizer` are
    called as `clip_loss` and `optimizers.adamw` are; `form` and `mesh` say how the step runs on the devices
    (`distributed`). Every `log_every` steps a line of metrics goes to `out/metrics.jsonl`, to `on_log(history)` and to
    `sinks`, the options of `RunLog`; what `alarms` finds in it is a warning. Every `evaluate_every` epochs the weights,
    averaged over the steps, are measured on `validation` and the best ones kept in `out/best` (without validation: the
    last ones), with what they find for the queries `samples` as a picture.

    With `config.checkpoint_every` the whole state is kept in `out/checkpoints`, and `resume` goes on from the last one,
    if there is one, to the very weights of a run that was never stopped. Ctrl-C and SIGTERM end the run after the step
    it is in: its state is kept, and the weights so far stand in `out/last`.

    Raises ValueError for a batch of one pair, validation pictures of another size, an empty caption, or another config
    on resuming; FileExistsError where `out` holds another run's checkpoints; FloatingPointError when the loss is not
    finite.
    """
    mesh = mesh or make_mesh()
    feed = train if isinstance(train, Feed) else dictionary_feed(
        train, processor.tokenize, config.batch_size, seed=seed, length=config.caption_tokens,
        group_concepts=config.group_concepts, process_index=jax.process_index(), process_count=jax.process_count(),
    )
    _check(model, feed, validation, config, loss, mesh)
    steps = config.steps or config.epochs * feed.steps_per_epoch
    warmup = round(config.warmup * steps)
    schedule = warmup_cosine(config.learning_rate, steps, warmup)
    transform = optimizer(schedule, config.weight_decay, config.clip_norm)
    if config.rates or config.layer_decay != 1.0:
        layers = {"vision": model.config.vision.layers, "text": model.config.text.layers}
        transform = with_rates(transform, config.rates, config.layer_decay, layers)
    graph, state = init_state(model, transform, seed, config.trainable)
    placed = form(functools.partial(
        make_update, graph, transform, image_mean=processor.image_mean, image_std=processor.image_std,
        augmentation=config.augmentation, loss=loss, drop_path=config.drop_path, keep_patches=config.keep_patches,
        image_image=config.image_image, average_decay=config.average_decay, chunks=config.chunks, remat=config.remat,
    ), mesh)
    alarms = Alarms(steps, warmup, max_logit_scale=model.config.max_logit_scale,
                    guessing_pays_log_batch=loss is clip_loss)
    run = Run(out, dataclasses.asdict(config) | {"seed": seed}, processor, model.vision.dtype,
              bool(config.checkpoint_every), resume, sinks or {})
    for line in run.lines.history:
        alarms(line)  # what rang before the run was stopped rings no second time
    evaluate = functools.partial(run.evaluate, validation, samples)
    state = placed.place(state)  # under the same name: a first state kept here would take its memory to the end
    try:
        done, last, stopped = _train(run, graph, placed, state, feed, steps, config, schedule, alarms, evaluate, on_log,
                                     progress)
    finally:
        run.close()
    if stopped:
        run.save_weights("last", last)
        where = "" if out is None else f" in {Path(out) / 'last'}"
        again = "; resume goes on from here" if run.keeps_states else ""
        print(f"interrupted at step {done} of {steps}: the weights so far are kept{where}{again}")
    return FitResult(run.best or last, run.lines.history, stopped)


def _train(
    run: Run, graph: nnx.GraphDef, placed: Placed, state: TrainState, feed: Feed, steps: int, config: FitConfig,
    rate: Callable, alarms: Alarms, evaluate: Callable, on_log: Callable | None, progress: bool,
) -> tuple[int, HybridCLIP, bool]:
    """Steps until the last one, Ctrl-C or SIGTERM: how many are done, the averaged model, whether it was stopped."""
    names, data, clock = leaf_names(state.params), iter(feed.dataset), Clock()
    done, cut, cut_before, owed = 0, 0, 0, False
    if run.start is not None:
        state, saved = run.restore(placed, state, data)
        done, cut_before, owed = saved["step"], saved["truncated"], saved["owed"]
    per_epoch, values, ahead, stop = feed.steps_per_epoch, {}, deque(maxlen=2), False

    def model() -> HybridCLIP:
        parts = {part: placed.collect(getattr(state, part)) for part in ("average", "frozen")}
        return assemble(graph, state._replace(**parts))

    def finite() -> dict:
        line = {"step": done} | ({} if per_epoch is None else {"epoch": -(-done // per_epoch)})
        line |= {name: value.item() for name, value in values.items()}
        check_finite(line, names, run.kept)
        return line

    def log(line: dict) -> None:
        run.lines.log(line | {
            "log_batch": math.log(feed.batch_size), "learning_rate": float(rate(done - 1)), **clock.figures(),
            "examples": done * feed.batch_size, "truncated": cut_before + of_all(cut),
        })
        for alarm in alarms(run.lines.history[-1]):
            # The file as the repository names it: a notebook holds no machine's path
            warnings.warn_explicit(f"step {done}: {alarm['message']}", UserWarning, "clipid_utils/training/fit.py", 0)
            run.lines.log(alarm)

    with tqdm(total=steps, initial=done, desc="training", unit=" steps", disable=not progress) as bar, \
            interruptible() as asked:
        if owed:
            evaluate(model(), finite())
        while done < steps and not stop:
            batch = clock.next(data, ahead[-1] if ahead else None, feed.batch_size)
            cut += int(batch.pop("truncated").sum())
            state, values = placed.step(state, placed.feed(batch))
            ahead.append(values["loss"])
            jax.block_until_ready(ahead[0])  # the host stays at most two steps ahead of the devices
            done += 1
            bar.update()
            stop, end = asked(done), done == steps
            try:
                if done % config.log_every == 0 or end:
                    line = finite()
                    log(line)
                    bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
                    clock.restart()
                    if on_log is not None:
                        with clock.pause():
                            on_log(run.lines.history)
            except KeyboardInterrupt:  # on_log's own
                stop = True
            due = done % (config.evaluate_every * (per_epoch or 1)) == 0 or end
            if due and not stop:
                with clock.pause():
                    evaluate(model(), {name: value for name, value in finite().items() if name in ("step", "epoch")})
            if run.keeps_states and (done % config.checkpoint_every == 0 or end or stop):
                finite()
                with clock.pause():
                    reached = {"step": done, "truncated": cut_before + of_all(cut), "owed": due and stop}
                    run.save_state(placed, state, data, reached)
        return done, model() if stop or run.best is None else run.best, stop
