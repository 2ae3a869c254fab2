"""Stage 1: the towers are frozen, and the two projections and the scale learn from their cached features.

No tower is computed, and none is in the optimizer's state: minutes on a CPU.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from clipid_utils.model.clip import HybridCLIP, normalize
from clipid_utils.training.alarms import check_finite
from clipid_utils.training.features import Features
from clipid_utils.training.fit import FitResult
from clipid_utils.training.loss import clip_loss, same_concept
from clipid_utils.training.optimizers import adamw, check_patterns, matching, warmup_cosine
from clipid_utils.training.run import interruptible


@dataclass(frozen=True)
class ProjectionConfig:
    """Settings of stage 1, named as FitConfig's."""

    epochs: int = 30  # passes over the features
    batch_size: int = 1024  # pairs a step
    learning_rate: float = 1e-3  # its peak, after the warm-up; then half a cosine down to 0
    weight_decay: float = 0.1  # share of each matrix that a step takes away, times the learning rate
    warmup: float = 0.05  # share of all steps in which the learning rate rises from 0
    clip_norm: float = 1.0  # largest norm of the gradient; for adabelief: against its weights' norm, unit by unit
    log_every: int = 10  # steps between two lines of metrics.jsonl
    trainable: tuple[str, ...] = ("*.projection.*", "logit_*")  # patterns; others of them stay as they are


class _Head(nnx.Module):
    def __init__(self, projection: nnx.Linear):
        self.projection = projection


class Heads(nnx.Module):
    """What is left of a HybridCLIP behind its towers, its parameters named as there."""

    def __init__(self, model: HybridCLIP):
        self.config = model.config
        self.vision, self.text = _Head(model.vision.projection), _Head(model.text.projection)
        self.logit_scale, self.logit_bias = model.logit_scale, model.logit_bias

    scale = HybridCLIP.scale

    def encode_image(self, features: Float[Array, "B D"]) -> Float[Array, "B E"]:
        return normalize(self.vision.projection(features))

    def encode_text(self, features: Float[Array, "B W"]) -> Float[Array, "B E"]:
        return normalize(self.text.projection(features))


def make_head_update(graph: nnx.GraphDef, optimizer: optax.GradientTransformation, loss: Callable = clip_loss):
    """`update(params, opt_state, frozen, batch) -> (params, opt_state, metrics)`: `step.make_update` on features.

    `batch` holds `images` [B, D], `texts` [B, W] and `concepts` [B].
    """

    def objective(params, frozen, batch):
        heads = nnx.merge(graph, params, frozen)
        bias = () if heads.logit_bias is None else (heads.logit_bias[...],)
        images, texts = (batch[name].astype(jnp.float32) for name in ("images", "texts"))
        return loss(heads.encode_image(images), heads.encode_text(texts), heads.scale(), *bias,
                    positives=same_concept(batch["concepts"]))

    def update(params, opt_state, frozen, batch):
        value, gradients = jax.value_and_grad(objective)(params, frozen, batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        scale = (params if "logit_scale" in params else frozen)["logit_scale"][...]
        if "logit_scale" in params:
            scale = jnp.minimum(scale, nnx.merge(graph, params, frozen).config.max_logit_scale)
            params["logit_scale"] = params["logit_scale"].replace(scale)
        metrics = {"loss": value, "logit_scale": scale, "gradient_norm": optax.tree.norm(gradients)}
        return params, opt_state, metrics

    return update


def feature_batches(features: Features, batch_size: int, *, seed: int, epoch: int) -> Iterator[dict[str, np.ndarray]]:
    """One epoch in an order that depends on seed and epoch alone; a caption is drawn anew for each picture.

    The rest that fills no batch is left out, as are the pictures that could not be read.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(np.flatnonzero(np.isfinite(features.images[:, 0])))
    drawn = rng.random(len(order))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows, chance = order[start : start + batch_size], drawn[start : start + batch_size]
        first, counts = features.starts[rows], features.starts[rows + 1] - features.starts[rows]
        texts = features.captions[first + (chance * counts).astype(np.int64)]
        yield {"images": features.images[rows], "texts": features.texts[texts], "concepts": features.concepts[rows]}


def train_projections(
    model: HybridCLIP, features: Features, config: ProjectionConfig = ProjectionConfig(), *, seed: int,
    loss: Callable = clip_loss, optimizer: Callable = adamw, on_log: Callable[[list[dict]], None] | None = None,
    progress: bool = True,
) -> FitResult:
    """Trains what stands behind the towers on their features, and returns the model with it put in.

    All other weights are those of `model`, which is left as it was. `loss` and `optimizer` are called as `clip_loss`
    and `adamw` are. Every `log_every` steps `on_log(history)` is called, as `fit` does. Ctrl-C ends the run after the
    step it is in and keeps what it has. Raises ValueError for a batch larger than the data and FloatingPointError when
    the loss is not finite.
    """
    usable = int(np.isfinite(features.images[:, 0]).sum())
    if not 2 <= config.batch_size <= usable:
        raise ValueError(f"batch_size is {config.batch_size}: choose one from 2 to {usable}, the number of pictures")
    per_epoch = usable // config.batch_size
    steps, heads = config.epochs * per_epoch, Heads(model)
    check_patterns(nnx.state(heads, nnx.Param), config.trainable)
    rate = warmup_cosine(config.learning_rate, steps, round(config.warmup * steps))
    transform = optimizer(rate, config.weight_decay, config.clip_norm)
    graph, params, frozen = nnx.split(heads, matching(config.trainable), ...)
    params = jax.tree.map(jnp.array, params)  # copies: the step gives the memory of its input away
    opt_state, history, stop = transform.init(params), [], False
    update = jax.jit(make_head_update(graph, transform, loss), donate_argnums=(0, 1))
    batches = (batch for epoch in range(config.epochs)
               for batch in feature_batches(features, config.batch_size, seed=seed, epoch=epoch))
    with interruptible() as asked:
        for done, batch in enumerate(tqdm(batches, "stage 1", steps, unit=" steps", disable=not progress), 1):
            params, opt_state, values = update(params, opt_state, frozen, batch)
            stop = asked(done)
            if done % config.log_every == 0 or done == steps or stop:
                line = {"step": done, "epoch": -(-done // per_epoch)}
                line |= {name: value.item() for name, value in values.items()}
                check_finite(line)
                line |= {"log_batch": math.log(config.batch_size), "learning_rate": float(rate(done - 1))}
                history.append(line)
                if on_log is not None:
                    on_log(history)
            if stop:
                break
    return FitResult(_put_in(model, nnx.merge(graph, params, frozen)), history, stop)


def _put_in(model: HybridCLIP, heads: Heads) -> HybridCLIP:
    """A copy of the model with these heads; the towers' arrays are shared."""
    graph, state = nnx.split(model)
    new = nnx.merge(graph, state)
    new.vision.projection, new.text.projection = heads.vision.projection, heads.text.projection
    new.logit_scale, new.logit_bias = heads.logit_scale, heads.logit_bias
    return new
