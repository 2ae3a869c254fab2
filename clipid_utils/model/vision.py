"""The image tower: a vision transformer, CLIP's, ViT's, DINOv2's or SigLIP's.

CLIP's has a class token, ln_pre, pre-norm blocks, ln_post and a projection without bias (Radford et al. 2021). The
first ViT has no ln_pre, a bias in its patches and a pooler (Dosovitskiy et al. 2021). DINOv2 is a ViT without a pooler
and with layer scale (Oquab et al. 2024). SigLIP has no class token: a head attends over the patches (Zhai et al. 2023).
Published weights fit all.

Letters in shapes: B batch, H height, W width, P patches, L tokens (1 + P, or P), D width, E embedding.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from clipid_utils.model import layers
from clipid_utils.model.config import VisionConfig
from clipid_utils.model.layers import Arrays


class VisionTransformer(nnx.Module):
    """Pixels in, projected features out (not of unit length)."""

    def __init__(self, config: VisionConfig, embed_dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        if config.class_token and config.image_size % config.patch_size:  # SigLIP's are trained with a rest
            raise ValueError(f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}")
        self.config, self.dtype = config, dtype
        width = config.width
        init = nnx.initializers.normal(width**-0.5)
        self.class_embedding = nnx.Param(init(rngs.params(), (width,))) if config.class_token else None
        self.position_embedding = nnx.Param(init(rngs.params(), (config.grid**2 + config.class_token, width)))
        patch = 3 * config.patch_size**2
        self.patch_embedding = layers.linear(patch, width, dtype=dtype, rngs=rngs, bias=config.patch_bias)
        norm = {"epsilon": config.norm_eps, "dtype": dtype, "rngs": rngs}
        self.ln_pre = layers.LayerNorm(width, **norm) if config.ln_pre else None
        self.blocks = layers.blocks_of(config, pre_norm=True, dtype=dtype, rngs=rngs)
        self.ln_post = layers.LayerNorm(width, **norm)
        pooling = layers.check_pooling(config, *(("class", "pooler") if config.class_token else ("attention",)))
        self.pooler = layers.linear(width, width, dtype=dtype, rngs=rngs) if pooling == "pooler" else None
        self.head = layers.AttentionPool(config, dtype=dtype, rngs=rngs) if pooling == "attention" else None
        self.projection = layers.projection(config, embed_dim, dtype=dtype, rngs=rngs)

    def patchify(self, pixel_values: Float[Arrays, "B H W 3"]) -> Float[Array, "B P patch"]:
        """Non-overlapping patches, row by row, each flattened as (row, column, channel).

        Pixels beyond the last whole patch are not used, as in a convolution without padding.
        """
        pixel_values = jnp.asarray(pixel_values)
        size, grid = self.config.patch_size, self.config.grid
        if pixel_values.shape[1:] != (self.config.image_size, self.config.image_size, 3):
            side = self.config.image_size
            raise ValueError(f"pixel_values have shape {pixel_values.shape}; the model expects [B, {side}, {side}, 3]: "
                             "use the checkpoint's own processor")
        x = pixel_values[:, : grid * size, : grid * size]
        x = x.reshape(-1, grid, size, grid, size, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(x.shape[0], grid**2, 3 * size**2)

    def tokens(
        self, pixel_values: Float[Arrays, "B H W 3"], *, keys: Key[Array, " B"] | None = None, drop_path: float = 0.0,
        keep_patches: int | None = None, remat: bool = False,
    ) -> Float[Array, "B L D"]:
        """The class token, if there is one, and the patch tokens after the last block, before ln_post.

        With `keys`, one for each picture, only `keep_patches` patches of each picture are computed, drawn at random
        (FLIP, Li et al. 2023), and `drop_path` is the last layer's chance to be skipped. `remat` computes each block
        again in the backward pass instead of keeping its inner values (Chen et al. 2016).
        """
        patches = self.patchify(pixel_values.astype(self.dtype))  # [B, P, patch]
        batch, count, _ = patches.shape
        position = self.position_embedding[...].astype(self.dtype)
        place = position[None, self.config.class_token :]
        if keys is not None and keep_patches is not None and keep_patches < count:
            drawn = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
            chosen = jnp.argsort(drawn, axis=1)[:, :keep_patches]
            patches = jnp.take_along_axis(patches, chosen[..., None], axis=1)
            place = jnp.take(place[0], chosen, axis=0)  # [B, kept, D]
        x = self.patch_embedding(patches) + place
        if self.class_embedding is not None:
            first = self.class_embedding[...].astype(self.dtype) + position[0]
            x = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, x.shape[-1])), x], axis=1)  # [B, 1 + P, D]
        x = x if self.ln_pre is None else self.ln_pre(x)
        keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        return layers.through_blocks(self.blocks, x, (None,), keys, drop_path, remat)

    def pool(self, tokens: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The output of `tokens`, each on its own, normalised and through the pooler or the head if there is one."""
        x = self.ln_post(tokens)
        if self.head is not None:
            return self.head(x.reshape(-1, 1, x.shape[-1])).reshape(x.shape)
        return x if self.pooler is None else jnp.tanh(self.pooler(x))

    def patches(self, pixel_values: Float[Arrays, "B H W 3"]) -> Float[Array, "B P D"]:
        """One vector for each patch, row by row, before the projection."""
        return self.pool(self.tokens(pixel_values)[:, self.config.class_token :])

    def pooled(self, pixel_values: Float[Arrays, "B H W 3"], **training) -> Float[Array, "B D"]:
        """One vector for each picture, before the projection. `training` has the options of `tokens`."""
        tokens = self.tokens(pixel_values, **training)
        return self.pool(tokens[:, 0]) if self.head is None else self.head(self.ln_post(tokens))

    def __call__(self, pixel_values: Float[Arrays, "B H W 3"], **training) -> Float[Array, "B E"]:
        return self.projection(self.pooled(pixel_values, **training))  # [B, E]
