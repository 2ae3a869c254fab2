"""The hybrid CLIP: a vision transformer and a BERT text encoder that meet in one embedding space.

Architectures follow the published ones to the letter, so that real weights fit: the image tower is CLIP's ViT (Radford
et al. 2021: class token, ln_pre, pre-LN blocks, ln_post, projection without bias) or the first ViT (Dosovitskiy et al.
2021: no ln_pre, biased patches, a pooler), the text tower is BERT (Devlin et al. 2019: post-LN blocks, pooler) or
RoBERTa (Liu et al. 2019: BERT with other positions) with a projection. `dtype` is the products' type; parameters are
made in float32, and used in it unless they were loaded in another.

Letters in shapes: B batch, H height, W width, P patches, L tokens, D width, E embedding.
"""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from clipid_utils.model import ops
from clipid_utils.model.config import CLIPConfig, TextConfig, VisionConfig

Arrays = Array | np.ndarray  # what the processor gives may go in as it is


_module_list = getattr(nnx, "List", list)  # flax 0.11, Colab's, takes plain lists


class CLIPOutput(NamedTuple):
    """What a whole forward pass returns: unit vectors and their scaled products."""

    logits_per_image: Float[Array, "B T"]
    logits_per_text: Float[Array, "T B"]
    image_embeds: Float[Array, "B E"]
    text_embeds: Float[Array, "T E"]


def normalize(features: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
    """Vectors of unit length, in float32; a zero vector stays zero."""
    features = features.astype(jnp.float32)
    return features * jax.lax.rsqrt(jnp.sum(features**2, axis=-1, keepdims=True) + 1e-12)


class Linear(nnx.Linear):
    """nnx's, on a CPU in the form of `ops`."""

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch M"]:
        if ops.xla_cpu(x) and self.dtype == jnp.float32:
            kernel, bias = (None if part is None else part[...].astype(x.dtype) for part in (self.kernel, self.bias))
            return ops.linear(x, kernel, bias)
        return super().__call__(x)


def linear(
    d_in: int, d_out: int, *, dtype, rngs: nnx.Rngs, std: float | None = None, bias: bool = True
) -> Linear:
    """A linear layer whose initial outputs are as large as its inputs, or with a kernel of another `std`.

    Both are the released CLIP's: kernels shrink with the width, and those that end a residual branch also with the
    depth. BERT's 0.02 is of that size at width 768; at 128 it would let all texts begin as one and the same vector.
    """
    init = nnx.initializers.normal(d_in**-0.5 if std is None else std)
    return Linear(d_in, d_out, use_bias=bias, dtype=dtype, kernel_init=init, dot_general=ops.dot_general, rngs=rngs)


def _residual_std(config: VisionConfig | TextConfig) -> float:
    return (2 * config.width * config.layers) ** -0.5


class LayerNorm(nnx.LayerNorm):
    """nnx's, on a CPU in the form of `ops`."""

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        if ops.xla_cpu(x) and self.dtype == jnp.float32:
            scale, bias = (part[...].astype(x.dtype) for part in (self.scale, self.bias))
            return ops.layer_norm(x, scale, bias, self.epsilon)
        return super().__call__(x)


class Attention(nnx.Module):
    """Multi-head self-attention with separate projections, as Hugging Face stores them."""

    def __init__(self, config: VisionConfig | TextConfig, *, dtype, rngs: nnx.Rngs):
        width, self.heads = config.width, config.heads
        self.q_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.k_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.v_proj = linear(width, width, dtype=dtype, rngs=rngs)
        self.out_proj = linear(width, width, std=_residual_std(config), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"], mask: Bool[Array, "B 1 L"] | None = None) -> Float[Array, "B L D"]:
        q, k, v = (
            project(x).reshape(*x.shape[:2], self.heads, -1)  # [B, L, H, K]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(ops.attention(q, k, v, mask).reshape(x.shape))  # [B, L, D]


class MLP(nnx.Module):
    """Two layers with an activation between."""

    def __init__(self, config: VisionConfig | TextConfig, *, dtype, rngs: nnx.Rngs):
        self.fc1 = linear(config.width, config.mlp_dim, std=(2 * config.width) ** -0.5, dtype=dtype, rngs=rngs)
        self.fc2 = linear(config.mlp_dim, config.width, std=_residual_std(config), dtype=dtype, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.fc2(ops.ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """One transformer layer; `pre_norm` normalises before each part (CLIP), otherwise after each sum (BERT)."""

    def __init__(self, config: VisionConfig | TextConfig, *, pre_norm: bool, dtype, rngs: nnx.Rngs):
        self.pre_norm = pre_norm
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.ln_1 = LayerNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)
        self.ln_2 = LayerNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        mask: Bool[Array, "B 1 L"] | None = None,
        survive: Float[Array, "2 B 1 1"] | None = None,
    ) -> Float[Array, "B L D"]:
        """`survive` scales the two residual branches: 0 drops one, 1/p keeps its mean (stochastic depth)."""
        scale_1, scale_2 = (1.0, 1.0) if survive is None else survive
        if self.pre_norm:
            x = x + scale_1 * self.attn(self.ln_1(x), mask)
            return x + scale_2 * self.mlp(self.ln_2(x))
        x = self.ln_1(x + scale_1 * self.attn(x, mask))
        return self.ln_2(x + scale_2 * self.mlp(x))


def _survivals(keys: Array | None, drop_path: float, layers: int, dtype) -> list:
    """Stochastic depth (Huang et al. 2016): for each layer the branch scales, dropped more often the deeper it is.

    What happens to a row hangs on its own key alone, so that a batch in parts is drawn as the whole one.
    """
    if keys is None or drop_path == 0.0:
        return [None] * layers
    if not 0.0 < drop_path < 1.0:
        raise ValueError(f"drop_path is {drop_path}: it is the last layer's chance of being skipped, below 1")
    keep = 1.0 - drop_path * jnp.arange(1, layers + 1)[:, None] / layers
    alive = jax.vmap(lambda key: jax.random.bernoulli(key, keep, (layers, 2)), out_axes=2)(keys)  # [layers, 2, B]
    return list((alive / keep[..., None])[..., None, None].astype(dtype))


def _through(blocks, x, mask, survivals: list, remat: bool) -> Float[Array, "B L D"]:
    """Block after block, each with its branch scales."""
    for block, survive in zip(blocks, survivals, strict=True):
        x = jax.checkpoint(block.__call__)(x, mask, survive) if remat else block(x, mask, survive)
    return x


def _pooling(config: VisionConfig | TextConfig, *known: str) -> str:
    if config.pooling not in known:
        raise ValueError(f"{type(config).__name__}.pooling is {config.pooling!r}, not one of {', '.join(known)}")
    return config.pooling


class VisionTransformer(nnx.Module):
    """CLIP's image tower, or ViT's: pixels in, projected features out (not yet of unit length)."""

    def __init__(self, config: VisionConfig, embed_dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        if config.image_size % config.patch_size:
            raise ValueError(f"image_size {config.image_size} is not a multiple of patch_size {config.patch_size}")
        self.config, self.dtype = config, dtype
        width = config.width
        init = nnx.initializers.normal(width**-0.5)
        self.class_embedding = nnx.Param(init(rngs.params(), (width,)))
        self.position_embedding = nnx.Param(init(rngs.params(), (config.grid**2 + 1, width)))
        self.patch_embedding = linear(
            3 * config.patch_size**2, width, dtype=dtype, rngs=rngs, bias=config.patch_bias
        )
        norm = {"epsilon": config.norm_eps, "dtype": dtype, "rngs": rngs}
        self.ln_pre = LayerNorm(width, **norm) if config.ln_pre else None
        self.blocks = _module_list(
            [Block(config, pre_norm=True, dtype=dtype, rngs=rngs) for _ in range(config.layers)]
        )
        self.ln_post = LayerNorm(width, **norm)
        pooler = _pooling(config, "class", "pooler") == "pooler"
        self.pooler = linear(width, width, dtype=dtype, rngs=rngs) if pooler else None
        self.projection = linear(width, embed_dim, dtype=dtype, rngs=rngs, bias=False)

    def patchify(self, pixel_values: Float[Arrays, "B H W 3"]) -> Float[Array, "B P patch"]:
        """Non-overlapping patches, row by row, each flattened as (row, column, channel)."""
        pixel_values = jnp.asarray(pixel_values)
        size, grid = self.config.patch_size, self.config.grid
        if pixel_values.shape[1:] != (self.config.image_size, self.config.image_size, 3):
            raise ValueError(
                f"pixel_values have shape {pixel_values.shape}; this model wants "
                f"[B, {self.config.image_size}, {self.config.image_size}, 3]: use the checkpoint's own processor"
            )
        x = pixel_values.reshape(-1, grid, size, grid, size, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(x.shape[0], grid**2, 3 * size**2)

    def tokens(
        self, pixel_values: Float[Arrays, "B H W 3"], *, keys: Key[Array, " B"] | None = None, drop_path: float = 0.0,
        keep_patches: int | None = None, remat: bool = False,
    ) -> Float[Array, "B L D"]:
        """The class token and the patch tokens after the last block, before ln_post.

        With `keys`, one a picture, `keep_patches` patches of each are drawn at random and the others never computed
        (FLIP, Li et al. 2023), and `drop_path` is the last layer's chance of being skipped. `remat` computes each block
        anew in the backward pass instead of keeping what is inside it (Chen et al. 2016).
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
        survive_keys = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
        survivals = _survivals(survive_keys, drop_path, len(self.blocks), self.dtype)
        return _through(self.blocks, x, None, survivals, remat)

    def features(self, tokens: Float[Array, "*batch D"]) -> Float[Array, "*batch E"]:
        """What `tokens` returns, normed, pooled and projected into the common space."""
        return self.projection(self._pool(tokens))

    def _pool(self, tokens: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x = self.ln_post(tokens)
        return x if self.pooler is None else jnp.tanh(self.pooler(x))

    def pooled(self, pixel_values: Float[Arrays, "B H W 3"], **training) -> Float[Array, "B D"]:
        """What the tower makes of each picture, before the projection."""
        return self._pool(self.tokens(pixel_values, **training)[:, 0])

    def __call__(self, pixel_values: Float[Arrays, "B H W 3"], **training) -> Float[Array, "B E"]:
        return self.projection(self.pooled(pixel_values, **training))  # [B, E]


class TextEncoder(nnx.Module):
    """BERT or RoBERTa and a projection: token ids in, projected features out (not yet of unit length)."""

    def __init__(self, config: TextConfig, embed_dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        normal = nnx.initializers.normal(0.02)
        self.word_embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, config.width)))
        rows = config.max_length + config.position_offset
        self.position_embedding = nnx.Param(normal(rngs.params(), (rows, config.width)))
        self.token_type_embedding = nnx.Param(normal(rngs.params(), (config.token_types, config.width)))
        self.ln = LayerNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.blocks = _module_list(
            [Block(config, pre_norm=False, dtype=dtype, rngs=rngs) for _ in range(config.layers)]
        )
        pooler = _pooling(config, "pooler", "mean") == "pooler"
        self.pooler = linear(config.width, config.width, dtype=dtype, rngs=rngs) if pooler else None
        self.projection = linear(config.width, embed_dim, dtype=dtype, rngs=rngs, bias=False)

    def positions(self, input_ids: Int[Arrays, "B L"]) -> Int[Array, "#B L"]:
        """Position ids: 0, 1, 2, … for BERT; RoBERTa counts only the tokens that are not padding, from its offset."""
        if self.config.position_offset == 0:
            return jnp.arange(input_ids.shape[1])[None]
        padding = self.config.position_offset - 1  # the id of the padding token is the position it gets
        seen = jnp.asarray(input_ids != padding, jnp.int32)
        return jnp.cumsum(seen, axis=1) * seen + padding

    def embeddings(
        self, input_ids: Int[Arrays, "B L"], token_type_ids: Int[Arrays, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """What enters the first block: words, positions and token types (0 where none are given), summed and normed."""
        types = jnp.zeros((1, 1), jnp.int32) if token_type_ids is None else token_type_ids
        parts = ((self.word_embedding, input_ids), (self.position_embedding, self.positions(input_ids)),
                 (self.token_type_embedding, types))
        words, places, kinds = (table[...][rows].astype(jnp.float32) for table, rows in parts)
        return self.ln((words + places + kinds).astype(self.dtype))

    def tokens(
        self, input_ids: Int[Arrays, "B L"], attention_mask: Int[Arrays, "B L"], *,
        token_type_ids: Int[Arrays, "B L"] | None = None, keys: Key[Array, " B"] | None = None, drop_path: float = 0.0,
        remat: bool = False,
    ) -> Float[Array, "B L D"]:
        """The tokens after the last block; `keys`, `drop_path` and `remat` as for pictures."""
        if input_ids.shape[1] > self.config.max_length:
            raise ValueError(
                f"input_ids have {input_ids.shape[1]} tokens; this text tower holds {self.config.max_length}: "
                "truncate in the processor"
            )
        x = self.embeddings(input_ids, token_type_ids)
        mask = jnp.asarray(attention_mask, bool)[:, None, :]  # [B, 1, L]
        return _through(self.blocks, x, mask, _survivals(keys, drop_path, len(self.blocks), self.dtype), remat)

    def pooled(
        self, input_ids: Int[Arrays, "B L"], attention_mask: Int[Arrays, "B L"], **training
    ) -> Float[Array, "B D"]:
        """What the tower makes of each text, before the projection."""
        x = self.tokens(input_ids, attention_mask, **training)  # [B, L, D]
        if self.pooler is None:
            weight = jnp.asarray(attention_mask)[..., None].astype(x.dtype)
            return (x * weight).sum(1) / weight.sum(1)
        return jnp.tanh(self.pooler(x[:, 0]))

    def __call__(
        self, input_ids: Int[Arrays, "B L"], attention_mask: Int[Arrays, "B L"], **training
    ) -> Float[Array, "B E"]:
        return self.projection(self.pooled(input_ids, attention_mask, **training))  # [B, E]


class HybridCLIP(nnx.Module):
    """An image tower and a text tower with a learned scale between them.

    `logit_scale` is stored as a logarithm, as in CLIP, and used clamped at `config.max_logit_scale`, ln 100.
    """

    def __init__(self, config: CLIPConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.vision = VisionTransformer(config.vision, config.embed_dim, dtype=dtype, rngs=rngs)
        self.text = TextEncoder(config.text, config.embed_dim, dtype=dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale, jnp.float32))
        self.logit_bias = None if config.logit_bias is None else nnx.Param(jnp.asarray(config.logit_bias, jnp.float32))

    @classmethod
    def from_towers(
        cls, vision: str | os.PathLike, text: str | os.PathLike, *, embed_dim: int | None = None,
        pooling: str = "pooler", image_size: int | None = None, vision_revision: str | None = None,
        text_revision: str | None = None, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs | None = None,
    ) -> "HybridCLIP":
        """A hybrid CLIP of two pretrained towers, each a folder or an id on the Hugging Face hub.

        `vision` is one of transformers' CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection or ViTModel, also
        with a head, `text` one of BERT, RoBERTa or XLM-RoBERTa. What pretraining has not made is drawn with `rngs`
        (seed 0 without): the text projection, the image projection where `vision` has none of `embed_dim` (its own, or
        512), a pooler that a masked language model lacks (with a warning). `pooling` may be "mean" instead;
        `image_size` is another picture size, to which the position embeddings are interpolated. `dtype` is what the
        model computes in, `param_dtype` what weights are kept in. `CLIPProcessor.from_towers` is the processor to it.

        Raises FileNotFoundError for what is not there, ValueError for towers of another kind and for weights that do
        not fit their config.json, with the keys' names.
        """
        from clipid_utils.model.pretrained.convert import join_towers  # which knows this file

        return join_towers(vision, text, embed_dim=embed_dim, pooling=pooling, image_size=image_size,
                           vision_revision=vision_revision, text_revision=text_revision, dtype=dtype,
                           param_dtype=param_dtype, rngs=rngs or nnx.Rngs(0))

    def encode_image(self, pixel_values: Float[Arrays, "B H W 3"], **training) -> Float[Array, "B E"]:
        """Unit vectors of normalised pixels; `tokens` has what is for training only."""
        return normalize(self.vision(pixel_values, **training))

    def encode_text(
        self, input_ids: Int[Arrays, "B L"], attention_mask: Int[Arrays, "B L"], **training
    ) -> Float[Array, "B E"]:
        """Unit vectors of tokenised texts; `tokens` has what is for training only."""
        return normalize(self.text(input_ids, attention_mask, **training))

    def encode_patches(self, pixel_values: Float[Arrays, "B H W 3"]) -> Float[Array, "B P E"]:
        """Unit vectors of every patch, row by row: last tokens, projected as the class token is (Zhou et al. 2022)."""
        return normalize(self.vision.features(self.vision.tokens(pixel_values)[:, 1:]))

    def scale(self) -> Float[Array, ""]:
        """exp(logit_scale), at most 100."""
        return jnp.exp(jnp.minimum(self.logit_scale[...], self.config.max_logit_scale))

    def __call__(
        self,
        pixel_values: Float[Arrays, "B H W 3"],
        input_ids: Int[Arrays, "T L"],
        attention_mask: Int[Arrays, "T L"],
    ) -> CLIPOutput:
        image_embeds = self.encode_image(pixel_values)
        text_embeds = self.encode_text(input_ids, attention_mask)
        logits = self.scale() * image_embeds @ text_embeds.T  # [B, T]
        if self.logit_bias is not None:
            logits = logits + self.logit_bias[...]
        return CLIPOutput(logits, logits.T, image_embeds, text_embeds)
