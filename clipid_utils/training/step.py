"""The training state and one compiled step: augment, embed, contrast, update, average."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import MAX_LOGIT_SCALE
from clipid_utils.training.augment import AugmentConfig, augment
from clipid_utils.training.loss import clip_loss, image_image_loss, same_concept


class TrainState(NamedTuple):
    """Everything that a step changes."""

    params: nnx.State
    average: nnx.State  # exponential moving average of params
    opt_state: Any
    step: jax.Array
    key: jax.Array


def _name(part) -> str:
    """One part of a parameter's path as a word."""
    return str(getattr(part, "key", getattr(part, "name", part)))


def decayed(params: nnx.State) -> Any:
    """True for the leaves that weight decay applies to: matrices, but no bias, norm, position, class token or scale."""

    def wanted(path, leaf) -> bool:
        return leaf.ndim > 1 and not any("position" in _name(part) for part in path)

    return jax.tree_util.tree_map_with_path(wanted, params)


def warmup_cosine(learning_rate: float, steps: int, warmup: int) -> optax.Schedule:
    """Linear from 0 over `warmup` steps, then half a cosine down to 0 at `steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(warmup, 1), max(steps, warmup + 2))


def adamw(schedule: optax.Schedule | float, weight_decay: float, clip_norm: float, b2: float = 0.98):
    """AdamW (Loshchilov & Hutter 2019) after a clip of the global gradient norm; decays only what `decayed` names."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=0.9, b2=b2, weight_decay=weight_decay, mask=decayed),
    )


def muon(schedule: optax.Schedule, weight_decay: float, clip_norm: float, b2: float = 0.98):
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, at ten times the rate, AdamW for all the rest.

    An update of Muon is orthogonal: its entries are about width**-0.5 in size where AdamW's are about 1, so that ten
    times the rate changes a matrix of the mini model about as fast. Decay takes `weight_decay` times that rate from all
    that `decayed` names; the clip is as in `adamw`.
    """

    def label(path, leaf) -> str:
        return "muon" if leaf.ndim == 2 and "blocks" in map(_name, path) else "adam"

    parts = {
        "muon": optax.contrib.muon(lambda step: 10 * schedule(step), weight_decay=weight_decay),
        "adam": optax.adamw(schedule, b2=b2, nesterov=True, weight_decay=10 * weight_decay, mask=decayed),
    }
    labels = functools.partial(jax.tree_util.tree_map_with_path, label)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.partition(parts, labels))


def init_state(
    model: HybridCLIP, optimizer: optax.GradientTransformation, seed: int
) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure, and a state that starts from its parameters."""
    graph, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(jnp.array, params)  # copies: the step donates its input, the caller keeps the model
    average = jax.tree.map(jnp.array, params)
    return graph, TrainState(params, average, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(seed))


def make_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, *, image_mean, image_std,
    augmentation: AugmentConfig | None, loss: Callable = clip_loss, drop_path: float = 0.0,
    keep_patches: int | None = None, image_image: float = 0.0, average_decay: float = 0.999,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """A compiled `step(state, batch) -> (state, metrics)`; the old state's memory is reused.

    `batch` is what `loader.batches` yields; `loss` is called as `clip_loss` is, and `image_image` times
    `image_image_loss` is added where it is not 0. The text tower, half as deep in `mini`, takes half of `drop_path`.
    Metrics are scalars: loss, logit_scale (the logarithm), gradient_norm. Without an augmentation the pictures must
    come at the model's own size.
    """
    mean, std = jnp.asarray(image_mean, jnp.float32), jnp.asarray(image_std, jnp.float32)

    def objective(params, batch, key):
        model = nnx.merge(graph, params)
        image_key, tower_key, text_key = jax.random.split(key, 3)
        if augmentation is None:
            pixels = batch["images"].astype(jnp.float32) / 255
        else:
            size = model.config.vision.image_size
            pixels = augment(image_key, batch["images"], batch["may_flip"], size, augmentation)
        image_embeds = model.encode_image(
            (pixels - mean) / std, key=tower_key, drop_path=drop_path, keep_patches=keep_patches
        )
        text_embeds = model.encode_text(
            batch["input_ids"], batch["attention_mask"], key=text_key, drop_path=drop_path / 2
        )
        extra = () if model.logit_bias is None else (model.logit_bias[...],)
        positives = same_concept(batch["concepts"])
        value = loss(image_embeds, text_embeds, model.scale(), *extra, positives=positives)
        if image_image:
            between = image_image_loss(image_embeds, model.scale(), positives)
            return value + image_image * between, value
        return value, value

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(state.key, state.step)
        (_, value), gradients = jax.value_and_grad(objective, has_aux=True)(state.params, batch, key)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        scale = jnp.minimum(params["logit_scale"][...], MAX_LOGIT_SCALE)
        params["logit_scale"] = params["logit_scale"].replace(scale)
        # Early on the average follows closely, so that it never carries the initial weights along (Tarvainen 2017)
        decay = jnp.minimum(average_decay, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.average, params)
        metrics = {"loss": value, "logit_scale": scale, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(params, average, opt_state, state.step + 1, state.key), metrics

    return jax.jit(step, donate_argnums=0)
