"""The blocks of ModernBERT (Warner et al. 2024).

They have rotary positions, attention to all tokens or to near ones, and a gated MLP. No layer has a bias, and the first
block has no norm before its attention.

Letters in shapes: B batch, L tokens, H heads, K size of a head, D width.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from clipid_utils.model import layers, ops
from clipid_utils.model.config import TextConfig


def rotated(x: Float[Array, "B L H K"], theta: float) -> Float[Array, "B L H K"]:
    """Queries or keys turned by their positions (Su et al. 2021), in float32; wavelengths grow up to 2 pi `theta`."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * theta ** (-jnp.arange(half) / half)  # [L, 1, K/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with rotary positions, to all tokens or to `window` on each side."""

    def __init__(self, config: TextConfig, *, local: bool, dtype, rngs: nnx.Rngs):
        width, self.heads = config.width, config.heads
        self.window = config.rotary.window if local else None
        self.theta = config.rotary.local_theta if local else config.rotary.global_theta
        self.q_proj = layers.linear(width, width, dtype=dtype, rngs=rngs, bias=False)
        self.k_proj = layers.linear(width, width, dtype=dtype, rngs=rngs, bias=False)
        self.v_proj = layers.linear(width, width, dtype=dtype, rngs=rngs, bias=False)
        self.out_proj = layers.linear(width, width, std=layers.residual_std(config), dtype=dtype, rngs=rngs, bias=False)

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B #L L"],  # noqa: F821
    ) -> Float[Array, "B L D"]:
        length = x.shape[1]
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (project(x).reshape(*x.shape[:2], self.heads, -1) for project in projections)
        if self.window is not None:
            place = jnp.arange(length)
            mask = mask & (jnp.abs(place[:, None] - place) <= self.window)
        attended = ops.attention(rotated(q, self.theta), rotated(k, self.theta), v, mask)
        return self.out_proj(attended.reshape(x.shape))


class Block(nnx.Module):
    """One pre-norm layer with a gated MLP: GELU of one half times the other half (Shazeer 2020)."""

    def __init__(self, config: TextConfig, layer: int, *, dtype, rngs: nnx.Rngs):
        norm = {"epsilon": config.norm_eps, "use_bias": False, "dtype": dtype, "rngs": rngs}
        self.ln_1 = layers.LayerNorm(config.width, **norm) if layer else None
        self.attn = Attention(config, local=config.rotary.layers[layer] == "local", dtype=dtype, rngs=rngs)
        self.ln_2 = layers.LayerNorm(config.width, **norm)
        self.fc1 = layers.linear(config.width, 2 * config.mlp_dim, dtype=dtype, rngs=rngs, bias=False)
        self.fc2 = layers.linear(config.mlp_dim, config.width, std=layers.residual_std(config), dtype=dtype, rngs=rngs,
                                 bias=False)
        self.activation = config.activation

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B #L L"],  # noqa: F821
        survive: Float[Array, "2 B 1 1"] | None = None,
    ) -> Float[Array, "B L D"]:
        """`survive` as in `layers.Block`."""
        scale_1, scale_2 = (1.0, 1.0) if survive is None else survive
        x = x + scale_1 * self.attn(x if self.ln_1 is None else self.ln_1(x), mask)
        value, gate = jnp.split(self.fc1(self.ln_2(x)), 2, axis=-1)
        return x + scale_2 * self.fc2(ops.ACTIVATIONS[self.activation](value) * gate)


def blocks_of(config: TextConfig, *, dtype, rngs: nnx.Rngs):
    """The blocks of a tower."""
    return layers.module_list([Block(config, layer, dtype=dtype, rngs=rngs) for layer in range(config.layers)])
