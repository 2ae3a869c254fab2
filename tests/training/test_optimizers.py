"""The optimizers against their papers in NumPy, a rate for each group, and what a frozen part costs: nothing."""

import dataclasses
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from tiny import CONFIG, tiny_batch, tiny_clip

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import PRESETS
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.training.optimizers import (
    adabelief,
    adamw,
    check_patterns,
    decayed,
    dotted,
    matching,
    muon,
    rate_factors,
    warmup_cosine,
    with_rates,
)
from clipid_utils.training.step import assemble, init_state, make_step

SHAPES = {  # one leaf of each kind
    "vision.blocks.0.attn.q_proj.kernel": (6, 6), "vision.blocks.0.mlp.fc1.kernel": (6, 12),
    "vision.blocks.0.mlp.fc2.kernel": (12, 6), "vision.blocks.0.mlp.fc2.bias": (6,),
    "vision.class_embedding": (6,), "vision.position_embedding": (5, 6), "vision.patch_embedding.kernel": (12, 6),
    "text.word_embedding": (20, 6), "text.ln.scale": (6,), "text.blocks.0.attn.out_proj.kernel": (6, 6),
    "text.projection.kernel": (6, 4), "logit_scale": (),
}
DECAYED = {name for name in SHAPES if name.endswith("kernel")} | {"text.word_embedding"}
STEPS = 5


def tree(arrays: dict) -> nnx.State:
    """A state of parameters by their dotted names."""
    paths = {tuple(int(part) if part.isdigit() else part for part in name.split(".")): value
             for name, value in arrays.items()}
    return nnx.from_flat_state({path: nnx.Param(jnp.asarray(value, jnp.float32)) for path, value in paths.items()})


def flat(params) -> dict:
    return {name: np.array(value, np.float64) for name, value in flatten_params(params).items()}


def drawn(seed: int, size: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) * size for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def weights() -> dict:
    """Ordinary ones, but a bias of zeros and a kernel with one column of zeros, as some models start."""
    weights = drawn(0, 0.1)
    weights["vision.blocks.0.mlp.fc2.bias"][:] = 0
    weights["vision.blocks.0.mlp.fc1.kernel"][:, 3] = 0
    return weights


# Small ones, which no clip touches, and large ones
GRADIENTS = [drawn(seed, size) for seed, size in enumerate((1e-5, 3.0, 1e-3, 0.5, 1e-5), start=1)]


def steps_of(optimizer, weights: dict) -> list[dict]:
    """The weights after each of the steps."""
    params, found = tree(weights), []
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in GRADIENTS:
        updates, state = update(tree(gradient), state, params)
        params = optax.apply_updates(params, updates)
        found.append(flat(params))
    return found


def assert_close(found: list[dict], expected: list[dict], rtol: float) -> None:
    """`rtol` of the largest change of a leaf in a step: weights themselves would hide a wrong one."""
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        before = expected[step - 1] if step else None
        for name, value in mine.items():
            change = np.abs(theirs[name] - before[name]).max() if step else 1e-3
            np.testing.assert_allclose(value, theirs[name], rtol=1e-6, atol=rtol * change, err_msg=f"{step} {name}")


# --- AdamW and AdaBelief, in NumPy and float64 ----------------------------------------------------------------------


def numpy_adamw(weights, schedule, decay, clip, b2):
    """Loshchilov & Hutter 2019, algorithm 2, with the decay inside the rate, after a clip of the global norm."""
    weights, found = dict(weights), []
    mean, square = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    for step, gradient in enumerate(GRADIENTS):
        norm = math.sqrt(sum((value**2).sum() for value in gradient.values()))
        for name, value in gradient.items():
            value = value * min(1.0, clip / norm)
            mean[name] = 0.9 * mean[name] + 0.1 * value
            square[name] = b2 * square[name] + (1 - b2) * value**2
            move = mean[name] / (1 - 0.9 ** (step + 1))
            move = move / (np.sqrt(square[name] / (1 - b2 ** (step + 1))) + 1e-8)
            pull = decay * weights[name] if name in DECAYED else 0.0
            weights[name] = weights[name] - schedule(step) * (move + pull)
        found.append(dict(weights))
    return found


def numpy_adabelief(weights, schedule, decay, clip, least=1e-3, unit_axis=0):
    """Zhuang et al. 2020, algorithm 2, after Brock et al. 2021, equation 3: a unit is what one output is summed from.

    A vector, and a scalar, is one unit.
    """
    weights, found = dict(weights), []
    mean, belief = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
    for step, gradient in enumerate(GRADIENTS):
        for name, value in gradient.items():
            axis = unit_axis if value.ndim == 2 else None
            norm, of_weights = (np.sqrt((x**2).sum(axis=axis, keepdims=True)) for x in (value, weights[name]))
            value = value * np.minimum(1.0, clip * np.maximum(of_weights, least) / norm)
            mean[name] = 0.9 * mean[name] + 0.1 * value
            belief[name] = 0.999 * belief[name] + 0.001 * (value - mean[name]) ** 2 + 1e-16
            move = mean[name] / (1 - 0.9 ** (step + 1))
            move = move / (np.sqrt(belief[name] / (1 - 0.999 ** (step + 1))) + 1e-16)
            pull = decay * weights[name] if name in DECAYED else 0.0
            weights[name] = weights[name] - schedule(step) * (move + pull)
        found.append(dict(weights))
    return found


@pytest.mark.parametrize("options", [{}, {"b2": 0.999}])
@pytest.mark.parametrize("decay, clip", [(0.0, 1.0), (0.3, 0.1)])
def test_adamw_is_the_papers(weights, decay, clip, options):
    schedule = warmup_cosine(0.01, STEPS + 1, 2)
    expected = numpy_adamw(weights, schedule, decay, clip, **{"b2": 0.98, **options})
    assert_close(steps_of(adamw(schedule, decay, clip, **options), weights), expected, 1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adabelief_is_the_papers(weights, decay):
    schedule = warmup_cosine(0.01, STEPS + 1, 2)
    expected = numpy_adabelief(weights, schedule, decay, 0.01)
    assert_close(steps_of(adabelief(schedule, decay, 0.01), weights), expected, 1e-3)


@pytest.mark.parametrize("other", [{"clip": 1e9}, {"clip": 0.02}, {"least": 1e-2}, {"least": 0.0}, {"unit_axis": 1},
                                   {"unit_axis": None}, {"decay": 0.1}])
def test_another_adabelief_is_not_the_same(weights, other):
    """The comparison above tells each of its numbers: with another one it fails."""
    schedule = warmup_cosine(0.01, STEPS + 1, 2)
    with np.errstate(invalid="ignore"):
        another = numpy_adabelief(weights, schedule, **{"decay": 0.3, "clip": 0.01, **other})
    with pytest.raises(AssertionError):
        assert_close(steps_of(adabelief(schedule, 0.3, 0.01), weights), another, 1e-3)


# --- Muon -----------------------------------------------------------------------------------------------------------


def uneven(value: np.ndarray) -> np.ndarray:
    """A matrix with the same directions; some of them are four times as strong as others."""
    left, _, right = np.linalg.svd(value, full_matrices=False)
    return left @ np.diag(np.linspace(1.0, 0.25, len(right))) @ right


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
def test_muon_moves_block_matrices_along_their_gradients_polar_factor(weights, size):
    """U V' of the gradient's U S V', whatever its size; optax stretches what is wider than high."""
    optimizer, params = muon(lambda step: 0.02, 0.0, 1.0), tree(weights)
    gradient = {name: size * (uneven(value) if value.ndim == 2 else value) for name, value in GRADIENTS[1].items()}
    updates = flat(jax.jit(optimizer.update)(tree(gradient), optimizer.init(params), params)[0])
    for name, value in updates.items():
        if ".blocks." in name and value.ndim == 2:
            value = value / (10 * 0.02 * max(1.0, value.shape[1] / value.shape[0]) ** 0.5)
            left, _, right = np.linalg.svd(gradient[name], full_matrices=False)
            values = np.linalg.svd(value, compute_uv=False)
            assert (values > 0.6).all() and (values < 1.3).all(), (name, values)  # in five iterations: about 1
            cosine = -(value * (left @ right)).sum() / np.linalg.norm(value) / np.linalg.norm(left @ right)
            assert cosine > 0.97, name
        else:  # Adam's first step with Nesterov's momentum: the sign, and 1.47 times the rate
            np.testing.assert_allclose(value, -0.02 * 1.474 * np.sign(gradient[name]), rtol=0.02, err_msg=name)


@pytest.mark.parametrize("blocks", [True, False])
def test_muon_of_a_part_of_the_model(weights, blocks):
    """Where nothing is trained but a block's matrices, and where everything else is."""
    part = {name: value for name, value in weights.items() if (".blocks." in name and value.ndim == 2) == blocks}
    optimizer, params = muon(lambda step: 0.01, 0.1, 1.0), tree(part)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
    assert flat(updates).keys() == part.keys()
    assert all(np.abs(value).max() > 1e-3 for value in flat(updates).values())


# --- What decays, and the schedule ----------------------------------------------------------------------------------


def named(params, values) -> dict:
    """The leaves of `values` by the dotted names of `params`' parameters."""
    names = (dotted(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0])
    return dict(zip(names, jax.tree.leaves(values), strict=True))


def test_what_decays_in_towers_of_the_other_kind():
    """ViT with its patches' bias and its pooler, RoBERTa with one token type: kernels, words and types, no more."""
    vision = dataclasses.replace(CONFIG.vision, layers=1, ln_pre=False, patch_bias=True, pooling="pooler")
    text = dataclasses.replace(CONFIG.text, layers=1, token_types=1, position_offset=2)
    params = nnx.state(tiny_clip(vision=vision, text=text, logit_bias=-10.0)[0], nnx.Param)
    mask = named(params, decayed(params))
    assert {"vision.patch_embedding.bias", "vision.pooler.kernel", "logit_bias"} < mask.keys()
    tables = {"text.word_embedding", "text.token_type_embedding"}
    assert mask == {name: name.endswith(".kernel") or name in tables for name in mask}


@given(rate=st.floats(1e-5, 1.0), steps=st.integers(3, 10_000), warm=st.floats(0.0, 0.9), at=st.floats(0.0, 1.0))
def test_the_schedule_is_a_line_and_half_a_cosine(rate, steps, warm, at):
    warmup = min(max(round(warm * steps), 1), steps - 2)
    schedule, step = warmup_cosine(rate, steps, warmup), round(at * steps)
    part = (step - warmup) / (steps - warmup)
    expected = rate * step / warmup if step < warmup else rate * 0.5 * (1 + math.cos(math.pi * part))
    assert float(schedule(step)) == pytest.approx(expected, rel=1e-4, abs=1e-5 * rate)
    assert float(schedule(0)) == 0 and float(schedule(warmup)) == pytest.approx(rate)
    for end in (steps, steps + 1, 2 * steps):  # a run that is continued after its end does not learn again
        assert float(schedule(end)) == pytest.approx(0, abs=1e-6 * rate)


# --- A rate for each group ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params():
    return nnx.state(tiny_clip()[0], nnx.Param)


def factors_of(params, rates, layer_decay=1.0, vision=2, text=2) -> dict:
    return named(params, rate_factors(params, rates, layer_decay, {"vision": vision, "text": text}))


def test_the_first_pattern_that_fits_counts(params):
    rates = {"vision.blocks.1.*": 0.1, "vision.*": 0.5, "*.bias": 3.0, "logit_scale": 0.0}
    for name, factor in factors_of(params, rates).items():
        if name.startswith("vision."):
            assert factor == (0.1 if name.startswith("vision.blocks.1.") else 0.5), name
        else:
            assert factor == (3.0 if name.endswith(".bias") else 0.0 if name == "logit_scale" else 1.0), name


def depth(name: str, layers: int = 2) -> int:
    """How many layers stand between a leaf and its tower's end, its own one too."""
    part = name.split(".")
    if part[0] == "logit_scale" or part[1] in ("ln_post", "pooler", "projection"):
        return 0
    return layers - int(part[2]) if part[1] == "blocks" else layers + 1


def test_a_layer_decays_once_for_each_layer_to_its_towers_end(params):
    found = factors_of(params, {}, 0.5)
    assert found == {name: 0.5 ** depth(name) for name in found}
    assert found["text.word_embedding"] == found["text.ln.scale"] == found["vision.ln_pre.bias"] == 1 / 8
    assert found["vision.patch_embedding.kernel"] == found["vision.class_embedding"] == 1 / 8
    assert found["text.blocks.0.ln_1.scale"] == 1 / 4 and found["text.blocks.1.mlp.fc1.kernel"] == 1 / 2
    assert found["text.projection.kernel"] == found["vision.ln_post.scale"] == found["logit_scale"] == 1


def test_towers_of_other_depths_count_their_own_layers():
    model = nnx.eval_shape(lambda: HybridCLIP(PRESETS["mini"], rngs=nnx.Rngs(0)))  # 4 layers and 2
    found = factors_of(nnx.state(model, nnx.Param), {}, 0.5, vision=4)
    assert found == {name: 0.5 ** depth(name, 4 if name.startswith("vision.") else 2) for name in found}


def test_group_and_layer_multiply(params):
    found = factors_of(params, {"vision.*": 0.1}, 0.5)
    assert found == {name: pytest.approx((0.1 if name.startswith("vision.") else 1.0) * 0.5 ** depth(name))
                     for name in found}


@pytest.mark.parametrize("optimizer", [adamw, adabelief, muon])
@pytest.mark.parametrize("trained", ["", "text."])
def test_every_update_is_that_of_the_optimizer_times_its_factor(weights, optimizer, trained):
    """Decay and all; also where only one tower is trained."""
    params = tree({name: value for name, value in weights.items() if name.startswith(trained)})
    plain = optimizer(lambda step: 0.01, 0.5, 1.0)
    rated = with_rates(plain, {"*.word_embedding": 0.1, "*.projection.*": 3.0}, 0.5, {"vision": 1, "text": 1})
    gradients = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)
    updates, theirs = (flat(jax.jit(kind.update)(gradients, kind.init(params), params)[0]) for kind in (plain, rated))
    for name, value in updates.items():
        group = 0.1 if name == "text.word_embedding" else 3.0 if ".projection." in name else 1.0
        assert value.any()
        np.testing.assert_allclose(theirs[name], value * group * 0.5 ** depth(name, 1), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("trainable", [
    ["text.word_embedding"], ["text.blocks.0.*"], ["text.word_embedding", "text.projection.*"],
])
def test_layers_that_are_frozen_are_layers_too(trainable):
    """A new vocabulary alone, learned under frozen blocks, is as far from the end as ever."""
    model, _ = tiny_clip()
    layers = {"vision": CONFIG.vision.layers, "text": CONFIG.text.layers}
    optimizer = with_rates(optax.sgd(1.0), {}, 0.5, layers)
    _, state = init_state(model, optimizer, 0, trainable)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, state.params), state.opt_state, state.params)
    for name, value in flat(updates).items():
        np.testing.assert_array_equal(value, -(0.5 ** depth(name)), err_msg=name)


# --- Patterns -------------------------------------------------------------------------------------------------------


def test_patterns_choose_by_dotted_names(params):
    wanted = matching(["vision.*.kernel", "logit_scale", "text.blocks.1.ln_?.scale"])
    chosen = {dotted(path) for path, leaf in nnx.to_flat_state(params) if wanted(path, leaf)}
    names = set(flatten_params(params))
    assert chosen == {name for name in names if name.startswith("vision.") and name.endswith(".kernel")} | {
        "logit_scale", "text.blocks.1.ln_1.scale", "text.blocks.1.ln_2.scale"}


@pytest.mark.parametrize("patterns", [["teks.*"], ["text.*", "Vision.*"], ["vision"], [""]])
def test_a_pattern_that_fits_nothing_is_named(params, patterns):
    """With the names that there are, the blocks once."""
    with pytest.raises(ValueError) as error:
        check_patterns(params, patterns)
    text = str(error.value)
    assert repr(patterns[-1]) in text and "fits no parameter" in text and "blocks.0.*" in text
    assert "blocks.1" not in text


def test_a_pattern_that_fits_nothing_stops_before_a_step(params):
    model, _ = tiny_clip()
    with pytest.raises(ValueError, match=r"the pattern 'teks\.\*' fits no parameter"):
        init_state(model, optax.sgd(0.1), 0, ["vision.*", "teks.*"])
    with pytest.raises(ValueError, match=r"the pattern 'proj\.\*' fits no parameter"):
        factors_of(params, {"*.projection.*": 1.0, "proj.*": 2.0})
    check_patterns(params, ["*", "logit_scale", "*.blocks.1.*"])


# --- Frozen parts ---------------------------------------------------------------------------------------------------


def held(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("optimizer", [adamw, adabelief, muon])
@pytest.mark.parametrize("trainable", [("*.projection.*", "logit_scale"), ("text.*",), ("*",)])
def test_what_is_frozen_has_no_optimizer_state(optimizer, trainable):
    """Two moments for each trained leaf, for Muon's matrices one, and a few counters; in leaves and in bytes."""
    model, _ = tiny_clip()
    _, state = init_state(model, optimizer(warmup_cosine(0.01, 10, 2), 0.1, 1.0), 0, trainable)
    trained, frozen = flatten_params(state.params), flatten_params(state.frozen)
    whole = flatten_params(nnx.state(model, nnx.Param))
    assert trained.keys() | frozen.keys() == whole.keys() and not trained.keys() & frozen.keys()
    single = [value for name, value in trained.items() if ".blocks." in name and value.ndim == 2]
    single = single if optimizer is muon else []
    leaves = jax.tree.leaves(state.opt_state)
    counters = [leaf for leaf in leaves if leaf.dtype == jnp.int32]
    moments = [leaf for leaf in leaves if leaf.dtype != jnp.int32]
    numbers = [leaf for leaf in moments if leaf.size > 1 or leaf.ndim == 0 and "logit_scale" in trained]
    assert len(counters) <= 6 and all(leaf.ndim == 0 for leaf in counters)
    assert len(numbers) - (2 * len(trained) - len(single)) in range(0, 4)  # Muon's coefficients
    assert 0 <= held(moments) - (2 * held(state.params) - held(single)) < 200
    assert held(state.average) == held(state.params)


def test_a_locked_image_tower_stays_bit_for_bit():
    """LiT (Zhai et al. 2022): the pictures' embeddings stay, decay and average or not, and the texts' move."""
    model, processor = tiny_clip(vision=dataclasses.replace(CONFIG.vision, layers=1),
                                 text=dataclasses.replace(CONFIG.text, layers=1))
    optimizer = with_rates(adamw(0.01, 0.5, 1.0), {"text.blocks.*": 0.1}, 0.9, {"vision": 1, "text": 1})
    graph, state = init_state(model, optimizer, 0, ["text.*", "logit_scale"])
    before = {name: np.array(value) for name, value in flatten_params(nnx.state(model, nnx.Param)).items()}
    step = make_step(graph, optimizer, image_mean=processor.image_mean, image_std=processor.image_std,
                     augmentation=None, drop_path=0.3, average_decay=0.5)
    for seed in range(4):
        state, values = step(state, tiny_batch(processor, 8, seed))
    assert float(values["logit_scale"]) == float(state.params["logit_scale"][...]) != before["logit_scale"]
    for averaged in (False, True):
        after = flatten_params(nnx.state(assemble(graph, state, averaged), nnx.Param))
        assert after.keys() == before.keys()
        for name, value in after.items():
            if name.startswith("vision."):
                np.testing.assert_array_equal(value, before[name], err_msg=name)
            else:
                assert (np.asarray(value) != before[name]).any(), name
