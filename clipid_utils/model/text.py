"""The text tower: BERT's, CLIP's, SigLIP's or ModernBERT's, and a projection. Published weights fit all.

BERT has post-norm blocks and a pooler (Devlin et al. 2019). RoBERTa (Liu et al. 2019) is BERT with different positions;
DistilBERT (Sanh et al. 2019) has no token types. CLIP's tower is pre-norm and causal, and the end of the text is pooled
(Radford et al. 2021). SigLIP's has no mask: its last place is pooled, even if that is padding (Zhai et al. 2023).
`modernbert.py` has the blocks of ModernBERT.

Letters in shapes: B batch, L tokens, D width, E embedding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from clipid_utils.model import layers, modernbert
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
        norm = {"epsilon": config.norm_eps, "dtype": dtype, "rngs": rngs}
        rotary = config.rotary is not None
        self.position_embedding = None if rotary else nnx.Param(normal(rngs.params(), (rows, config.width)))
        kinds = config.token_types
        self.token_type_embedding = nnx.Param(normal(rngs.params(), (kinds, config.width))) if kinds else None
        norm |= {"use_bias": not rotary}
        self.ln = layers.LayerNorm(config.width, **norm) if rotary or not config.pre_norm else None
        if rotary:
            self.blocks = modernbert.blocks_of(config, dtype=dtype, rngs=rngs)
        else:
            self.blocks = layers.blocks_of(config, pre_norm=config.pre_norm, dtype=dtype, rngs=rngs)
        self.ln_final = layers.LayerNorm(config.width, **norm) if config.pre_norm else None
        pooler = layers.check_pooling(config, "pooler", "mean", "first", "last", "end") == "pooler"
        self.pooler = layers.linear(config.width, config.width, dtype=dtype, rngs=rngs) if pooler else None
        self.projection = layers.projection(config, embed_dim, dtype=dtype, rngs=rngs)

    def positions(self, input_ids: Int[Arrays, "B L"]) -> Int[Array, "#B L"]:
        """Position ids: 0, 1, 2, … for BERT; RoBERTa counts only the tokens that are not padding, from its offset."""
        if self.config.position_offset == 0:
            return jnp.arange(input_ids.shape[1])[None]
        padding = self.config.position_offset - 1  # the padding token's id, and the position that it gets
        seen = jnp.asarray(input_ids != padding, jnp.int32)
        return jnp.cumsum(seen, axis=1) * seen + padding

    def embeddings(self, input_ids: Int[Arrays, "B L"]) -> Float[Array, "B L D"]:
        """The input of the first block: words, positions and the first token type, summed, and normalised if pre_norm
        is False."""
        x = self.word_embedding[...][input_ids].astype(jnp.float32)
        if self.position_embedding is not None:
            x = x + self.position_embedding[...][self.positions(input_ids)].astype(jnp.float32)
        if self.token_type_embedding is not None:
            x = x + self.token_type_embedding[...][0].astype(jnp.float32)
        x = x.astype(self.dtype)
        return x if self.ln is None else self.ln(x)

    def mask(self, attention_mask: Int[Arrays, "B L"]) -> Bool[Array, "B #L L"] | None:  # noqa: F821
        """The tokens that each token may see; None if it may see all of them."""
        if self.config.mask == "none":
            return None
        seen = jnp.asarray(attention_mask, bool)[:, None, :]  # [B, 1, L]
        length = seen.shape[-1]
        return seen & jnp.tri(length, dtype=bool) if self.config.mask == "causal" else seen

    def tokens(
        self, input_ids: Int[Arrays, "B L"], attention_mask: Int[Arrays, "B L"], *,
        keys: Key[Array, " B"] | None = None, drop_path: float = 0.0, remat: bool = False,
    ) -> Float[Array, "B L D"]:
        """The tokens after the last block and the last norm; `keys`, `drop_path` and `remat` as in the image tower.

        Raises ValueError for more than `max_length` tokens, for fewer if the tower has no mask, and, unless it is
        traced (as under jit), for an id that is not in the embedding table.
        """
        if input_ids.shape[1] > self.config.max_length:
            raise ValueError(f"input_ids have {input_ids.shape[1]} tokens; this text tower takes "
                             f"{self.config.max_length}: truncate in the processor")
        if self.config.mask == "none" and input_ids.shape[1] != self.config.max_length:
            raise ValueError(f"input_ids have {input_ids.shape[1]} tokens; this text tower has no mask and takes "
                             f"exactly {self.config.max_length}, with padding: use the checkpoint's own processor")
        self._check_ids(input_ids)
        x = self.embeddings(input_ids)
        x = layers.through_blocks(self.blocks, x, (self.mask(attention_mask),), keys, drop_path, remat)
        return x if self.ln_final is None else self.ln_final(x)

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
        pooling = self.config.pooling
        if pooling == "mean":  # in float32: bfloat16 counts only to 256 tokens
            weight = jnp.asarray(attention_mask)[..., None].astype(jnp.float32)
            pooled = ((x.astype(jnp.float32) * weight).sum(1) / weight.sum(1)).astype(x.dtype)
        elif pooling == "end":
            ids, end = jnp.asarray(input_ids), self.config.end_id
            pooled = x[jnp.arange(len(x)), (ids if end is None else ids == end).argmax(1)]
        else:
            pooled = x[:, -1 if pooling == "last" else 0]
            pooled = pooled if self.pooler is None else jnp.tanh(self.pooler(pooled))
        return normalize(pooled).astype(x.dtype) if self.config.normalize_pooled else pooled

    def __call__(
        self, input_ids: Int[Arrays, "B L"], attention_mask: Int[Arrays, "B L"], **training
    ) -> Float[Array, "B E"]:
        return self.projection(self.pooled(input_ids, attention_mask, **training))  # [B, E]
