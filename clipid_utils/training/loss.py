"""Contrastive losses on the global batch; `positives` says which pairs belong together.

With `axis` a loss is called on every device of that mesh axis (under pmap or shard_map), each with its own share of the
batch, b of B pairs. It fetches the other shares and returns the device's part of the loss: the mean over the devices
(`jax.lax.pmean`) is the loss of the whole batch, and the mean of the parts' gradients is its gradient. Without `axis`
the share is the whole, b = B.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def gather(shares: Array, axis: str | None) -> Array:
    """The rows of all devices, in their order."""
    return shares if axis is None else jax.lax.all_gather(shares, axis, tiled=True)


def same_concept(concepts: Int[Array, " b"], axis: str | None = None) -> Bool[Array, "b B"]:
    """The positives mask of a batch: True where two pairs show one concept, so that neither is the other's negative."""
    return concepts[:, None] == gather(concepts, axis)[None, :]


def _own(share: int, axis: str | None) -> Bool[Array, "b B"]:
    """The mask in which each pair of this device's share belongs to itself alone."""
    if axis is None:
        return jnp.eye(share, dtype=bool)
    rows = jax.lax.axis_index(axis) * share + jnp.arange(share)
    return rows[:, None] == jnp.arange(share * jax.lax.axis_size(axis))[None, :]


def clip_loss(
    image_embeds: Float[Array, "b E"],
    text_embeds: Float[Array, "b E"],
    scale: Float[Array, ""] | float,
    positives: Bool[Array, "b B"] | None = None,
    axis: str | None = None,
) -> Float[Array, ""]:
    """Symmetric cross-entropy over the batch (Radford et al. 2021, figure 3), in nats.

    `scale` is exp(logit_scale). Without `positives` each picture has one right text, its own. With it the target is
    spread evenly over a row's positives (UniCL, Yang et al. 2022), so that its least value is the mean log of their
    number. A batch of one pair has no negatives and raises ValueError.
    """
    all_images, all_texts = gather(image_embeds, axis), gather(text_embeds, axis)
    if len(all_images) < 2:
        raise ValueError("clip_loss needs at least 2 pairs: a batch of one has no negatives, and its loss is always 0")
    targets = _own(len(image_embeds), axis) if positives is None else positives
    targets = targets / targets.sum(axis=1, keepdims=True)
    per_image = -(targets * jax.nn.log_softmax(scale * image_embeds @ all_texts.T, axis=1)).sum(axis=1)
    per_text = -(targets * jax.nn.log_softmax(scale * text_embeds @ all_images.T, axis=1)).sum(axis=1)
    return 0.5 * (per_image.mean() + per_text.mean())  # positives are symmetric: one target serves both


def siglip_loss(
    image_embeds: Float[Array, "b E"],
    text_embeds: Float[Array, "b E"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    positives: Bool[Array, "b B"] | None = None,
    axis: str | None = None,
) -> Float[Array, ""]:
    """Sigmoid loss (SigLIP, Zhai et al. 2023, eq. 1): each of the B x B pairs is its own yes-or-no, summed over texts
    and averaged over pictures, in nats. Raises ValueError for a batch of one pair.

    With `axis` the texts go round from device to device (section 3.3), so that none holds more than b x b scores.
    Without `axis`, as under `jit_form`, the compiler gathers the texts.
    """
    share, devices = len(image_embeds), 1 if axis is None else jax.lax.axis_size(axis)
    if share * devices < 2:
        raise ValueError("siglip_loss needs at least 2 pairs: a batch of one has no negatives")
    labels = _own(share, axis) if positives is None else positives

    def of(texts: Array, labels: Array) -> Array:
        logits = scale * image_embeds @ texts.T + bias  # [b, b]
        return -jax.nn.log_sigmoid(jnp.where(labels, logits, -logits)).sum(axis=1).mean()

    if axis is None:
        return of(text_embeds, labels)

    def turn(carried, hop):
        texts, total = carried
        column = (jax.lax.axis_index(axis) + hop) % devices * share  # whose texts these are
        total += jax.checkpoint(of)(texts, jax.lax.dynamic_slice_in_dim(labels, column, share, axis=1))
        onward = [((device + 1) % devices, device) for device in range(devices)]
        return (jax.lax.ppermute(texts, axis, onward), total), None

    (_, total), _ = jax.lax.scan(turn, (text_embeds, jnp.zeros(())), jnp.arange(devices))
    return total


def image_image_loss(
    image_embeds: Float[Array, "b E"], scale: Float[Array, ""] | float, positives: Bool[Array, "b B"],
    axis: str | None = None,
) -> Float[Array, ""]:
    """Supervised contrastive loss between pictures (SupCon, Khosla et al. 2020, eq. 2), in nats.

    The drawings of one concept by two artists attract each other. Pictures without another of their concept in the
    batch are left out; 0 if all are.
    """
    others = ~_own(len(image_embeds), axis)
    logits = scale * image_embeds @ gather(image_embeds, axis).T
    logits = jnp.where(others, logits, jnp.finfo(jnp.float32).min)  # [b, B]
    targets = positives & others
    count = targets.sum(axis=1)
    per_image = -jnp.where(targets, jax.nn.log_softmax(logits, axis=1), 0.0).sum(axis=1) / jnp.maximum(count, 1)
    counted = (count > 0).sum()
    if axis is not None:
        counted = jax.lax.pmean(counted.astype(jnp.float32), axis)
    return per_image.sum() / jnp.maximum(counted, 1 if axis is None else 1 / jax.lax.axis_size(axis))
