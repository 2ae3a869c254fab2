"""Contrastive losses on the whole batch; the mask `positives` says which pairs belong together.

With `axis`, a loss is called on every device of that mesh axis (under pmap or shard_map), each with its own share of
the batch: b of B pairs. It fetches the other shares and returns this device's part of the loss. The mean of the parts
over the devices (`jax.lax.pmean`) is the loss of the whole batch, and the mean of their gradients is its gradient.
Without `axis` the share is the whole batch, b = B.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def gather(shares: Array, axis: str | None) -> Array:
    """The rows of all devices, in their order."""
    return shares if axis is None else jax.lax.all_gather(shares, axis, tiled=True)


def same_concept(concepts: Int[Array, " b"], axis: str | None = None) -> Bool[Array, "b B"]:
    """True where two pairs show the same concept."""
    return concepts[:, None] == gather(concepts, axis)[None, :]


def positive_pairs(batch: Mapping[str, Array], axis: str | None = None) -> Bool[Array, "b B"]:
    """True where two pairs are positives of each other: they show the same concept or have the same caption.

    `batch` has `concepts` int32 [b] and may have `caption_ids` int32 [b, 2], 64 bits of a hash of the caption.
    """
    positives = same_concept(batch["concepts"], axis)
    if "caption_ids" in batch:
        captions = batch["caption_ids"]
        positives |= (captions[:, None] == gather(captions, axis)[None, :]).all(axis=-1)
    return positives


def _itself(share: int, axis: str | None) -> Bool[Array, "b B"]:
    """True where a pair of this device's share meets itself."""
    if axis is None:
        return jnp.eye(share, dtype=bool)
    rows = jax.lax.axis_index(axis) * share + jnp.arange(share)
    return rows[:, None] == jnp.arange(share * jax.lax.axis_size(axis))[None, :]


def _logits(rows: Float[Array, "b E"], columns: Float[Array, "B E"], scale) -> Float[Array, "b B"]:
    """Scaled cosines in full precision: a TPU would round them to bfloat16, and the scale, up to 100, the error."""
    return jnp.matmul(scale * rows, columns.T, precision=jax.lax.Precision.HIGHEST)


def clip_loss(
    image_embeds: Float[Array, "b E"],
    text_embeds: Float[Array, "b E"],
    scale: Float[Array, ""] | float,
    positives: Bool[Array, "b B"] | None = None,
    axis: str | None = None,
) -> Float[Array, ""]:
    """Symmetric cross-entropy over the batch, in nats (Radford et al. 2021, figure 3).

    `scale` is exp(logit_scale). Without `positives`, a picture's only right text is its own. With `positives`, the
    target is spread evenly over a row's positives (UniCL, Yang et al. 2022); the lowest possible loss is then the mean
    logarithm of their number. Raises ValueError for a batch of one pair, which has no negatives.
    """
    all_images, all_texts = gather(image_embeds, axis), gather(text_embeds, axis)
    if len(all_images) < 2:
        raise ValueError("clip_loss needs at least 2 pairs: a batch of one has no negatives, and its loss is always 0")
    targets = _itself(len(image_embeds), axis) if positives is None else positives
    targets = targets / targets.sum(axis=1, keepdims=True)
    per_image = -(targets * jax.nn.log_softmax(_logits(image_embeds, all_texts, scale), axis=1)).sum(axis=1)
    per_text = -(targets * jax.nn.log_softmax(_logits(text_embeds, all_images, scale), axis=1)).sum(axis=1)
    return 0.5 * (per_image.mean() + per_text.mean())  # positives are symmetric, so one target serves both


def siglip_loss(
    image_embeds: Float[Array, "b E"],
    text_embeds: Float[Array, "b E"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    positives: Bool[Array, "b B"] | None = None,
    axis: str | None = None,
) -> Float[Array, ""]:
    """Sigmoid loss, in nats (SigLIP, Zhai et al. 2023, equation 1): each of the B x B pairs is a yes-or-no question.

    It is summed over the texts and averaged over the pictures. Raises ValueError for a batch of one pair. With `axis`
    the texts travel from device to device (section 3.3), so a device never has more than b x b scores. Without `axis`,
    as under `jit_form`, the compiler gathers the texts.
    """
    share, devices = len(image_embeds), 1 if axis is None else jax.lax.axis_size(axis)
    if share * devices < 2:
        raise ValueError("siglip_loss needs at least 2 pairs: a batch of one has no negatives")
    labels = _itself(share, axis) if positives is None else positives

    def loss_with(texts: Array, labels: Array) -> Array:
        logits = _logits(image_embeds, texts, scale) + bias  # [b, b]
        return -jax.nn.log_sigmoid(jnp.where(labels, logits, -logits)).sum(axis=1).mean()

    if axis is None:
        return loss_with(text_embeds, labels)

    def turn(carried, hop):
        texts, total = carried
        column = (jax.lax.axis_index(axis) + hop) % devices * share  # the first column of these texts
        total += jax.checkpoint(loss_with)(texts, jax.lax.dynamic_slice_in_dim(labels, column, share, axis=1))
        ring = [((device + 1) % devices, device) for device in range(devices)]
        return (jax.lax.ppermute(texts, axis, ring), total), None

    (_, total), _ = jax.lax.scan(turn, (text_embeds, jnp.zeros(())), jnp.arange(devices))
    return total


def image_image_loss(
    image_embeds: Float[Array, "b E"], scale: Float[Array, ""] | float, positives: Bool[Array, "b B"],
    axis: str | None = None,
) -> Float[Array, ""]:
    """Supervised contrastive loss between pictures, in nats (SupCon, Khosla et al. 2020, equation 2).

    Pictures of the same concept, such as the drawings of two artists, attract each other. A picture without a second
    one of its concept in the batch is left out; the loss is 0 if all are.
    """
    others = ~_itself(len(image_embeds), axis)
    logits = _logits(image_embeds, gather(image_embeds, axis), scale)
    logits = jnp.where(others, logits, jnp.finfo(jnp.float32).min)  # [b, B]
    targets = positives & others
    count = targets.sum(axis=1)
    per_image = -jnp.where(targets, jax.nn.log_softmax(logits, axis=1), 0.0).sum(axis=1) / jnp.maximum(count, 1)
    counted = (count > 0).sum()
    if axis is not None:
        counted = jax.lax.pmean(counted.astype(jnp.float32), axis)
    return per_image.sum() / jnp.maximum(counted, 1 if axis is None else 1 / jax.lax.axis_size(axis))
