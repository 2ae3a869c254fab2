"""The training state and one update: augment, embed, contrast, update, average; frozen parts and the gradient cache."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.training.alarms import count_duplicates, spread
from clipid_utils.training.augment import AugmentConfig, augment
from clipid_utils.training.loss import clip_loss, gather, image_image_loss, same_concept
from clipid_utils.training.optimizers import check_patterns, dotted, matching


class TrainState(NamedTuple):
    """Everything that a step changes, and `frozen`, which it does not."""

    params: nnx.State  # what is trained
    average: nnx.State  # exponential moving average of params
    opt_state: Any  # of `params` alone: what is frozen has none
    step: jax.Array
    key: jax.Array
    frozen: nnx.State
    bad: jax.Array  # [2]: the first step whose gradient was not finite, and the first such leaf; -1 without one


def init_state(
    model: HybridCLIP, optimizer: optax.GradientTransformation, seed: int, trainable: Iterable[str] = ("*",)
) -> tuple[nnx.GraphDef, TrainState]:
    """The model's structure, and a state that starts from its parameters.

    Only parameters whose dotted path fits a pattern of `trainable` are trained; ValueError for one that fits none.
    """
    check_patterns(nnx.state(model, nnx.Param), trainable)
    graph, params, frozen = nnx.split(model, matching(trainable), ...)
    params, frozen = jax.tree.map(jnp.array, (params, frozen))  # copies: the step donates its input
    average = jax.tree.map(jnp.array, params)
    return graph, TrainState(params, average, optimizer.init(params), jnp.zeros((), jnp.int32), jax.random.key(seed),
                             frozen, jnp.full((2,), -1, jnp.int32))


def assemble(graph: nnx.GraphDef, state: TrainState, averaged: bool = True) -> HybridCLIP:
    """The model that a state holds: its averaged weights or the very last ones."""
    return nnx.merge(graph, state.average if averaged else state.params, state.frozen)


def leaf_names(params: nnx.State) -> list[str]:
    """The dotted paths of the trained parameters, in the order in which `bad` counts them."""
    return [dotted(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]


def make_update(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, *, image_mean, image_std,
    augmentation: AugmentConfig | None, loss: Callable = clip_loss, drop_path: float = 0.0,
    keep_patches: int | None = None, image_image: float = 0.0, average_decay: float = 0.999, chunks: int = 1,
    remat: bool = False, axis: str | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """`update(state, batch) -> (state, metrics)`, one step of training, to be compiled by one of `distributed`'s forms.

    `batch` is what a feed yields; `loss` is called as `clip_loss` is, and `image_image` times `image_image_loss` is
    added where it is not 0. The text tower, half as deep in `mini`, takes half of `drop_path`. Without an augmentation
    the pictures must come at the model's own size. What is drawn at random for a pair hangs on the step and on its row
    in the whole batch alone. With `axis` the update is called on every device of that axis, each with its share of the
    batch, and all return the same.

    With `chunks` above 1 the pairs go through the towers in as many parts, twice: first for their embeddings, then,
    once the loss over all of them has given each embedding its gradient, for the parameters' (GradCache, Gao et al.
    2021). The gradient is that of the whole batch; activations take the memory of one part. `remat` computes each block
    anew in the backward pass, so that little has to be kept; a CPU's compiler makes no less memory of it (`cache` in
    data/benchmarks.json).

    Metrics are scalars: loss, logit_scale (the logarithm), gradient_norm, image_spread, text_spread, duplicates,
    bad_step and bad_leaf, which `alarms` explains.
    """
    mean, std = jnp.asarray(image_mean, jnp.float32), jnp.asarray(image_std, jnp.float32)

    def embed(params, frozen, batch, keys):
        model = nnx.merge(graph, params, frozen)
        image_keys, tower_keys, text_keys = keys
        if augmentation is None:
            pixels = batch["images"].astype(jnp.float32) / 255
        else:
            size = model.config.vision.image_size
            pixels = augment(image_keys, batch["images"], batch["may_flip"], size, augmentation)
        pixels = (pixels - mean) / std
        images = model.encode_image(
            pixels, keys=tower_keys, drop_path=drop_path, keep_patches=keep_patches, remat=remat
        )
        texts = model.encode_text(
            batch["input_ids"], batch["attention_mask"], keys=text_keys, drop_path=drop_path / 2, remat=remat
        )
        return images, texts

    def contrast(params, frozen, images, texts, concepts):
        model = nnx.merge(graph, params, frozen)
        bias = () if model.logit_bias is None else (model.logit_bias[...],)
        positives = same_concept(concepts, axis)
        value = loss(images, texts, model.scale(), *bias, positives=positives, axis=axis)
        between = image_image * image_image_loss(images, model.scale(), positives, axis) if image_image else 0.0
        return value + between, value

    def whole(params, frozen, batch, keys):
        def objective(params):
            embeds = embed(params, frozen, batch, keys)
            total, value = contrast(params, frozen, *embeds, batch["concepts"])
            return total, (value, *embeds)

        (_, kept), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        return kept, gradients

    def in_chunks(params, frozen, batch, keys):
        share = len(batch["images"])
        if share % chunks:
            raise ValueError(f"a device's {share} pairs cannot be cut into {chunks} chunks of one size")
        # Every chunk takes from all over the batch, so that each device keeps the rows that it has
        parts = jax.tree.map(lambda x: x.reshape(share // chunks, chunks, *x.shape[1:]).swapaxes(0, 1), (batch, keys))
        rows = jax.lax.map(lambda part: embed(params, frozen, *part), parts)  # [chunks, b / chunks, E]
        images, texts = (x.swapaxes(0, 1).reshape(share, -1) for x in rows)
        (_, value), (gradients, *of_embeds) = jax.value_and_grad(contrast, argnums=(0, 2, 3), has_aux=True)(
            params, frozen, images, texts, batch["concepts"]
        )
        of_rows = [g.reshape(share // chunks, chunks, -1).swapaxes(0, 1) for g in of_embeds]

        def add(gradients, part):
            part, of_embeds = part
            _, back = jax.vjp(lambda params: embed(params, frozen, *part), params)
            return jax.tree.map(jnp.add, gradients, back(tuple(of_embeds))[0]), None

        gradients, _ = jax.lax.scan(add, gradients, (parts, of_rows))
        return (value, images, texts), gradients

    def update(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        share = len(batch["images"])
        first = 0 if axis is None else jax.lax.axis_index(axis) * share
        key = jax.random.fold_in(state.key, state.step)
        keys = jax.vmap(lambda row: jax.random.split(jax.random.fold_in(key, row), 3), out_axes=1)(
            first + jnp.arange(share)
        )
        (value, images, texts), gradients = (whole if chunks == 1 else in_chunks)(
            state.params, state.frozen, batch, tuple(keys)
        )
        if axis is not None:
            value, gradients = jax.lax.pmean((value, gradients), axis)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if "logit_scale" in params:
            most = nnx.merge(graph, params, state.frozen).config.max_logit_scale
            scale = jnp.minimum(params["logit_scale"][...], most)
            params["logit_scale"] = params["logit_scale"].replace(scale)
        else:
            scale = state.frozen["logit_scale"][...]
        # Early on the average follows closely, so that it never carries the initial weights along (Tarvainen 2017)
        decay = jnp.minimum(average_decay, (1.0 + state.step) / (10.0 + state.step))
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.average, params)
        squares = jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)])
        wrong = ~jnp.isfinite(squares)
        bad = jnp.where((state.bad[0] < 0) & wrong.any(), jnp.stack([state.step, wrong.argmax()]), state.bad)
        metrics = {
            "loss": value, "logit_scale": scale, "gradient_norm": jnp.sqrt(squares.sum()),
            "image_spread": spread(gather(images, axis)), "text_spread": spread(gather(texts, axis)),
            "duplicates": count_duplicates(batch["images"], axis), "bad_step": bad[0], "bad_leaf": bad[1],
        }
        state = TrainState(params, average, opt_state, state.step + 1, state.key, state.frozen, bad.astype(jnp.int32))
        return state, metrics

    return update


def make_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, **options
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """`make_update`, compiled; the old state's memory is reused."""
    return jax.jit(make_update(graph, optimizer, **options), donate_argnums=0)
