"""The text tower: BERT (Devlin et al. 2019: post-norm blocks, a pooler) or RoBERTa (Liu et al. 2019), and a projection.

RoBERTa is BERT with different positions. Published weights fit both.

Letters in shapes: B batch, L tokens, D width, E embedding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from clipid_utils.model import layers
from clipid_utils.model.config import TextConfig
from clipid_utils.model.layers import Arrays
from clipid_utils.model.ops import normalize


class TextEncoder(nnx.Module):
    """Token ids in, projected features out (not of unit length)."""

    def __init__(self, config: TextConfig, embed_dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        normal = nnx.initializers.normal(0.02)
        self.word_embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, config.width)))
        rows = config.max_length + config.position_offset
        self.position_embedding = nnx.Param(normal(rngs.params(), (rows, config.width)))
        self.token_type_embedding = nnx.Param(normal(rngs.params(), (config.token_types, config.width)))
        self.ln = layers.LayerNorm(config.width, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
        self.blocks = layers.blocks_of(config, pre_norm=False, dtype=dtype, rngs=rngs)
        pooler = layers.check_pooling(config, "pooler", "mean") == "pooler"
        self.pooler = layers.linear(config.width, config.width, dtype=dtype, rngs=rngs) if pooler else None
        if config.classes:
            self.projection = layers.class_mixture(config, embed_dim, dtype=dtype, rngs=rngs)
        else:
            self.projection = layers.linear(config.width, embed_dim, dtype=dtype, rngs=rngs, bias=False)

    def positions(self, input_ids: Int[Arrays, "B L"]) -> Int[Array, "#B L"]:
        """Position ids: 0, 1, 2, … for BERT; RoBERTa counts only the tokens that are not padding, from its offset."""
        if self.config.position_offset == 0:
            return jnp.arange(input_ids.shape[1])[None]
        padding = self.config.position_offset - 1  # the padding token's id, and the position that it gets
        seen = jnp.asarray(input_ids != padding, jnp.int32)
        return jnp.cumsum(seen, axis=1) * seen + padding

    def embeddings(self, input_ids: Int[Arrays, "B L"]) -> Float[Array, "B L D"]:
        """The input of the first block: words, positions and the first token type, summed and normalised."""
        parts = ((self.word_embedding, input_ids), (self.position_embedding, self.positions(input_ids)),
                 (self.token_type_embedding, jnp.zeros((1, 1), jnp.int32)))
        words, places, kinds = (table[...][rows].astype(jnp.float32) for table, rows in parts)
        return self.ln((words + places + kinds).astype(self.dtype))

    def tokens(
        self, input_ids: Int[Arrays, "B L"], attention_mask: Int[Arrays, "B L"], *,
        keys: Key[Array, " B"] | None = None, drop_path: float = 0.0, remat: bool = False,
    ) -> Float[Array, "B L D"]:
        """The tokens after the last block; `keys`, `drop_path` and `remat` as in the image tower.

        Raises ValueError for more than `max_length` tokens and, unless it is traced (as under jit), for an id that is
        not in the embedding table.
        """
        if input_ids.shape[1] > self.config.max_length:
            raise ValueError(f"input_ids have {input_ids.shape[1]} tokens; this text tower takes "
                             f"{self.config.max_length}: truncate in the processor")
        self._check_ids(input_ids)
        x = self.embeddings(input_ids)
        mask = jnp.asarray(attention_mask, bool)[:, None, :]  # [B, 1, L]
        return layers.through_blocks(self.blocks, x, (mask,), keys, drop_path, remat)

    def _check_ids(self, input_ids: Int[Arrays, "B L"]) -> None:
        """JAX itself would take the last row of the table for an id that is too large."""
        if isinstance(input_ids, jax.core.Tracer) or not getattr(input_ids, "is_fully_addressable", True):
            return
        ids = np.asarray(input_ids)
        wrong = ids[(ids < 0) | (ids >= self.config.vocab_size)]
        if wrong.size:
            raise ValueError(f"input_ids have the id {wrong[0]}; the embedding table of this text tower has "
                             f"{self.config.vocab_size} rows: use the checkpoint's own tokenizer")

    def pooled(
        self, input_ids: Int[Arrays, "B L"], attention_mask: Int[Arrays, "B L"], **training
    ) -> Float[Array, "B D"]:
        """One vector for each text, before the projection. `training` has the options of `tokens`."""
        x = self.tokens(input_ids, attention_mask, **training)  # [B, L, D]
        if self.pooler is None:  # in float32: bfloat16 counts only to 256 tokens
            weight = jnp.asarray(attention_mask)[..., None].astype(jnp.float32)
            pooled = ((x.astype(jnp.float32) * weight).sum(1) / weight.sum(1)).astype(x.dtype)
        else:
            pooled = jnp.tanh(self.pooler(x[:, 0]))
        return normalize(pooled).astype(x.dtype) if self.config.normalize_pooled else pooled

    def __call__(
        self, input_ids: Int[Arrays, "B L"], attention_mask: Int[Arrays, "B L"], **training
    ) -> Float[Array, "B E"]:
        return self.projection(self.pooled(input_ids, attention_mask, **training))  # [B, E]
