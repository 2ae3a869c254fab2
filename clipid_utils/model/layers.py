"""The layers that both towers are made of: linear layers, layer norms, attention, MLPs and transformer blocks.

Letters in shapes: B batch, L tokens, D width, M outputs, E embedding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from clipid_utils.model import ops
from clipid_utils.model.config import EfficientNetConfig, TextConfig, VisionConfig

Arrays = Array | np.ndarray  # the processor's arrays can be used as they are
module_list = getattr(nnx, "List", list)  # flax 0.11, which Colab has, takes plain lists


class Linear(nnx.Linear):
    """nnx.Linear that multiplies two matrices, never a batch of matrices: XLA's CPU code is slow at their gradient."""

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch M"]:
        dtype = self.dtype or x.dtype
        kernel, bias = (None if part is None else part[...].astype(dtype) for part in (self.kernel, self.bias))
        y = x.astype(dtype).reshape(-1, x.shape[-1]) @ kernel
        y = y if bias is None else y + bias
        return y.reshape(*x.shape[:-1], kernel.shape[-1])


def linear(d_in: int, d_out: int, *, dtype, rngs: nnx.Rngs, std: float | None = None, bias: bool = True) -> Linear:
    """A linear layer whose first outputs are as large as its inputs, or whose kernel has the given `std`.

    The released CLIP starts in the same way: kernels shrink with the width, and kernels that end a residual branch also
    with the depth. BERT's 0.02 is about this size at width 768; at 128 it would make all texts nearly the same vector.
    """
    init = nnx.initializers.normal(d_in**-0.5 if std is None else std)
    return Linear(d_in, d_out, use_bias=bias, dtype=dtype, kernel_init=init, rngs=rngs)


def residual_std(config: VisionConfig | TextConfig) -> float:
    return (2 * config.width * config.layers) ** -0.5


class ClassMixture(nnx.Module):
    """Class vectors mixed by probability: a projection through a set of classes, such as ImageNet's 1,000.

    The classifier gives the classes' probabilities, after its logits were multiplied by `scale`; row k of
    `class_vectors` belongs to class k. This is ConSE (Norouzi et al. 2014), which places a picture among texts by the
    vectors of class names. Here texts can have classes too: the classifier then compares a text with their names.
    """

    def __init__(self, width: int, classes: int, embed_dim: int, *, scale: float, dtype, rngs: nnx.Rngs):
        self.scale, self.out_features = scale, embed_dim
        self.classifier = linear(width, classes, dtype=dtype, rngs=rngs)
        init = nnx.initializers.normal(embed_dim**-0.5)
        self.class_vectors = nnx.Param(init(rngs.params(), (classes, embed_dim)))

    def __call__(self, features: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        chances = jax.nn.softmax(self.scale * self.classifier(features).astype(jnp.float32))
        return chances.astype(features.dtype) @ self.class_vectors[...].astype(features.dtype)


class MLPProjection(nnx.Module):
    """Two linear layers with a GELU between them, open_clip's projection after a text tower of Hugging Face."""

    def __init__(self, width: int, embed_dim: int, *, dtype, rngs: nnx.Rngs):
        middle, self.out_features = (width + embed_dim) // 2, embed_dim
        self.fc1 = linear(width, middle, dtype=dtype, rngs=rngs, bias=False)
        self.fc2 = linear(middle, embed_dim, dtype=dtype, rngs=rngs, bias=False)

    def __call__(self, features: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        return self.fc2(ops.gelu(self.fc1(features)))


class NoProjection(nnx.Module):
    """For towers whose features are the embedding."""

    def __init__(self, embed_dim: int):
        self.out_features = embed_dim

    def __call__(self, features: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        return features


def projection(config: EfficientNetConfig | VisionConfig | TextConfig, embed_dim: int, *, dtype, rngs: nnx.Rngs):
    """From a tower's features to the common space: through classes, or in one of the forms "linear" (a matrix),
    "affine" (with a bias), "mlp" and "none". Raises ValueError for a different form."""
    if getattr(config, "classes", 0):
        return ClassMixture(config.width, config.classes, embed_dim, scale=config.class_scale, dtype=dtype, rngs=rngs)
    if config.projection in ("linear", "affine"):
        return linear(config.width, embed_dim, dtype=dtype, rngs=rngs, bias=config.projection == "affine")
    if config.projection == "mlp":
        return MLPProjection(config.width, embed_dim, dtype=dtype, rngs=rngs)
    if config.projection != "none" or config.width != embed_dim:
        raise ValueError(f"{type(config).__name__} has projection {config.projection!r} and width {config.width}, and "
                         f"the embedding has {embed_dim}: use linear, affine or mlp, or none if both are the same")
    return NoProjection(embed_dim)


class LayerNorm(nnx.LayerNorm):
    """nnx.LayerNorm, computed by `ops.layer_norm`, in float32."""

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x, scale = (part.astype(jnp.float32) for part in (x, self.scale[...]))
        bias = jnp.zeros_like(scale) if self.bias is None else self.bias[...].astype(jnp.float32)
        return ops.layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with separate projections, as Hugging Face stores them."""

    def __init__(self, config: VisionConfig | TextConfig, *, dtype, rngs: nnx.Rngs):
        width, self.heads = config.width, config.heads
        self.q_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.k_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.v_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.out_proj = linear(width, width, std=residual_std(config), dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B #L M"] | None = None,  # noqa: F821
        among: Float[Array, "B M D"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Each token of `x` attends to those of `among`, which are its own tokens by default."""
        among = x if among is None else among
        q, k, v = (
            project(tokens).reshape(*tokens.shape[:2], self.heads, -1)  # [B, L or M, H, K]
            for project, tokens in ((self.q_proj, x), (self.k_proj, among), (self.v_proj, among))
        )
        return self.out_proj(ops.attention(q, k, v, mask).reshape(x.shape))  # [B, L, D]


class MLP(nnx.Module):
    """Two layers with an activation between them."""

    def __init__(self, config: VisionConfig | TextConfig, *, dtype, rngs: nnx.Rngs):
        self.fc1 = linear(config.width, config.mlp_dim, std=(2 * config.width) ** -0.5, dtype=dtype, rngs=rngs)
        self.fc2 = linear(config.mlp_dim, config.width, std=residual_std(config), dtype=dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.fc2(ops.ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """One transformer layer. `pre_norm` normalises before each part (CLIP), otherwise after each sum (BERT)."""

    def __init__(self, config: VisionConfig | TextConfig, *, pre_norm: bool, dtype, rngs: nnx.Rngs):
        self.pre_norm = pre_norm
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.ln_1 = LayerNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.ln_2 = LayerNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        scaled = getattr(config, "layer_scale", False)
        self.scale_1, self.scale_2 = (nnx.Param(jnp.ones(config.width)) if scaled else None for _ in range(2))

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B #L L"] | None = None,  # noqa: F821
        survive: Float[Array, "2 B 1 1"] | None = None,
    ) -> Float[Array, "B L D"]:
        """`survive` scales the two residual branches: 0 drops a branch, 1/p keeps its mean (stochastic depth)."""
        scale_1, scale_2 = (1.0, 1.0) if survive is None else survive
        if self.scale_1 is not None:
            scale_1, scale_2 = scale_1 * self.scale_1[...].astype(x.dtype), scale_2 * self.scale_2[...].astype(x.dtype)
        if self.pre_norm:
            x = x + scale_1 * self.attn(self.ln_1(x), mask)
            return x + scale_2 * self.mlp(self.ln_2(x))
        x = self.ln_1(x + scale_1 * self.attn(x, mask))
        return self.ln_2(x + scale_2 * self.mlp(x))


class AttentionPool(nnx.Module):
    """SigLIP's head (Zhai et al. 2023): a learned probe attends to all patches, and an MLP follows."""

    def __init__(self, config: VisionConfig, *, dtype, rngs: nnx.Rngs):
        self.probe = nnx.Param(nnx.initializers.normal(config.width**-0.5)(rngs.params(), (config.width,)))
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.ln = LayerNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        probe = jnp.broadcast_to(self.probe[...].astype(tokens.dtype), (tokens.shape[0], 1, tokens.shape[-1]))
        x = self.attn(probe, among=tokens)
        return (x + self.mlp(self.ln(x)))[:, 0]


def survivals(keys: Array | None, drop_path: float, layers: int, dtype) -> list:
    """The branch scales of each layer for stochastic depth (Huang et al. 2016); deeper layers are dropped more often.

    A row's scales depend on its own key alone, so a batch in parts is drawn like the whole batch.
    """
    if keys is None or drop_path == 0.0:
        return [None] * layers
    if not 0.0 < drop_path < 1.0:
        raise ValueError(f"drop_path is {drop_path}: give the last layer's chance to be skipped, below 1")
    keep = 1.0 - drop_path * jnp.arange(1, layers + 1)[:, None] / layers
    alive = jax.vmap(lambda key: jax.random.bernoulli(key, keep, (layers, 2)), out_axes=2)(keys)  # [layers, 2, B]
    return list((alive / keep[..., None])[..., None, None].astype(dtype))


def blocks_of(config: VisionConfig | TextConfig, *, pre_norm: bool, dtype, rngs: nnx.Rngs):
    """The blocks of a tower."""
    return module_list([Block(config, pre_norm=pre_norm, dtype=dtype, rngs=rngs) for _ in range(config.layers)])


def through_blocks(blocks, x, beside: tuple, keys, drop_path: float, remat: bool) -> Array:
    """Block after block, each called with x, `beside` and its branch scales; the others are options of `tokens`."""
    for block, survive in zip(blocks, survivals(keys, drop_path, len(blocks), x.dtype), strict=True):
        x = (jax.checkpoint(block.__call__) if remat else block)(x, *beside, survive)
    return x


def check_pooling(config: VisionConfig | TextConfig, *known: str) -> str:
    if config.pooling not in known:
        raise ValueError(f"{type(config).__name__}.pooling is {config.pooling!r}: it must be {' or '.join(known)}")
    return config.pooling
