"""One training step: what decays, what is clamped, what is averaged; on eight devices: test_distributed.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import CONFIG, tiny_batch, tiny_clip

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import MAX_LOGIT_SCALE, PRESETS
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.training.augment import AugmentConfig
from clipid_utils.training.loss import clip_loss, same_concept, siglip_loss
from clipid_utils.training.optimizers import adamw, decayed, muon, warmup_cosine
from clipid_utils.training.step import init_state, make_step


def prepare(model, processor, optimizer=None, **options):
    """A state and a step; plain pictures, SGD, unless `options` say otherwise."""
    optimizer = optimizer or optax.sgd(0.1)
    graph, state = init_state(model, optimizer, seed=0)
    options = {"augmentation": None, **options}
    step = make_step(graph, optimizer, image_mean=processor.image_mean, image_std=processor.image_std, **options)
    return state, step


def copied(tree):
    return jax.tree.map(np.array, tree)


def test_only_matrices_decay():
    """By name, at the sizes of a real preset: the towers' kernels and the word tables, and nothing else."""
    model = nnx.eval_shape(lambda: HybridCLIP(PRESETS["mini"], rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    mask = {".".join(map(str, path)): bool(jax.tree.leaves(leaf)[0])
            for path, leaf in nnx.to_flat_state(decayed(params))}
    for name, decays in mask.items():
        table = name in ("text.word_embedding", "text.token_type_embedding")
        assert decays == (name.endswith(".kernel") or table), name
    assert not mask["logit_scale"] and not mask["vision.position_embedding"] and not mask["text.position_embedding"]
    assert not mask["vision.class_embedding"] and not mask["vision.ln_pre.scale"]


def test_decay_pulls_what_has_no_gradient():
    """Through the optimizer: with gradients of zero a kernel shrinks, a position stays."""
    model, _ = tiny_clip()
    optimizer = adamw(0.1, 0.5, 1.0)
    _, state = init_state(model, optimizer, 0)
    zero = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = optimizer.update(zero, state.opt_state, state.params)
    after = flatten_params(optax.apply_updates(state.params, updates))
    for name, before in flatten_params(state.params).items():
        decays = name.endswith(".kernel") or name in ("text.word_embedding", "text.token_type_embedding")
        np.testing.assert_allclose(after[name], before * (0.95 if decays else 1.0), rtol=1e-5, atol=1e-7)


def test_muon_steps_are_orthogonal_inside_the_blocks_and_adams_elsewhere():
    model, processor = tiny_clip()
    state, step = prepare(model, processor, muon(lambda step: 0.01, 0.0, 1.0))
    before = copied(flatten_params(state.params))
    state, _ = step(state, tiny_batch(processor))
    for name, after in flatten_params(state.params).items():
        change = np.asarray(after) - before[name]
        if "blocks" in name and name.endswith("kernel"):
            stretch = max(1.0, change.shape[1] / change.shape[0]) ** 0.5  # optax keeps the mean size of an entry
            values = np.linalg.svd(change / (10 * 0.01), compute_uv=False) / stretch
            # The strongest directions are about 1 after five iterations, whatever the gradient's size was
            assert 0.6 < values.max() < 1.4 and values[2] > 0.5, (name, values)
        elif change.any() and "k_proj.bias" not in name:  # shifts all scores alike: its gradient is rounding alone
            # Adam's first step is the gradient's sign; with Nesterov's momentum (Dozat 2016) 1.47 times the rate
            assert np.abs(change).max() == pytest.approx(0.0147, rel=0.05), name


def test_muon_decays_what_adamw_decays():
    model, _ = tiny_clip()
    optimizer = muon(lambda step: 0.01, 0.5, 1.0)
    _, state = init_state(model, optimizer, 0)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, state.params), state.opt_state, state.params)
    after = flatten_params(optax.apply_updates(state.params, updates))
    for name, before in flatten_params(state.params).items():
        decays = name.endswith(".kernel") or name in ("text.word_embedding", "text.token_type_embedding")
        np.testing.assert_allclose(after[name], before * (0.95 if decays else 1.0), rtol=1e-5, atol=1e-7)


def test_the_schedule_warms_up_and_cools_down():
    rates = np.array([float(warmup_cosine(0.1, 100, 10)(step)) for step in range(101)])
    assert rates[0] == 0 and rates[100] == pytest.approx(0, abs=1e-7)
    assert rates[10] == rates.max() == pytest.approx(0.1)
    assert (np.diff(rates[:11]) > 0).all() and (np.diff(rates[10:]) < 0).all()
    assert np.isfinite([float(warmup_cosine(0.1, steps, 0)(0)) for steps in (0, 1, 2)]).all()


def test_the_caller_keeps_the_model():
    """A step reuses its state's memory; the model it came from must not be that memory."""
    model, processor = tiny_clip()
    before = copied(flatten_params(nnx.state(model)))
    state, step = prepare(model, processor)
    state, _ = step(state, tiny_batch(processor))
    state, _ = step(state, tiny_batch(processor))
    for name, value in flatten_params(nnx.state(model)).items():
        np.testing.assert_array_equal(value, before[name])
    assert int(state.step) == 2


def test_the_metrics_are_those_of_the_plain_formula():
    model, processor = tiny_clip()
    batch = tiny_batch(processor)
    pixels = jnp.asarray(processor.normalize(batch["images"]))
    tokens = jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"])
    graph, params = nnx.split(model, nnx.Param)

    def plain(params):
        model = nnx.merge(graph, params)
        return clip_loss(model.encode_image(pixels), model.encode_text(*tokens), model.scale(),
                         same_concept(jnp.asarray(batch["concepts"])))

    loss, gradients = jax.value_and_grad(plain)(params)
    state, step = prepare(model, processor)
    after, values = step(state, batch)
    assert float(values["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(values["gradient_norm"]) == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-4)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    for name, value in flatten_params(after.params).items():
        np.testing.assert_allclose(value, flatten_params(expected)[name], atol=1e-5)
    assert float(values["logit_scale"]) == pytest.approx(float(after.params["logit_scale"][...]))


def test_the_same_seed_takes_the_same_steps():
    results = []
    for _ in range(2):
        model, processor = tiny_clip()
        state, step = prepare(model, processor, adamw(1e-2, 0.1, 1.0), augmentation=AugmentConfig(), drop_path=0.3,
                              keep_patches=3)
        for seed in range(3):
            state, values = step(state, tiny_batch(processor, seed=seed))
        results.append((copied(flatten_params(state.params)), float(values["loss"])))
    assert results[0][1] == results[1][1]
    for name, value in results[0][0].items():
        np.testing.assert_array_equal(value, results[1][0][name])


def test_each_step_draws_anew():
    """The same batch at a rate of zero: only the augmentation can change the loss."""
    model, processor = tiny_clip()
    state, step = prepare(model, processor, optax.sgd(0.0), augmentation=AugmentConfig())
    losses = []
    for _ in range(4):
        state, values = step(state, tiny_batch(processor))
        losses.append(float(values["loss"]))
    assert len(set(losses)) == 4


def test_logit_scale_is_clamped_at_ln_100():
    model, processor = tiny_clip(logit_scale=MAX_LOGIT_SCALE - 1e-3)

    def rising(image_embeds, text_embeds, scale, positives, axis):
        return -scale

    state, step = prepare(model, processor, optax.sgd(10.0), loss=rising)
    for _ in range(2):
        state, values = step(state, tiny_batch(processor))
        assert float(values["logit_scale"]) == pytest.approx(MAX_LOGIT_SCALE)
        assert float(state.params["logit_scale"][...]) == pytest.approx(MAX_LOGIT_SCALE)


def test_a_clamped_scale_can_come_down_again():
    model, processor = tiny_clip(logit_scale=MAX_LOGIT_SCALE)
    state, step = prepare(model, processor, optax.sgd(1e-2), loss=lambda i, t, scale, positives, axis: scale)
    for _ in range(2):
        state, values = step(state, tiny_batch(processor))
    assert float(values["logit_scale"]) < MAX_LOGIT_SCALE - 0.1


def test_the_average_follows_closely_at_first():
    model, processor = tiny_clip()
    state, step = prepare(model, processor, average_decay=0.999)
    expected = copied(flatten_params(state.average))
    for number in range(3):
        state, _ = step(state, tiny_batch(processor, seed=number))
        decay = min(0.999, (1 + number) / (10 + number))
        params = flatten_params(state.params)
        expected = {name: decay * value + (1 - decay) * np.asarray(params[name]) for name, value in expected.items()}
    for name, value in flatten_params(state.average).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6)


def test_the_loss_falls():
    model, processor = tiny_clip()
    state, step = prepare(model, processor, adamw(3e-3, 0.0, 1.0))
    losses = []
    for _ in range(40):
        state, values = step(state, tiny_batch(processor))
        losses.append(float(values["loss"]))
    assert losses[-1] < losses[0] / 3


def test_siglip_learns_its_bias_too():
    model, processor = tiny_clip(logit_bias=-5.0, logit_scale=1.0)
    state, step = prepare(model, processor, loss=siglip_loss)
    after, values = step(state, tiny_batch(processor))
    assert np.isfinite(float(values["loss"])) and float(after.params["logit_bias"][...]) != -5.0


def test_bfloat16_steps_keep_float32_states():
    model, processor = tiny_clip(dtype=jnp.bfloat16)
    state, step = prepare(model, processor, adamw(1e-3, 0.1, 1.0))
    state, values = step(state, tiny_batch(processor))
    exact, step = prepare(*tiny_clip(), adamw(1e-3, 0.1, 1.0))
    assert float(values["loss"]) == pytest.approx(float(step(exact, tiny_batch(processor))[1]["loss"]), abs=0.05)
    for leaf in jax.tree.leaves((state.params, state.average)):
        assert leaf.dtype == jnp.float32


def test_a_batch_of_one_pair_is_refused():
    model, processor = tiny_clip()
    state, step = prepare(model, processor)
    with pytest.raises(ValueError, match="at least 2 pairs"):
        step(state, tiny_batch(processor, 1))


def test_with_blocks_computed_anew_little_is_kept_for_the_same_gradient():
    def embed(params, graph, batch, remat):
        model, pixels = nnx.merge(graph, params), batch["images"].astype(jnp.float32) / 255
        return (model.encode_image(pixels, remat=remat)
                * model.encode_text(batch["input_ids"], batch["attention_mask"], remat=remat)).sum()

    def kept(remat):
        """The bytes that six blocks a tower leave for the backward pass."""
        six = {side: dataclasses.replace(getattr(CONFIG, side), layers=6) for side in ("vision", "text")}
        model, processor = tiny_clip(**six)
        graph, params = nnx.split(model)
        batch = tiny_batch(processor, 32)
        pull = jax.eval_shape(lambda x: jax.vjp(lambda y: embed(y, graph, batch, remat), x)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    assert kept(True) < kept(False) / 4
    model, processor = tiny_clip()
    graph, params = nnx.split(model)
    batch = tiny_batch(processor)
    anew, once = (jax.jit(jax.grad(lambda x, remat=remat: embed(x, graph, batch, remat)))(params)
                  for remat in (True, False))
    for one, other in zip(jax.tree.leaves(anew), jax.tree.leaves(once), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
