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

from clipid_utils.model import ops, short_attention
from clipid_utils.model.clip import linear


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


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_double_loop(monkeypatch, backend, masked):
    q, k, v = random_qkv(0, keys=6)
    mask = jnp.asarray([[[1, 1, 1, 1, 0, 0]], [[1, 0, 1, 1, 1, 1]]], bool) if masked else None
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    np.testing.assert_allclose(ops.attention(q, k, v, mask), naive_attention(q, k, v, mask), atol=1e-5)


def test_attention_takes_a_mask_for_each_query():
    q, k, v = random_qkv(1)
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool)), (2, 5, 5))
    np.testing.assert_allclose(ops.attention(q, k, v, causal), naive_attention(q, k, v, causal), atol=1e-5)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_masked_cannot_matter(seed):
    """However far off a masked key and value are, the result does not move."""
    q, k, v = random_qkv(seed)
    mask = jnp.asarray([[[1, 1, 0, 1, 0]], [[1, 0, 0, 0, 0]]], bool)
    hidden = ~mask[:, 0, :, None, None]
    same = ops.attention(q, jnp.where(hidden, k + 1e3, k), jnp.where(hidden, v - 1e3, v), mask)
    np.testing.assert_array_equal(same, ops.attention(q, k, v, mask))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), order=st.permutations(range(5)))
def test_attention_does_not_know_the_order_of_its_keys(seed, order):
    q, k, v = random_qkv(seed)
    order = np.array(order)
    np.testing.assert_allclose(ops.attention(q, k[:, order], v[:, order]), ops.attention(q, k, v), atol=1e-5)


def test_attention_gradient_is_that_of_jax():
    q, k, v = random_qkv(2)
    mask = jnp.asarray([[[1, 1, 1, 1, 0]], [[1, 1, 1, 0, 0]]], bool)
    weight = jax.random.normal(jax.random.key(0), q.shape)

    def ours(q, k, v):
        return (weight * ops.attention(q, k, v, mask)).sum()

    def reference(q, k, v):
        return (weight * jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])).sum()

    for one, other in zip(jax.grad(ours, (0, 1, 2))(q, k, v), jax.grad(reference, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_attention_keeps_bfloat16(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv(3))
    out = ops.attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), naive_attention(q, k, v, None), atol=0.03)


@pytest.mark.parametrize(("length", "heads", "width"), [(50, 3, 64), (32, 2, 32), (7, 2, 16), (64, 1, 64)])
def test_short_attention_and_its_gradients(length, heads, width):
    """The kernels as Pallas' interpreter runs them, in bfloat16, beside JAX's own attention in float32."""
    rng = np.random.default_rng(length)
    *qkv, g = (jnp.asarray(rng.normal(size=(3, length, heads, width)), jnp.bfloat16) for _ in range(4))
    mask = jnp.asarray(rng.random((3, length)) < 0.7).at[:, 0].set(True)
    out, back = jax.vjp(lambda *qkv: short_attention.attention(*qkv, mask, True), *qkv)
    precise, precise_back = jax.vjp(
        lambda *qkv: jax.nn.dot_product_attention(*qkv, mask=mask[:, None, None]),
        *(x.astype(jnp.float32) for x in qkv),
    )
    for ours, theirs in zip((out, *back(g)), (precise, *precise_back(g.astype(jnp.float32))), strict=True):
        assert ours.dtype == jnp.bfloat16 and ours.shape == theirs.shape
        assert jnp.linalg.norm(ours.astype(jnp.float32) - theirs) < 0.004 * jnp.linalg.norm(theirs)


def test_short_attention_of_a_row_that_sees_nothing():
    """Finite, as the other forms have it: the mean of all values, and no gradient of the scores."""
    q, k, v = (x.astype(jnp.bfloat16) for x in random_qkv(4, (1, 5, 1, 16)))
    out, back = jax.vjp(lambda *qkv: short_attention.attention(*qkv, jnp.zeros((1, 5), bool), True), q, k, v)
    np.testing.assert_allclose(out.astype(jnp.float32), jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=0.02)
    g_q, g_k, g_v = back(jnp.ones_like(out))
    assert not g_q.any() and not g_k.any()
    np.testing.assert_allclose(g_v.astype(jnp.float32), 1.0, atol=0.02)


def on_gpu(monkeypatch, capability: str, devices: int = 1) -> None:
    """What JAX says of a machine with GPUs, on one that has none."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [mock.Mock(compute_capability=capability)] * devices)
    monkeypatch.setattr(jax, "device_count", lambda: devices)


@pytest.mark.parametrize(("capability", "devices", "length", "mask_rows", "dtype", "form"), [
    ("9.0", 1, 50, None, "bfloat16", "short"),
    ("8.0", 1, 32, 1, "float16", "short"),
    ("9.0", 2, 50, None, "bfloat16", "cudnn"),  # XLA would not cut the kernels among devices
    ("9.0", 1, 197, None, "bfloat16", "cudnn"),
    ("9.0", 1, 64, 64, "bfloat16", "cudnn"),  # a mask for each query
    ("9.0", 1, 77, 1, "bfloat16", None),  # cuDNN has no odd lengths with a mask
    ("9.0", 1, 50, None, "float32", None),
    ("7.5", 1, 50, None, "float16", None),
])
def test_which_attention_a_gpu_runs(monkeypatch, capability, devices, length, mask_rows, dtype, form):
    on_gpu(monkeypatch, capability, devices)
    calls = []
    monkeypatch.setattr(short_attention, "attention", lambda q, k, v, mask: calls.append("short") or q)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, mask, implementation: calls.append(
        implementation) or q)
    q, k, v = (jnp.zeros((2, length, 4, 64), dtype) for _ in range(3))
    mask = None if mask_rows is None else jnp.ones((2, mask_rows, length), bool)
    assert ops.attention(q, k, v, mask).shape == q.shape
    assert calls == [form]


def test_without_pallas_triton_cudnn_attends(monkeypatch):
    on_gpu(monkeypatch, "9.0")
    q, calls = jnp.zeros((2, 50, 4, 64), jnp.bfloat16), []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, mask, implementation: calls.append(
        implementation) or q)
    assert short_attention.takes(q, q, None)
    monkeypatch.setattr(short_attention, "triton", None)
    ops.attention(q, q, q)
    assert calls == ["cudnn"]


TEXTBOOK = {"gelu": lambda x: jax.nn.gelu(x, approximate=False), "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x)}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_activation_and_its_slope(name):
    x = jnp.concatenate([jnp.linspace(-6, 6, 241), jnp.array([-1e4, -40.0, 40.0, 1e4])])
    ours, textbook = ops.ACTIVATIONS[name], TEXTBOOK[name]
    np.testing.assert_allclose(ours(x), textbook(x), atol=1e-6)
    slope = jax.vmap(jax.grad(ours))(x)
    assert np.isfinite(slope).all()
    np.testing.assert_allclose(slope, jax.vmap(jax.grad(textbook))(x), atol=2e-6)
    assert ours(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@settings(max_examples=50)
@given(x=st.floats(-5, 5), name=st.sampled_from(sorted(TEXTBOOK)))
def test_slope_is_the_finite_difference(x, name):
    step, ours = 1e-2, ops.ACTIVATIONS[name]
    difference = (float(ours(jnp.float32(x + step))) - float(ours(jnp.float32(x - step)))) / (2 * step)
    assert abs(float(jax.grad(ours)(jnp.float32(x))) - difference) < 2e-3


def gradients(function, x, *parameters):
    """Of a weighted sum of what `function` returns, by each argument."""
    weight = jax.random.normal(jax.random.key(1), function(x, *parameters).shape)
    places = tuple(range(1 + len(parameters)))
    return jax.grad(lambda *arguments: (weight * function(*arguments)).sum(), places)(x, *parameters)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 5, 6)])
def test_layer_norm_and_its_gradient_are_the_textbooks(shape):
    rng = np.random.default_rng(4)
    x, scale, bias = (jnp.asarray(rng.normal(2.0, 3.0, size), jnp.float32) for size in (shape, 6, 6))

    def ours(x, scale, bias):
        return ops.layer_norm(x, scale, bias, 1e-5)

    def textbook(x, scale, bias):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * scale + bias

    np.testing.assert_allclose(ours(x, scale, bias), textbook(x, scale, bias), atol=1e-5)
    for one, other in zip(gradients(ours, x, scale, bias), gradients(textbook, x, scale, bias), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 5, 6)])
@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])  # the ways taken there, on this machine
def test_a_linear_layer_and_its_gradient_are_the_textbooks(backend, shape, with_bias, monkeypatch):
    rng = np.random.default_rng(5)
    sizes = (shape, (6, 4), (4,)) if with_bias else (shape, (6, 4))
    x, *values = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in sizes)
    graph, state = nnx.split(linear(6, 4, dtype=jnp.float32, rngs=nnx.Rngs(0), bias=with_bias))

    def ours(x, *values):
        for name, value in zip(("kernel", "bias"), values, strict=False):
            state[name] = state[name].replace(value)
        return nnx.merge(graph, state)(x)

    def textbook(x, kernel, bias=0.0):
        return jnp.einsum("...d,dm->...m", x, kernel) + bias

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    np.testing.assert_allclose(ours(x, *values), textbook(x, *values), atol=1e-5)
    for one, other in zip(gradients(ours, x, *values), gradients(textbook, x, *values), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
