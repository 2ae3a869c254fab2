"""One training step: what decays, what is clamped, what is averaged; on eight devices: test_distributed.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import CONFIG, short_clip, tiny_batch, tiny_clip

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import MAX_LOGIT_SCALE
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.training.augment import AugmentConfig
from clipid_utils.training.loss import clip_loss, same_concept, siglip_loss
from clipid_utils.training.optimizers import adamw, muon
from clipid_utils.training.step import apply_gradients, init_state, make_step, make_update

SGD = optax.sgd(0.1)


@functools.cache
def compiled(graph, optimizer, options):
    return make_step(graph, optimizer, **dict(options))


def prepare(model, processor, optimizer=SGD, **options):
    """A state and a step; plain pictures, SGD, unless `options` say otherwise. Equal steps are compiled once."""
    graph, state = init_state(model, optimizer, seed=0)
    options = {"augmentation": None, "image_mean": tuple(processor.image_mean),
               "image_std": tuple(processor.image_std), **options}
    return state, compiled(graph, optimizer, tuple(options.items()))


def embeddings(model, processor, batch):
    pixels = jnp.asarray(processor.normalize(batch["images"]))
    tokens = jnp.asarray(batch["input_ids"]), jnp.asarray(batch["attention_mask"])
    return model.encode_image(pixels), model.encode_text(*tokens)


def copied(tree):
    return jax.tree.map(np.array, tree)


def test_muon_decays_what_adamw_decays():
    model, _ = short_clip()
    optimizer = muon(lambda step: 0.01, 0.5, 1.0)
    _, state = init_state(model, optimizer, 0)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, state.params), state.opt_state, state.params)
    after = flatten_params(optax.apply_updates(state.params, updates))
    for name, before in flatten_params(state.params).items():
        decays = name.endswith(".kernel") or name in ("text.word_embedding", "text.token_type_embedding")
        np.testing.assert_allclose(after[name], before * (0.95 if decays else 1.0), rtol=1e-5, atol=1e-7)


def test_the_caller_keeps_the_model():
    """A step reuses its state's memory; the model it came from must not be that memory."""
    model, processor = short_clip()
    before = copied(flatten_params(nnx.state(model)))
    state, step = prepare(model, processor)
    state, _ = step(state, tiny_batch(processor))
    state, _ = step(state, tiny_batch(processor))
    for name, value in flatten_params(nnx.state(model)).items():
        np.testing.assert_array_equal(value, before[name])
    assert int(state.step) == 2


def test_the_metrics_are_those_of_the_plain_formula():
    model, processor = short_clip()
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
    results, optimizer = [], adamw(1e-2, 0.1, 1.0)
    for _ in range(2):
        model, processor = short_clip()
        state, step = prepare(model, processor, optimizer, augmentation=AugmentConfig(), drop_path=0.3,
                              keep_patches=3)
        for seed in range(3):
            state, values = step(state, tiny_batch(processor, seed=seed))
        results.append((copied(flatten_params(state.params)), float(values["loss"])))
    assert results[0][1] == results[1][1]
    for name, value in results[0][0].items():
        np.testing.assert_array_equal(value, results[1][0][name])


def test_each_step_draws_anew():
    """The same batch at a rate of zero: only the augmentation can change the loss."""
    model, processor = short_clip()
    state, step = prepare(model, processor, optax.sgd(0.0), augmentation=AugmentConfig())
    losses = []
    for _ in range(4):
        state, values = step(state, tiny_batch(processor))
        losses.append(float(values["loss"]))
    assert len(set(losses)) == 4


def test_logit_scale_is_clamped_at_ln_100():
    model, processor = short_clip(logit_scale=MAX_LOGIT_SCALE - 1e-3)

    def rising(image_embeds, text_embeds, scale, positives, axis):
        return -scale

    state, step = prepare(model, processor, optax.sgd(10.0), loss=rising)
    for _ in range(2):
        state, values = step(state, tiny_batch(processor))
        assert float(values["logit_scale"]) == pytest.approx(MAX_LOGIT_SCALE)
        assert float(state.params["logit_scale"][...]) == pytest.approx(MAX_LOGIT_SCALE)


def test_a_clamped_scale_can_come_down_again():
    model, processor = short_clip(logit_scale=MAX_LOGIT_SCALE)
    state, step = prepare(model, processor, optax.sgd(1e-2), loss=lambda i, t, scale, positives, axis: scale)
    for _ in range(2):
        state, values = step(state, tiny_batch(processor))
    assert float(values["logit_scale"]) < MAX_LOGIT_SCALE - 0.1


def test_the_average_follows_closely_at_first():
    model, processor = short_clip()
    state, step = prepare(model, processor)
    expected = copied(flatten_params(state.average))
    for number in range(3):
        state, _ = step(state, tiny_batch(processor, seed=number))
        decay = min(0.999, (1 + number) / (10 + number))
        params = flatten_params(state.params)
        expected = {name: decay * value + (1 - decay) * np.asarray(params[name]) for name, value in expected.items()}
    for name, value in flatten_params(state.average).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6)


def test_the_loss_falls():
    model, processor = short_clip()
    state, step = prepare(model, processor, adamw(3e-3, 0.0, 1.0))
    losses = []
    for _ in range(40):
        state, values = step(state, tiny_batch(processor))
        losses.append(float(values["loss"]))
    assert losses[-1] < losses[0] / 3


def test_siglip_learns_its_bias_too():
    model, processor = short_clip(logit_bias=-5.0, logit_scale=1.0)
    state, step = prepare(model, processor, loss=siglip_loss)
    after, values = step(state, tiny_batch(processor))
    assert np.isfinite(float(values["loss"])) and float(after.params["logit_bias"][...]) != -5.0


def test_bfloat16_steps_keep_float32_states():
    model, processor = short_clip(dtype=jnp.bfloat16)
    state, step = prepare(model, processor, adamw(1e-3, 0.1, 1.0))
    state, values = step(state, tiny_batch(processor))
    exact, step = prepare(*short_clip(), adamw(1e-3, 0.1, 1.0))
    assert float(values["loss"]) == pytest.approx(float(step(exact, tiny_batch(processor))[1]["loss"]), abs=0.05)
    for leaf in jax.tree.leaves((state.params, state.average)):
        assert leaf.dtype == jnp.float32


def test_what_moves_slowly_moves_in_bfloat16_too():
    """1,000 updates of 0.001 are nothing in bfloat16, where 1 + 0.001 is 1: of them the average and AdamW's moments."""
    model, _ = short_clip()
    graph, params = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    optimizer = adamw(0.0, 0.0, 1e9)
    _, state = init_state(model, optimizer, 0)
    assert state.params["logit_scale"][...].dtype == jnp.float32
    assert state.params["vision"]["projection"]["kernel"][...].dtype == jnp.bfloat16
    for leaf in jax.tree.leaves((state.average, state.opt_state)):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    state = state._replace(step=jnp.int32(10**6), average=jax.tree.map(jnp.zeros_like, state.average),
                           params=jax.tree.map(jnp.ones_like, state.params))
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-3), state.params)

    def step(state, _):
        return apply_gradients(state, gradients, optimizer, average_decay=0.999)[0], None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=1000))(state)
    for leaf in jax.tree.leaves(state.average):
        np.testing.assert_allclose(leaf, 1 - 0.999**1000, rtol=1e-3)
    kernel = optax.tree.get(state.opt_state, "nu")["vision"]["projection"]["kernel"][...]
    np.testing.assert_allclose(kernel, 1e-6, rtol=0.01)
    assert state.params["vision"]["projection"]["kernel"][...].dtype == jnp.bfloat16


def test_without_an_average_it_is_the_parameters():
    model, processor = short_clip()
    state, step = prepare(model, processor, average_decay=0.0)
    state, _ = step(state, tiny_batch(processor))
    for one, other in zip(jax.tree.leaves(state.average), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(one, other)


def test_each_tower_gets_its_options(monkeypatch):
    """The text tower, half as deep in mini, half of drop_path; keep_patches is for pictures."""
    model, processor = short_clip()
    seen, real = {}, {name: getattr(HybridCLIP, name) for name in ("encode_image", "encode_text")}
    for name, method in real.items():
        monkeypatch.setattr(HybridCLIP, name, lambda self, *arrays, keys, name=name, method=method, **options:
                            seen.update({name: options}) or method(self, *arrays, keys=keys, **options))
    graph, state = init_state(model, optax.sgd(0.1), 0)
    update = make_update(graph, optax.sgd(0.1), image_mean=processor.image_mean, image_std=processor.image_std,
                         augmentation=None, drop_path=0.4, keep_patches=3, remat=True)
    jax.eval_shape(update, state, tiny_batch(processor))
    assert seen == {"encode_image": {"drop_path": 0.4, "keep_patches": 3, "remat": True},
                    "encode_text": {"drop_path": 0.2, "remat": True}}


@pytest.mark.parametrize("chunks", [1, 2])
def test_equal_captions_are_positives_in_the_step(chunks):
    model, processor = short_clip()
    batch = tiny_batch(processor)
    ids = np.stack([np.arange(8), np.arange(8)], axis=1).astype(np.int32)
    same = np.repeat(ids[::2], 2, axis=0)

    def loss(ids):
        state, step = prepare(model, processor, chunks=chunks)
        return float(step(state, batch | {"caption_ids": ids})[1]["loss"])

    paired = jnp.asarray(np.arange(8) // 2)
    expected = clip_loss(*embeddings(model, processor, batch), model.scale(), same_concept(paired))
    assert loss(same) == pytest.approx(float(expected), rel=1e-4)
    assert abs(loss(ids) - loss(same)) > 2e-3


def test_a_batch_of_one_pair_is_refused():
    model, processor = short_clip()
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
    model, processor = short_clip()
    graph, params = nnx.split(model)
    batch = tiny_batch(processor)
    anew, once = (jax.jit(jax.grad(lambda x, remat=remat: embed(x, graph, batch, remat)))(params)
                  for remat in (True, False))
    for one, other in zip(jax.tree.leaves(anew), jax.tree.leaves(once), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
