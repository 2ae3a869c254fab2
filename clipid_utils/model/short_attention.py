"""Attention over short sequences on an NVIDIA GPU: one program of the GPU for each row and head, in one tile.

ViT-B/32 has 50 tokens and a caption about 30. Flash attention (Dao et al. 2022) walks over tiles of 64 and 128, here
mostly padding, and its derivative takes three kernels. A sequence that fits one tile needs no walk: its scores never
leave the processor, and the derivative computes them anew beside all three gradients. The kernels are in Pallas, which
compiles them through Triton; `ops.attention` calls them where `takes` says so. `benchmarks/bench_step.py --gpu`
measures the step with them.

JAX has announced that this side of Pallas will go. Where it has gone, `takes` says no and cuDNN does the work.

Letters in shapes: B rows, L tokens, H heads, K a head's width, T the tile, a power of two.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

LONGEST = 64  # tokens; the derivative's tiles of 128 would not fit the registers


def takes(
    query: Float[Array, "B L H K"], key: Float[Array, "B M H K"], mask: Bool[Array, "B #L M"] | None  # noqa: F821
) -> bool:
    """Whether these have the shapes that the kernels are for, and one device has them: a program that XLA cuts for
    several would compute the kernels whole on each."""
    one_mask = mask is None or mask.shape[1] == 1
    fits = query.shape == key.shape and query.shape[1] <= LONGEST and query.shape[3] in (16, 32, 64)
    return triton is not None and one_mask and fits and jax.device_count() == 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
    query: Float[Array, "B L H K"], key: Float[Array, "B L H K"], value: Float[Array, "B L H K"],
    mask: Bool[Array, "B L"], interpret: bool = False,
) -> Float[Array, "B L H K"]:
    """Scaled dot-product attention; `mask` is True where a key may be seen. `interpret` runs it without a GPU."""
    return _call(_forward_kernel, "attention_forward", 1, interpret, mask, query, key, value)[0]


def _forward(query, key, value, mask, interpret):
    return attention(query, key, value, mask, interpret), (query, key, value, mask)


def _backward(interpret, kept, gradient):
    query, key, value, mask = kept
    return *_call(_backward_kernel, "attention_backward", 3, interpret, mask, query, key, value, gradient), None


attention.defvjp(_forward, _backward)


def _call(kernel, name: str, outputs: int, interpret: bool, mask, *arrays):
    rows, length, heads, width = arrays[0].shape
    tile = max(16, pl.next_power_of_2(length))
    one = pl.BlockSpec((None, tile, None, width), lambda row, head: (row, 0, head, 0))
    return pl.pallas_call(
        functools.partial(kernel, length=length), grid=(rows, heads),
        in_specs=[pl.BlockSpec((None, tile), lambda row, head: (row, 0)), *[one] * len(arrays)],
        out_specs=[one] * outputs, out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)] * outputs,
        compiler_params=triton.CompilerParams(num_warps=4 if tile == 64 else 2, num_stages=1),
        interpret=interpret, name=name,
    )(mask.astype(jnp.int32), *arrays)


def _dot(a, b):
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _load(ref, length: int):
    """[T, K], with zeros in the rows that lie beyond the sequence."""
    return triton.load(ref, mask=(jnp.arange(ref.shape[0]) < length)[:, None], other=0.0)


def _store(ref, values, length: int) -> None:
    triton.store(ref, values.astype(ref.dtype), mask=(jnp.arange(ref.shape[0]) < length)[:, None])


def _weights(q, k, mask_ref, length: int):
    """Softmax of the scores, in float32 [T, T], and which keys are seen, [1, T]; 0 beyond the sequence."""
    inside = jnp.arange(mask_ref.shape[0]) < length
    seen = (triton.load(mask_ref, mask=inside, other=0) != 0)[None, :]
    scores = _dot(q, k.T) / math.sqrt(q.shape[-1])
    # As in the other forms, a row without any key sees all keys alike; hence two steps, of which one is finite
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    scores = jnp.where(inside[None, :], scores, -jnp.inf)
    powers = jnp.exp(scores - scores.max(axis=-1)[:, None])
    return powers / powers.sum(axis=-1)[:, None], seen


def _forward_kernel(mask_ref, q_ref, k_ref, v_ref, out_ref, *, length: int):
    q, k, v = (_load(ref, length) for ref in (q_ref, k_ref, v_ref))
    weights, _ = _weights(q, k, mask_ref, length)
    _store(out_ref, _dot(weights.astype(v.dtype), v), length)


def _backward_kernel(mask_ref, q_ref, k_ref, v_ref, g_ref, g_q_ref, g_k_ref, g_v_ref, *, length: int):
    q, k, v, g = (_load(ref, length) for ref in (q_ref, k_ref, v_ref, g_ref))
    weights, seen = _weights(q, k, mask_ref, length)
    _store(g_v_ref, _dot(weights.astype(g.dtype).T, g), length)
    g_weights = _dot(g, v.T)
    g_scores = weights * (g_weights - (weights * g_weights).sum(axis=-1)[:, None]) / math.sqrt(q.shape[-1])
    g_scores = jnp.where(seen, g_scores, 0.0).astype(q.dtype)
    _store(g_q_ref, _dot(g_scores, k), length)
    _store(g_k_ref, _dot(g_scores.T, q), length)
