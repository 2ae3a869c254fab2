"""The few operations whose fastest form depends on the machine, kept in one place.

Everything in `clip.py` calls these functions and is otherwise written plainly. What each does about speed:

- `attention`: on a GPU the kernels of `short_attention` for what they take, else `jax.nn.dot_product_attention` (cuDNN
  flash attention for half precision), on a TPU its XLA form; on a CPU explicit products over contiguous [B, H, L, K]
  arrays, which XLA's CPU back end runs faster than the einsum over [B, L, H, K], and a derivative that keeps the
  softmax's weights.
- `linear` on a CPU, `dot_general` within nnx's on a GPU: one product of two matrices. JAX's own derivative for the
  kernel is that of a batched product, for which XLA first copies what it multiplies, transposed; and its derivative for
  the bias of queries, keys and values XLA's CPU code sums slowly, on one core.
- `layer_norm`: nnx's, which is what runs elsewhere, with a derivative that keeps mean and deviation. What JAX derives
  goes over the tokens more often.
- `gelu`, `quick_gelu`: the textbook functions with a derivative in closed form, from the input alone. What JAX derives
  keeps more of the forward pass, and a slope that is kept has to be written and read.

The CPU's forms are for float32; other types take the general ones there. `benchmarks/bench_step.py` measures the whole
step with all of them and `benchmarks/bench_encode.py` the forward pass. What matters more on a Linux CPU stands outside
the process: transparent huge pages (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, which the Makefile sets) for the one large
buffer that XLA takes anew for each step.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from clipid_utils.model import short_attention


def attention(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B M H K"],
    value: Float[Array, "B M H K"],
    mask: Bool[Array, "B #L M"] | None = None,  # noqa: F821
) -> Float[Array, "B L H K"]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1); `mask` is True where a key may be seen."""
    if jax.default_backend() != "cpu":
        half = jax.default_backend() == "gpu" and _half_on_ampere(query)
        if half and short_attention.takes(query, key, mask):
            seen = jnp.ones(key.shape[:2], bool) if mask is None else mask[:, 0]
            return short_attention.attention(query, key, value, seen)
        flash = "cudnn" if half and _cudnn_takes(query, key, mask) else None
        full_mask = None if mask is None else jnp.broadcast_to(
            mask[:, None], (query.shape[0], 1, query.shape[1], key.shape[1])
        )
        return jax.nn.dot_product_attention(query, key, value, mask=full_mask, implementation=flash)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (query, key, value))  # [B, H, L, K]
    full_mask = None if mask is None else mask[:, None]  # [B, 1, #L, M]
    return _attention(q / math.sqrt(q.shape[-1]), k, v, full_mask).transpose(0, 2, 1, 3)  # [B, L, H, K]


def _attention_weights(q, k, mask):
    """Softmax of the scores, in float32 [B, H, L, M]."""
    scores = jnp.einsum("bhlk,bhmk->bhlm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    powers = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return (powers / powers.sum(axis=-1, keepdims=True)).astype(q.dtype)


@jax.custom_vjp
def _attention(q, k, v, mask):
    return _attention_weights(q, k, mask) @ v  # [B, H, L, K]


def _attention_forward(q, k, v, mask):
    weights = _attention_weights(q, k, mask)
    return weights @ v, (q, k, v, weights)


def _attention_backward(kept, g):
    q, k, v, weights = kept
    g_weights = jnp.einsum("bhlk,bhmk->bhlm", g, v)
    g_scores = weights * (g_weights - (weights * g_weights).sum(axis=-1, keepdims=True))
    g_v = jnp.einsum("bhlm,bhlk->bhmk", weights, g)
    g_k = jnp.einsum("bhlm,bhlk->bhmk", g_scores, q)
    return g_scores @ k, g_k, g_v, None


_attention.defvjp(_attention_forward, _attention_backward)


def _half_on_ampere(x) -> bool:
    """Half precision on a GPU of the Ampere generation or later, which compute in it as the kernels here do."""
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    return half and float(jax.devices()[0].compute_capability) >= 8


def _cudnn_takes(query, key, mask) -> bool:
    """Whether cuDNN's flash attention has a kernel for these shapes."""
    even = mask is None or query.shape[1] % 2 == key.shape[1] % 2 == 0
    return query.shape[-1] % 8 == 0 and even


def _with_slope(value_and_slope: Callable) -> Callable:
    """An elementwise function whose backward pass multiplies by the slope, computed from what went in."""

    @jax.custom_vjp
    def function(x):
        return value_and_slope(x)[0]

    function.defvjp(lambda x: (function(x), x), lambda x, g: (g * value_and_slope(x)[1],))
    return function


def _gelu(x):
    cdf = 0.5 * (1.0 + jax.lax.erf(x / math.sqrt(2.0)))
    return x * cdf, cdf + x * jnp.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def _quick_gelu(x):
    gate = jax.nn.sigmoid(1.702 * x)
    return x * gate, gate * (1.0 + 1.702 * x * (1.0 - gate))


gelu = _with_slope(_gelu)  # Hendrycks & Gimpel 2016, the exact (erf) form, as BERT
quick_gelu = _with_slope(_quick_gelu)  # x * sigmoid(1.702 x), as OpenAI's CLIP

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}  # the names that Hugging Face configs use


def xla_cpu(x: Array) -> bool:
    """Whether `x` takes the forms that are for XLA's CPU code and float32."""
    return jax.default_backend() == "cpu" and x.dtype == jnp.float32


def linear(
    x: Float[Array, "*batch D"], kernel: Float[Array, "D M"], bias: Float[Array, " M"] | None
) -> Float[Array, "*batch M"]:
    """`x @ kernel + bias`, with a derivative of its own."""
    return _linear(x.reshape(-1, x.shape[-1]), kernel, bias).reshape(*x.shape[:-1], kernel.shape[-1])


def dot_general(x: Float[Array, "*batch D"], kernel: Float[Array, "D M"], dimension_numbers, **options):
    """`jax.lax.dot_general` as nnx.Linear calls it: the last axis of `x` with the first of `kernel`."""
    if jax.default_backend() != "gpu":
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)
    return linear(x, kernel, None)


@jax.custom_vjp
def _linear(x, kernel, bias):
    y = x @ kernel
    return y if bias is None else y + bias


def _linear_forward(x, kernel, bias):
    return _linear(x, kernel, bias), (x, kernel, bias)


def _linear_backward(kept, g):
    x, kernel, bias = kept
    # XLA's CPU code copies what it transposes: the kernel's gradient where that is the smaller
    turned = xla_cpu(x) and len(x) > max(kernel.shape)
    g_kernel = (g.T @ x).T if turned else x.T @ g
    return g @ kernel.T, g_kernel, None if bias is None else g.sum(axis=0)


_linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], bias: Float[Array, " D"], epsilon: float
) -> Float[Array, "*batch D"]:
    """Layer normalisation over the last axis (Ba et al. 2016, eq. 4)."""
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.maximum((x * x).mean(axis=-1, keepdims=True) - mean * mean, 0.0)  # as nnx.LayerNorm has it
    factor = jax.lax.rsqrt(variance + epsilon)
    return (x - mean) * factor * scale + bias, (x, scale, mean, factor)


def _layer_norm_backward(epsilon, kept, g):
    x, scale, mean, factor = kept
    unit = (x - mean) * factor
    g_unit = g * scale
    along = (g_unit * unit).mean(axis=-1, keepdims=True)
    g_x = factor * (g_unit - g_unit.mean(axis=-1, keepdims=True) - unit * along)
    rows = tuple(range(x.ndim - 1))
    return g_x, (g * unit).sum(axis=rows), g.sum(axis=rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
