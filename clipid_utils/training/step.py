"""The training state and one update: augment, embed, compare, update, average; frozen parts and the gradient cache."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from clipid_utils.training.alarms import spread
from clipid_utils.training.augment import AugmentConfig, augment
from clipid_utils.training.loss import clip_loss, gather, image_image_loss, positive_pairs
from clipid_utils.training.optimizers import check_patterns, matching


class TrainState(NamedTuple):
    """Everything that a step changes, and `frozen`, which it does not change."""

    params: nnx.State  # the trained parameters
    average: nnx.State  # their exponential moving average, in float32
    opt_state: Any  # of `params` alone, in float32
    step: jax.Array
    key: jax.Array
    frozen: nnx.State
    bad: jax.Array  # the first step whose gradient was not finite; -1 if there is none


def _float32(tree):
    """Floating-point leaves in float32. In bfloat16 an average never moves: 1 + 0.001 is 1."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def init_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, seed: int, trainable: Iterable[str] = ("*",)
) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure, and a state that starts from its parameters.

    Only parameters whose dotted path fits a pattern of `trainable` are trained; a pattern that fits none raises
    ValueError. The average, the optimizer's state, and logit_scale and logit_bias are float32, whatever the model is.
    """
    check_patterns(nnx.state(model, nnx.Param), trainable)
    graph, params, frozen = nnx.split(model, matching(trainable), ...)
    params, frozen = jax.tree.map(jnp.array, (params, frozen))  # copies: the step donates its input
    for part in (params, frozen):
        for name in {"logit_scale", "logit_bias"} & set(part):
            part[name] = _float32(part[name])
    average = jax.tree.map(jnp.copy, _float32(params))
    return graph, TrainState(params, average, optimizer.init(_float32(params)), jnp.zeros((), jnp.int32),
                             jax.random.key(seed), frozen, jnp.full((), -1, jnp.int32))


def assemble(graph: nnx.GraphDef, state: TrainState, averaged: bool = True) -> Any:
    """The model of a state, with its averaged weights or the last ones."""
    return nnx.merge(graph, state.average if averaged else state.params, state.frozen)


def apply_gradients(
    state: TrainState, gradients: nnx.State, optimizer: optax.GradientTransformation, *, average_decay: float = 0.0,
    max_logit_scale: float | None = None,
) -> tuple[TrainState, dict]:
    """The state after one update of any training, and its metrics gradient_norm and bad_step.

    `average_decay` 0 keeps no average: it is then equal to the parameters. logit_scale, if it is trained, is clamped.
    """
    gradients = _float32(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, _float32(state.params))
    params = optax.apply_updates(state.params, updates)
    if max_logit_scale is not None and "logit_scale" in params:
        scale = jnp.minimum(params["logit_scale"][...], max_logit_scale)
        params["logit_scale"] = params["logit_scale"].replace(scale)
    average = _float32(params)
    if average_decay:
        # At first the average follows closely, so that it does not keep the initial weights (Tarvainen & Valpola 2017)
        decay = jnp.minimum(average_decay, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.average, average)
    norm = optax.tree.norm(gradients)
    bad = jnp.where((state.bad < 0) & ~jnp.isfinite(norm), state.step, state.bad)
    state = state._replace(params=params, average=average, opt_state=opt_state, step=state.step + 1, bad=bad)
    return state, {"gradient_norm": norm, "bad_step": bad}


def _embedder(graph: nnx.GraphDef, mean, std, augmentation: AugmentConfig | None, options: dict) -> Callable:
    """The `embed` of `contrastive_update` for a whole model."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

    def embed(params, frozen, batch, keys):
        model = nnx.merge(graph, params, frozen)
        image_keys, tower_keys, text_keys = keys
        if augmentation is None:
            pixels = batch["images"].astype(jnp.float32) / 255
        else:
            size = model.config.vision.image_size
            pixels = augment(image_keys, batch["images"], batch["may_flip"], size, augmentation)
        images = model.encode_image((pixels - mean) / std, keys=tower_keys, **options)
        texts = model.encode_text(batch["input_ids"], batch["attention_mask"], keys=text_keys,
                                  drop_path=options["drop_path"] / 2, remat=options["remat"])
        return images, texts

    return embed


def _whole_batch(embed: Callable, contrast: Callable) -> Callable:
    """The function to loss, embeddings and gradients, with the whole batch in the towers at once."""

    def gradients_of(params, frozen, batch, keys):
        def objective(params):
            embeds = embed(params, frozen, batch, keys)
            total, value = contrast(params, frozen, *embeds, batch)
            return total, (value, *embeds)

        (_, values), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        return values, gradients

    return gradients_of


def _in_chunks(embed: Callable, contrast: Callable, chunks: int) -> Callable:
    """The same in `chunks` parts (GradCache, Gao et al. 2021): first the embeddings, then the gradients."""

    def gradients_of(params, frozen, batch, keys):
        share = len(batch["images"])
        if share % chunks:
            raise ValueError(f"a device's {share} pairs cannot be divided into {chunks} chunks of equal size")

        def cut(x):  # every chunk takes from all over the batch, so that each device keeps its rows
            return x.reshape(share // chunks, chunks, *x.shape[1:]).swapaxes(0, 1)

        parts = jax.tree.map(cut, (batch, keys))
        rows = jax.lax.map(lambda part: embed(params, frozen, *part), parts)  # [chunks, b / chunks, E]
        images, texts = (x.swapaxes(0, 1).reshape(share, -1) for x in rows)
        (_, value), (gradients, *of_embeds) = jax.value_and_grad(contrast, argnums=(0, 2, 3), has_aux=True)(
            params, frozen, images, texts, batch)

        def add(gradients, part):
            part, of_embeds = part
            _, back = jax.vjp(lambda params: embed(params, frozen, *part), params)
            return jax.tree.map(jnp.add, gradients, back(tuple(of_embeds))[0]), None

        gradients, _ = jax.lax.scan(add, gradients, (parts, [cut(g) for g in of_embeds]))
        return (value, images, texts), gradients

    return gradients_of


def make_update(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, *, image_mean, image_std,
    augmentation: AugmentConfig | None, loss: Callable = clip_loss, drop_path: float = 0.0,
    keep_patches: int | None = None, image_image: float = 0.0, average_decay: float = 0.999, chunks: int = 1,
    remat: bool = False, axis: str | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """`update(state, batch) -> (state, metrics)`, one step of training, to be compiled by a form of `distributed`.

    `batch` comes from a feed. `loss` is called as `clip_loss` is; `image_image` times `image_image_loss` is added to
    it. The text tower, half as deep in `mini`, gets half of `drop_path`. Without an augmentation the pictures must have
    the model's size. The random numbers for a pair depend only on the step and on its row in the whole batch. With
    `axis`, every device of that axis calls the update with its share of the batch, and all return the same.

    With `chunks` above 1 the pairs pass through the towers in that many parts, twice: activations need the memory of
    one part, and the gradient is that of the whole batch. `remat` computes each block again in the backward pass, which
    saves memory on accelerators (on a CPU hardly any: `cache` in data/benchmarks.json).

    Metrics are scalars: loss, logit_scale (the logarithm), gradient_norm, image_spread, text_spread and bad_step;
    `alarms` explains them.
    """
    options = {"drop_path": drop_path, "keep_patches": keep_patches, "remat": remat}
    embed = _embedder(graph, image_mean, image_std, augmentation, options)
    return contrastive_update(graph, optimizer, embed, loss=loss, image_image=image_image, average_decay=average_decay,
                              chunks=chunks, axis=axis)


def contrastive_update(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, embed: Callable, *, loss: Callable = clip_loss,
    image_image: float = 0.0, average_decay: float = 0.0, chunks: int = 1, axis: str | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """The update of `make_update` for any `embed`.

    `embed(params, frozen, batch, keys)` gives the unit vectors of a batch; `keys` are three for each pair.
    """

    def contrast(params, frozen, images, texts, batch):
        model = nnx.merge(graph, params, frozen)
        bias = () if model.logit_bias is None else (model.logit_bias[...],)
        positives = positive_pairs(batch, axis)
        value = loss(images, texts, model.scale(), *bias, positives=positives, axis=axis)
        between = image_image * image_image_loss(images, model.scale(), positives, axis) if image_image else 0.0
        return value + between, value

    gradients_of = _whole_batch(embed, contrast) if chunks == 1 else _in_chunks(embed, contrast, chunks)

    def update(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        share = len(batch["images"])
        first = 0 if axis is None else jax.lax.axis_index(axis) * share
        key = jax.random.fold_in(state.key, state.step)
        keys = jax.vmap(lambda row: jax.random.split(jax.random.fold_in(key, row), 3), out_axes=1)(
            first + jnp.arange(share))
        (value, images, texts), gradients = gradients_of(state.params, state.frozen, batch, tuple(keys))
        if axis is not None:
            value, gradients = jax.lax.pmean((value, gradients), axis)
        most = nnx.merge(graph, state.params, state.frozen).config.max_logit_scale
        state, metrics = apply_gradients(state, gradients, optimizer, average_decay=average_decay, max_logit_scale=most)
        holder = state.params if "logit_scale" in state.params else state.frozen
        return state, {
            "loss": value, "logit_scale": holder["logit_scale"][...], **metrics,
            "image_spread": spread(gather(images, axis)), "text_spread": spread(gather(texts, axis)),
        }

    return update


def make_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, **options
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """`make_update`, compiled; the old state's memory is reused."""
    return jax.jit(make_update(graph, optimizer, **options), donate_argnums=0)
