"""The operations whose form matters for speed. Everything else in the towers is written in the simplest way.

- `attention` multiplies arrays [B, H, L, K], which XLA's CPU code does faster than the einsum over [B, L, H, K]. On an
  NVIDIA GPU, half precision takes cuDNN's flash attention.
- `layer_norm` and the activations have derivatives in closed form. JAX's own keep and read more of the forward pass.

All have forward and backward derivatives (only cuDNN's kernels have no forward one). They depend on where a computation
runs, not on the process' default device. `benchmarks/bench_step.py` measures the whole step with them, and
`benchmarks/bench_encode.py` the forward pass. On a Linux CPU, transparent huge pages matter more than all of these
(`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, set by the Makefile).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention(
    query: Float[Array, "B L H K"],
    key: Float[Array, "B M H K"],
    value: Float[Array, "B M H K"],
    mask: Bool[Array, "B #L M"] | None = None,  # noqa: F821
) -> Float[Array, "B L H K"]:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1); `mask` is True for the keys that may be seen."""
    mask = None if mask is None else mask[:, None]  # [B, 1, #L, M]
    if _cudnn_takes(query, key, mask):
        return jax.lax.platform_dependent(query, key, value, mask, cuda=_flash_attention, default=_attention)
    return _attention(query, key, value, mask)


def _attention(query, key, value, mask):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (query, key, value))  # [B, H, L, K]
    scores = jnp.einsum("bhlk,bhmk->bhlm", q / math.sqrt(q.shape[-1]), k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = _softmax(scores).astype(q.dtype)  # [B, H, L, M]
    return (weights @ v).transpose(0, 2, 1, 3)  # [B, L, H, K]


@jax.custom_jvp
def _softmax(scores):
    """jax.nn.softmax; its backward pass keeps the result only."""
    powers = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@_softmax.defjvp
def _softmax_derivative(values, changes):
    weights = _softmax(*values)
    return weights, weights * (changes[0] - (weights * changes[0]).sum(axis=-1, keepdims=True))


def _flash_attention(query, key, value, mask):
    if mask is not None:
        mask = jnp.broadcast_to(mask, (query.shape[0], 1, query.shape[1], key.shape[1]))
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


def _cudnn_takes(query, key, mask) -> bool:
    """Whether this process has a GPU whose cuDNN has flash attention (Ampere or later) for this type and shape."""
    even = mask is None or query.shape[1] % 2 == key.shape[1] % 2 == 0
    fits = query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] % 8 == 0 and even
    return fits and any(d.platform == "gpu" and float(d.compute_capability) >= 8 for d in jax.devices())


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], bias: Float[Array, " D"], epsilon: float
) -> Float[Array, "*batch D"]:
    """Layer normalisation over the last axis (Ba et al. 2016, eq. 4)."""
    unit, _ = _unit(x, epsilon)
    return unit * scale + bias


def _unit(x, epsilon):
    """The normalised values, and the factor that normalised them."""
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.maximum((x * x).mean(axis=-1, keepdims=True) - mean * mean, 0.0)  # like nnx.LayerNorm
    factor = jax.lax.rsqrt(variance + epsilon)
    return (x - mean) * factor, factor


@layer_norm.defjvp
def _layer_norm_derivative(epsilon, values, changes):
    (x, scale, bias), (d_x, d_scale, d_bias) = values, changes
    unit, factor = _unit(x, epsilon)
    along = (unit * d_x).mean(axis=-1, keepdims=True)
    d_unit = factor * (d_x - d_x.mean(axis=-1, keepdims=True) - unit * along)
    return unit * scale + bias, d_unit * scale + unit * d_scale + d_bias


def _with_slope(value_and_slope: Callable) -> Callable:
    """An elementwise function from one that returns its value and its slope."""

    @jax.custom_jvp
    def function(x):
        return value_and_slope(x)[0]

    @function.defjvp
    def derivative(values, changes):
        value, slope = value_and_slope(*values)
        return value, slope * changes[0]

    return function


def _gelu(x):
    cdf = 0.5 * (1.0 + jax.lax.erf(x / math.sqrt(2.0)))
    return x * cdf, cdf + x * jnp.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def _quick_gelu(x):
    gate = jax.nn.sigmoid(1.702 * x)
    return x * gate, gate * (1.0 + 1.702 * x * (1.0 - gate))


def _gelu_tanh(x):
    factor = 2.0 * math.sqrt(2.0 / math.pi)
    gate = jax.nn.sigmoid(factor * (x + 0.044715 * x * x * x))  # (1 + tanh(u)) / 2, which XLA's CPU code does slower
    return x * gate, gate + x * gate * (1.0 - gate) * factor * (1.0 + 3 * 0.044715 * x * x)


gelu = _with_slope(_gelu)  # Hendrycks & Gimpel 2016, the exact (erf) form, like BERT
quick_gelu = _with_slope(_quick_gelu)  # x * sigmoid(1.702 x), like OpenAI's CLIP
gelu_tanh = _with_slope(_gelu_tanh)  # the same paper's approximation, like SigLIP

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu, "gelu_pytorch_tanh": gelu_tanh}  # as in Hugging Face configs


def normalize(features: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
    """Vectors of unit length, in float32; a zero vector stays zero."""
    features = features.astype(jnp.float32)
    return features * jax.lax.rsqrt(jnp.sum(features**2, axis=-1, keepdims=True) + 1e-12)
