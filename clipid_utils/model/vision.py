"""The image tower: a vision transformer, CLIP's or ViT's.

CLIP's has a class token, ln_pre, pre-norm blocks, ln_post and a projection without bias (Radford et al. 2021). The
first ViT has no ln_pre, a bias in its patches and a pooler (Dosovitskiy et al. 2021). Published weights fit both.

Letters in shapes: B batch, H height, W width, P patches, L tokens (1 + P), D width, E embedding.
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
        if config.image_size % config.patch_size:
            raise ValueError(f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}")
        self.config, self.dtype = config, dtype
        width = config.width
        init = nnx.initializers.normal(width**-0.5)
        self.class_embedding = nnx.Param(init(rngs.params(), (width,)))
        self.position_embedding = nnx.Param(init(rngs.params(), (config.grid**2 + 1, width)))
        patch = 3 * config.patch_size**2
        self.patch_embedding = layers.linear(patch, width, dtype=dtype, rngs=rngs, bias=config.patch_bias)
        norm = {"epsilon": config.norm_eps, "dtype": dtype, "rngs": rngs}
        self.ln_pre = layers.LayerNorm(width, **norm) if config.ln_pre else None
        self.blocks = layers.blocks_of(config, pre_norm=True, dtype=dtype, rngs=rngs)
        self.ln_post = layers.LayerNorm(width, **norm)
        pooler = layers.check_pooling(config, "class", "pooler") == "pooler"
        self.pooler = layers.linear(width, width, dtype=dtype, rngs=rngs) if pooler else None
        self.projection = layers.linear(width, embed_dim, dtype=dtype, rngs=rngs, bias=False)

    def patchify(self, pixel_values: Float[Arrays, "B H W 3"]) -> Float[Array, "B P patch"]:
        """Non-overlapping patches, row by row, each flattened as (row, column, channel)."""
        pixel_values = jnp.asarray(pixel_values)
        size, grid = self.config.patch_size, self.config.grid
        if pixel_values.shape[1:] != (self.config.image_size, self.config.image_size, 3):
            side = self.config.image_size
            raise ValueError(f"pixel_values have shape {pixel_values.shape}; this model wants [B, {side}, {side}, 3]: "
                             "use the checkpoint's own processor")
        x = pixel_values.reshape(-1, grid, size, grid, size, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(x.shape[0], grid**2, 3 * size**2)

    def tokens(
        self, pixel_values: Float[Arrays, "B H W 3"], *, keys: Key[Array, " B"] | None = None, drop_path: float = 0.0,
        keep_patches: int | None = None, remat: bool = False,
    ) -> Float[Array, "B L D"]:
        """The class token and the patch tokens after the last block, before ln_post.

        With `keys`, one for each picture, only `keep_patches` patches of each picture are computed, drawn at random
        (FLIP, Li et al. 2023), and `drop_path` is the last layer's chance to be skipped. `remat` computes each block
        again in the backward pass instead of keeping its inner values (Chen et al. 2016).
        """
        patches = self.patchify(pixel_values.astype(self.dtype))  # [B, P, patch]
        batch, count, _ = patches.shape
        position = self.position_embedding[...].astype(self.dtype)
        place = position[None, 1:]
        if keys is not None and keep_patches is not None and keep_patches < count:
            drawn = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
            chosen = jnp.argsort(drawn, axis=1)[:, :keep_patches]
            patches = jnp.take_along_axis(patches, chosen[..., None], axis=1)
            place = jnp.take(place[0], chosen, axis=0)  # [B, kept, D]
        x = self.patch_embedding(patches) + place
        first = jnp.broadcast_to(self.class_embedding[...].astype(self.dtype) + position[0], (batch, 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1)  # [B, 1 + P, D]
        x = x if self.ln_pre is None else self.ln_pre(x)
        keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        return layers.through_blocks(self.blocks, x, (None,), keys, drop_path, remat)

    def pool(self, tokens: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The output of `tokens`, each on its own, normalised and through the pooler if there is one."""
        x = self.ln_post(tokens)
        return x if self.pooler is None else jnp.tanh(self.pooler(x))

    def patches(self, pixel_values: Float[Arrays, "B H W 3"]) -> Float[Array, "B P D"]:
        """One vector for each patch, row by row, before the projection."""
        return self.pool(self.tokens(pixel_values)[:, 1:])

    def pooled(self, pixel_values: Float[Arrays, "B H W 3"], **training) -> Float[Array, "B D"]:
        """One vector for each picture, before the projection. `training` has the options of `tokens`."""
        return self.pool(self.tokens(pixel_values, **training)[:, 0])

    def __call__(self, pixel_values: Float[Arrays, "B H W 3"], **training) -> Float[Array, "B E"]:
        return self.projection(self.pooled(pixel_values, **training))  # [B, E]
