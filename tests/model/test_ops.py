"""The operations against their textbook forms: loops, and derivatives by finite differences or by JAX itself."""

import math
from unittest import mock

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

from clipid_utils.model import ops
from clipid_utils.model.layers import LayerNorm, linear


def naive_attention(q, k, v, mask):
    """One number at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, queries, heads, size = q.shape
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(batch, queries, heads):
        seen = [j for j in range(k.shape[1]) if mask is None or mask[b, min(i, mask.shape[1] - 1), j]]
        scores = [sum(q[b, i, h, c] * k[b, j, h, c] for c in range(size)) / math.sqrt(size) for j in seen]
        weights = np.exp(np.array(scores) - max(scores))
        out[b, i, h] = sum(w * v[b, j, h] for w, j in zip(weights / weights.sum(), seen, strict=True))
    return out


def random_qkv(seed, shape=(2, 5, 2, 4), keys=5):
    rng = np.random.default_rng(seed)
    other = (shape[0], keys, *shape[2:])
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, other, other)]


MASK = jnp.asarray([[[1, 1, 1, 1, 0, 0]], [[1, 0, 1, 1, 1, 1]]], bool)
CAUSAL = jnp.broadcast_to(jnp.tril(jnp.ones((5, 6), bool)), (2, 5, 6))


@pytest.mark.parametrize("mask", [None, MASK, CAUSAL], ids=["none", "padding", "each query's"])
def test_attention_is_the_double_loop(mask):
    q, k, v = random_qkv(0, keys=6)
    np.testing.assert_allclose(ops.attention(q, k, v, mask), naive_attention(q, k, v, mask), atol=1e-5)
    half = ops.attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), mask)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), naive_attention(q, k, v, mask), atol=0.05)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(5)))
def test_masked_keys_and_the_order_of_keys_do_not_matter(seed, order):
    q, k, v = random_qkv(seed)
    mask, order = jnp.asarray([[[1, 1, 0, 1, 0]], [[1, 0, 0, 0, 0]]], bool), np.array(order)
    hidden, expected = ~mask[:, 0, :, None, None], ops.attention(q, k, v, mask)
    same = ops.attention(q, jnp.where(hidden, k + 1e3, k), jnp.where(hidden, v - 1e3, v), mask)
    np.testing.assert_array_equal(same, expected)
    shuffled = ops.attention(q, k[:, order], v[:, order], mask[..., order])
    np.testing.assert_allclose(shuffled, expected, atol=1e-5)


# Derivatives, forward and backward, beside those of the textbook forms

def textbook_attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, mask=MASK[:, None])


def textbook_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias


TEXTBOOK = {
    "attention": (lambda q, k, v: ops.attention(q, k, v, MASK), textbook_attention,
                  [(2, 5, 2, 4), (2, 6, 2, 4), (2, 6, 2, 4)]),
    "layer norm": (lambda x, scale, bias: ops.layer_norm(x, scale, bias, 1e-5), textbook_norm, [(2, 5, 6), (6,), (6,)]),
    "layer norm of one row": (lambda x, s, b: ops.layer_norm(x, s, b, 1e-5), textbook_norm, [(6,), (6,), (6,)]),
    "gelu": (ops.gelu, lambda x: jax.nn.gelu(x, approximate=False), [(3, 50)]),
    "quick gelu": (ops.quick_gelu, lambda x: x * jax.nn.sigmoid(1.702 * x), [(3, 50)]),
}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_values_and_both_derivatives_are_the_textbooks(name):
    ours, textbook, shapes = TEXTBOOK[name]
    rng = np.random.default_rng(4)
    values, changes = ([jnp.asarray(rng.normal(0.5, 2.0, shape), jnp.float32) for shape in shapes] for _ in range(2))
    forward = jax.jvp(ours, values, changes)  # custom_vjp would raise here
    for one, other in zip(forward, jax.jvp(textbook, values, changes), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)
    weight = jax.random.normal(jax.random.key(1), forward[0].shape)
    places = tuple(range(len(shapes)))
    gradients = [jax.grad(lambda *x, f=f: (weight * f(*x)).sum(), places)(*values) for f in (ours, textbook)]
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)


@settings(max_examples=30)
@given(x=st.floats(-5, 5), name=st.sampled_from(sorted(ops.ACTIVATIONS)))
def test_slope_is_the_finite_difference(x, name):
    step, ours = 1e-2, ops.ACTIVATIONS[name]
    difference = (float(ours(jnp.float32(x + step))) - float(ours(jnp.float32(x - step)))) / (2 * step)
    assert abs(float(jax.grad(ours)(jnp.float32(x))) - difference) < 2e-3


def test_layers_compute_in_their_type():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        norm = LayerNorm(6, epsilon=1e-5, dtype=dtype, rngs=nnx.Rngs(0))
        layer = linear(6, 4, dtype=dtype, rngs=nnx.Rngs(0))
        assert norm(x).dtype == layer(x).dtype == dtype
        plain = nnx.LayerNorm(6, epsilon=1e-5, dtype=dtype, rngs=nnx.Rngs(0))(x)
        np.testing.assert_allclose(norm(x).astype(jnp.float32), plain.astype(jnp.float32), atol=1e-2, rtol=1e-2)
        expected = x @ layer.kernel[...] + layer.bias[...]
        np.testing.assert_allclose(layer(x).astype(jnp.float32), expected, atol=3e-2)


# The form follows the place where the computation runs

def lowered(platform, dtype=jnp.bfloat16, shape=(2, 4, 2, 8)):
    q = jax.ShapeDtypeStruct(shape, dtype)
    return jax.jit(ops.attention).trace(q, q, q).lower(lowering_platforms=(platform,)).as_text()


def test_flash_attention_is_only_for_a_gpu(monkeypatch):
    """A process with a GPU runs the plain form where its computation is placed on the CPU."""
    monkeypatch.setattr(jax, "devices", lambda: [mock.Mock(platform="gpu", compute_capability="9.0")])
    monkeypatch.setattr(ops, "_flash_attention", lambda q, k, v, mask: jnp.cos(q))
    assert "cosine" in lowered("cuda") and "cosine" not in lowered("cpu") and "cosine" not in lowered("tpu")


@pytest.mark.parametrize(("capability", "shape", "mask", "dtype", "takes"), [
    ("8.0", (2, 50, 2, 64), None, jnp.bfloat16, True),
    ("9.0", (2, 32, 2, 8), (2, 1, 1, 32), jnp.float16, True),
    ("9.0", (2, 77, 2, 64), (2, 1, 1, 77), jnp.bfloat16, False),  # cuDNN has no odd lengths with a mask
    ("9.0", (2, 50, 2, 60), None, jnp.bfloat16, False),
    ("9.0", (2, 50, 2, 64), None, jnp.float32, False),
    ("7.5", (2, 50, 2, 64), None, jnp.float16, False),
    (None, (2, 50, 2, 64), None, jnp.bfloat16, False),
])
def test_which_attention_cudnn_takes(monkeypatch, capability, shape, mask, dtype, takes):
    platform = "cpu" if capability is None else "gpu"
    monkeypatch.setattr(jax, "devices", lambda: [mock.Mock(platform=platform, compute_capability=capability)])
    q, mask = jnp.zeros(shape, dtype), None if mask is None else jnp.ones(mask, bool)
    assert ops._cudnn_takes(q, q, mask) == takes
