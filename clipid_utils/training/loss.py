"""Contrastive losses, written once on the global batch; `positives` says which pairs belong together."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def same_concept(concepts: Int[Array, " B"]) -> Bool[Array, "B B"]:
    """The positives mask of a batch: True where two pairs show one concept, so that neither is the other's negative."""
    return concepts[:, None] == concepts[None, :]


def clip_loss(
    image_embeds: Float[Array, "B E"],
    text_embeds: Float[Array, "B E"],
    scale: Float[Array, ""] | float,
    positives: Bool[Array, "B B"] | None = None,
) -> Float[Array, ""]:
    """Symmetric cross-entropy over the batch (Radford et al. 2021, figure 3), in nats.

    `scale` is exp(logit_scale). Without `positives` each picture has one right text, its own. With it the target is
    spread evenly over a row's positives (UniCL, Yang et al. 2022), so that its least value is the mean log of their
    number. A batch of one pair has no negatives and raises ValueError.
    """
    batch = image_embeds.shape[0]
    if batch < 2:
        raise ValueError("clip_loss needs at least 2 pairs: a batch of one has no negatives, and its loss is always 0")
    logits = scale * image_embeds @ text_embeds.T  # [B, B]
    targets = jnp.eye(batch) if positives is None else positives / positives.sum(axis=1, keepdims=True)
    per_image = -(targets * jax.nn.log_softmax(logits, axis=1)).sum(axis=1)
    per_text = -(targets * jax.nn.log_softmax(logits.T, axis=1)).sum(axis=1)  # positives are symmetric
    return 0.5 * (per_image.mean() + per_text.mean())


def siglip_loss(
    image_embeds: Float[Array, "B E"],
    text_embeds: Float[Array, "B E"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    positives: Bool[Array, "B B"] | None = None,
) -> Float[Array, ""]:
    """Sigmoid loss (SigLIP, Zhai et al. 2023, eq. 1): each of the B x B pairs is its own yes-or-no, summed over texts
    and averaged over pictures, in nats. Raises ValueError for a batch of one pair."""
    batch = image_embeds.shape[0]
    if batch < 2:
        raise ValueError("siglip_loss needs at least 2 pairs: a batch of one has no negatives")
    labels = jnp.eye(batch, dtype=bool) if positives is None else positives
    logits = scale * image_embeds @ text_embeds.T + bias  # [B, B]
    return -jax.nn.log_sigmoid(jnp.where(labels, logits, -logits)).sum(axis=1).mean()


def image_image_loss(
    image_embeds: Float[Array, "B E"], scale: Float[Array, ""] | float, positives: Bool[Array, "B B"]
) -> Float[Array, ""]:
    """Supervised contrastive loss between pictures (SupCon, Khosla et al. 2020, eq. 2), in nats.

    The drawings of one concept by two artists attract each other. Pictures without another of their concept in the
    batch are left out; 0 if all are.
    """
    others = ~jnp.eye(image_embeds.shape[0], dtype=bool)
    logits = jnp.where(others, scale * image_embeds @ image_embeds.T, jnp.finfo(jnp.float32).min)  # [B, B]
    targets = positives & others
    count = targets.sum(axis=1)
    per_image = -jnp.where(targets, jax.nn.log_softmax(logits, axis=1), 0.0).sum(axis=1) / jnp.maximum(count, 1)
    return per_image.sum() / jnp.maximum((count > 0).sum(), 1)
