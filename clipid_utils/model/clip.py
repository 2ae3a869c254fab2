"""The hybrid CLIP: an image tower and a text tower that share one embedding space (Radford et al. 2021).

`dtype` is the type of the products. Parameters are created in float32; a checkpoint can be loaded in another type.

Letters in shapes: B pictures, T texts, H height, W width, P patches, L tokens, E embedding.
"""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from clipid_utils.model.config import CLIPConfig, EfficientNetConfig
from clipid_utils.model.efficientnet import EfficientNetLite
from clipid_utils.model.layers import Arrays
from clipid_utils.model.ops import normalize
from clipid_utils.model.pretrained.towers import join_towers
from clipid_utils.model.text import TextEncoder
from clipid_utils.model.vision import VisionTransformer


class CLIPOutput(NamedTuple):
    """The output of a whole forward pass: unit vectors and their scaled products."""

    logits_per_image: Float[Array, "B T"]
    logits_per_text: Float[Array, "T B"]
    image_embeds: Float[Array, "B E"]
    text_embeds: Float[Array, "T E"]


class HybridCLIP(nnx.Module):
    """An image tower and a text tower with a learned scale between them.

    `logit_scale` is stored as a logarithm, as in CLIP. The model uses at most `config.max_logit_scale`, ln 100.
    """

    def __init__(self, config: CLIPConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        tower = EfficientNetLite if isinstance(config.vision, EfficientNetConfig) else VisionTransformer
        self.vision = tower(config.vision, config.embed_dim, dtype=dtype, rngs=rngs)
        self.text = TextEncoder(config.text, config.embed_dim, dtype=dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale, jnp.float32))
        self.logit_bias = None if config.logit_bias is None else nnx.Param(jnp.asarray(config.logit_bias, jnp.float32))

    @classmethod
    def from_towers(cls, vision: str | os.PathLike, text: str | os.PathLike, **options) -> "HybridCLIP":
        """The model of `load_towers`, with the same options, without its processor."""
        return join_towers(cls, vision, text, **options)

    def encode_image(self, pixel_values: Float[Arrays, "B H W 3"], **training) -> Float[Array, "B E"]:
        """Unit vectors of normalised pixels. `training` has the options of the tower's `tokens`."""
        return normalize(self.vision(pixel_values, **training))

    def encode_text(
        self, input_ids: Int[Arrays, "B L"], attention_mask: Int[Arrays, "B L"], **training
    ) -> Float[Array, "B E"]:
        """Unit vectors of tokenised texts. `training` has the options of the tower's `tokens`.

        Raises ValueError for more tokens than the tower takes and for ids that its embedding table does not have.
        """
        return normalize(self.text(input_ids, attention_mask, **training))

    def encode_patches(self, pixel_values: Float[Arrays, "B H W 3"]) -> Float[Array, "B P E"]:
        """Unit vectors of every patch or cell, row by row, projected like the whole picture (Zhou et al. 2022)."""
        return normalize(self.vision.projection(self.vision.patches(pixel_values)))

    def scale(self) -> Float[Array, ""]:
        """exp(logit_scale), at most 100."""
        scale, largest = self.logit_scale[...], self.config.max_logit_scale
        return jnp.exp(jnp.where(scale > largest, largest, scale))  # at the limit, minimum would halve the gradient

    def __call__(
        self, pixel_values: Float[Arrays, "B H W 3"], input_ids: Int[Arrays, "T L"], attention_mask: Int[Arrays, "T L"]
    ) -> CLIPOutput:
        """Embeddings and logits: exp(logit_scale) * image_embeds @ text_embeds.T, plus logit_bias if there is one."""
        image_embeds = self.encode_image(pixel_values)
        text_embeds = self.encode_text(input_ids, attention_mask)
        # At its default precision a TPU would round the vectors to bfloat16, and the scale multiplies the error
        cosines = jnp.matmul(image_embeds, text_embeds.T, precision=jax.lax.Precision.HIGHEST)
        logits = self.scale() * cosines  # [B, T]
        if self.logit_bias is not None:
            logits = logits + self.logit_bias[...]
        return CLIPOutput(logits, logits.T, image_embeds, text_embeds)
