"""Stage 1: the towers are frozen, and the two projections and the scale learn from the towers' cached features.

No tower is computed, and none is in the optimizer's state, so this takes minutes on a CPU.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.ops import normalize
from clipid_utils.training.features import Features
from clipid_utils.training.fit import FitResult, TrainingConfig
from clipid_utils.training.loop import Loop, fitting_batch, no_progress
from clipid_utils.training.loss import clip_loss
from clipid_utils.training.optimizers import adamw, warmup_cosine
from clipid_utils.training.processes import say
from clipid_utils.training.step import TrainState, assemble, contrastive_update, init_state


@dataclass(frozen=True)
class ProjectionConfig(TrainingConfig):
    """Settings of stage 1."""

    epochs: int = 30  # passes over the features
    batch_size: int = 1024  # pairs a step; a smaller set of pictures is one batch
    trainable: tuple[str, ...] = ("*.projection.*", "logit_*")  # patterns of parameter paths; the others are frozen


class Heads(nnx.Module):
    """The part of a HybridCLIP after its towers; its parameters have the same names."""

    def __init__(self, model: HybridCLIP):
        self.config = model.config
        self.vision, self.text = (nnx.Dict(projection=tower.projection) for tower in (model.vision, model.text))
        self.logit_scale, self.logit_bias = model.logit_scale, model.logit_bias

    scale = HybridCLIP.scale


def make_head_update(graph: nnx.GraphDef, optimizer: optax.GradientTransformation, loss: Callable = clip_loss):
    """`update(state, batch) -> (state, metrics)`: as `step.make_update`, on features and without an average.

    `batch` has `images` [B, D], `texts` [B, W], `concepts` [B], and may have `caption_ids` [B, 2].
    """

    def embed(params, frozen, batch, keys):
        heads = nnx.merge(graph, params, frozen)
        return tuple(normalize(tower.projection(batch[name].astype(jnp.float32)))
                     for name, tower in (("images", heads.vision), ("texts", heads.text)))

    return contrastive_update(graph, optimizer, embed, loss=loss)


def feature_batches(features: Features, batch_size: int, *, seed: int, epoch: int) -> Iterator[dict[str, np.ndarray]]:
    """One epoch, in an order that depends on seed and epoch; each picture gets one of its captions, drawn each time.

    Pictures that could not be read are left out, and so is the rest that fills no batch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(np.flatnonzero(np.isfinite(features.images[:, 0])))
    drawn = rng.random(len(order))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows, chance = order[start : start + batch_size], drawn[start : start + batch_size]
        first, counts = features.starts[rows], features.starts[rows + 1] - features.starts[rows]
        texts = features.captions[first + (chance * counts).astype(np.int64)]
        yield {"images": features.images[rows], "texts": features.texts[texts], "concepts": features.concepts[rows],
               "caption_ids": features.caption_ids[texts]}


def train_projections(
    model: HybridCLIP, features: Features, config: ProjectionConfig = ProjectionConfig(), *, seed: int,
    loss: Callable = clip_loss, optimizer: Callable = adamw, on_log: Callable[[list[dict]], None] | None = None,
    progress: bool = True, score: Callable[[HybridCLIP], float] | None = None, start: float = -math.inf,
) -> FitResult:
    """Trains the projections and the scale on the towers' features, and returns the model with them.

    All other weights are those of `model`, which does not change. `loss` and `optimizer` are called as `clip_loss` and
    `adamw` are. Every `log_every` steps `on_log(history)` is called, as in `fit`, and `score` and `start` choose the
    best model and end the run as in `fit`. Ctrl-C ends the run after the current step and returns the weights so far.
    Raises ValueError for a batch of one pair, and FloatingPointError if the loss
    is not finite.
    """
    usable, history = int(np.isfinite(features.images[:, 0]).sum()), []
    if usable < len(features):
        say(f"{len(features) - usable} of {len(features)} pictures could not be read and are left out")
    batch_size = fitting_batch(config.batch_size, usable)
    per_epoch = usable // batch_size
    steps = config.epochs * per_epoch
    rate = warmup_cosine(config.learning_rate, steps, round(config.warmup * steps))
    transform = optimizer(rate, config.weight_decay, config.clip_norm)
    graph, state = init_state(Heads(model), transform, seed, config.trainable)

    def log(line: dict) -> None:
        history.append(line | {"log_batch": math.log(batch_size)})
        if on_log is not None:
            on_log(history)

    best, highest = model, start

    def evaluate(state: TrainState, line: dict) -> bool:
        nonlocal best, highest
        copied = jax.tree.map(jnp.copy, state)  # the next step takes the state's arrays
        now = _with_heads(model, assemble(graph, copied, averaged=False))
        log(line | {"score": score(now)})
        if history[-1]["score"] > highest:
            best, highest = now, history[-1]["score"]
        return no_progress(history, start)

    batches = (batch for epoch in itertools.count()
               for batch in feature_batches(features, batch_size, seed=seed, epoch=epoch))
    loop = Loop(steps, batch_size, per_epoch, rate, config.log_every, log, title="stage 1", progress=progress,
                evaluate=None if score is None else evaluate, evaluate_every=config.log_every)
    update = jax.jit(make_head_update(graph, transform, loss), donate_argnums=0)
    state, _, interrupted = loop.run(update, state, batches)
    last = _with_heads(model, assemble(graph, state, averaged=False))
    return FitResult(last if score is None else best, history, interrupted)


def _with_heads(model: HybridCLIP, heads: Heads) -> HybridCLIP:
    """A copy of the model with these heads; it shares the towers' arrays."""
    graph, state = nnx.split(model)
    new = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))  # new variables with the same arrays
    nnx.update(new, nnx.state(heads))  # its parameters have the same names
    return new
