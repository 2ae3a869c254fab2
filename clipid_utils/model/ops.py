"""The few operations whose fastest form depends on the machine, kept in one place.

Everything in `clip.py` calls these three functions and is otherwise written plainly. What each does about speed:

- `attention`: on a GPU `jax.nn.dot_product_attention` (cuDNN flash attention for half precision), on a TPU its XLA
  form; on a CPU explicit products over contiguous [B, H, L, K] arrays, which XLA's CPU back end runs faster than the
  einsum over [B, L, H, K].
- `gelu`, `quick_gelu`: the textbook functions with a derivative that keeps the slope computed in the forward pass. The
  default derivative recomputes erf and exp inside the backward fusion, where XLA's CPU code cannot share them.

`benchmarks/bench_step.py` measures the whole step with them. What matters more on a Linux CPU stands outside the
process: transparent huge pages (`GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, which the Makefile sets) for the one large
buffer that XLA takes anew for each step.
"""

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
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1); `mask` is True where a key may be seen."""
    if jax.default_backend() != "cpu":
        flash = "cudnn" if jax.default_backend() == "gpu" and _cudnn_takes(query, key, mask) else None
        full_mask = None if mask is None else jnp.broadcast_to(
            mask[:, None], (query.shape[0], 1, query.shape[1], key.shape[1])
        )
        return jax.nn.dot_product_attention(query, key, value, mask=full_mask, implementation=flash)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (query, key, value))  # [B, H, L, K]
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(0, 1, 3, 2)  # [B, H, L, M]
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(v.dtype)
    return (weights @ v).transpose(0, 2, 1, 3)  # [B, L, H, K]


def _cudnn_takes(query, key, mask) -> bool:
    """Whether cuDNN's flash attention does these: half precision, Ampere or later, and the shapes its kernels have."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    recent = float(jax.devices()[0].compute_capability) >= 8
    even = mask is None or query.shape[1] % 2 == key.shape[1] % 2 == 0
    return half and recent and query.shape[-1] % 8 == 0 and even


def _with_saved_slope(value_and_slope: Callable) -> Callable:
    """An elementwise function whose backward pass multiplies by the slope that the forward pass kept."""

    @jax.custom_vjp
    def function(x):
        return value_and_slope(x)[0]

    function.defvjp(value_and_slope, lambda slope, g: (g * slope,))
    return function


def _gelu(x):
    cdf = 0.5 * (1.0 + jax.lax.erf(x / math.sqrt(2.0)))
    return x * cdf, cdf + x * jnp.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def _quick_gelu(x):
    gate = jax.nn.sigmoid(1.702 * x)
    return x * gate, gate * (1.0 + 1.702 * x * (1.0 - gate))


gelu = _with_saved_slope(_gelu)  # Hendrycks & Gimpel 2016, the exact (erf) form, as BERT
quick_gelu = _with_saved_slope(_quick_gelu)  # x * sigmoid(1.702 x), as OpenAI's CLIP

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}  # the names that Hugging Face configs use
