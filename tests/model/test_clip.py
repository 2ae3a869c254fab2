"""The contract of the towers: sizes, shapes, units, errors. test_parity_golden.py compares them with PyTorch."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from tiny import CONFIG, SIZE, tiny_batch, tiny_clip, tiny_processor

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import MAX_LOGIT_SCALE, PRESETS, CLIPConfig, VisionConfig
from clipid_utils.model.ops import normalize
from clipid_utils.model.text import TextEncoder
from clipid_utils.model.vision import VisionTransformer

# --- Shapes, units and errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, vision, text",
    [
        # CLIPVisionModelWithProjection of ViT-B/32; BertModel or RobertaModel of transformers, and a projection
        ("vit_b32_indobert_base", 87_849_216, 124_441_344 + 768 * 512),
        ("vit_b32_indobert_large", 87_849_216, 335_141_888 + 1024 * 512),
        ("vit_b32_indonesian_roberta_base", 87_849_216, 124_645_632 + 768 * 512),
    ],
)
def test_presets_have_the_published_sizes(preset, vision, text):
    model = nnx.eval_shape(lambda: HybridCLIP(PRESETS[preset], rngs=nnx.Rngs(0)))

    def count(part):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(part, nnx.Param)))

    assert (count(model.vision), count(model.text)) == (vision, text)


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def batch():
    inputs = tiny_batch(tiny_processor(), 6)
    pixels = np.random.default_rng(0).normal(size=(6, SIZE, SIZE, 3)).astype(np.float32)
    return {"pixel_values": jnp.asarray(pixels), "input_ids": jnp.asarray(inputs["input_ids"]),
            "attention_mask": jnp.asarray(inputs["attention_mask"])}


def assert_unit(vectors, *shape):
    assert vectors.shape == shape and vectors.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=-1), np.ones(shape[:-1]), atol=1e-5)


def test_everything_that_is_called_embeds_has_unit_length(clip, batch):
    model, _ = clip
    out = model(**batch)
    assert_unit(out.image_embeds, 6, 8)
    assert_unit(out.text_embeds, 6, 8)
    assert_unit(model.encode_patches(batch["pixel_values"]), 6, 4, 8)
    cosines = out.image_embeds @ out.text_embeds.T
    np.testing.assert_allclose(out.logits_per_image, cosines / 0.07, atol=1e-4)
    np.testing.assert_array_equal(out.logits_per_text, out.logits_per_image.T)


def test_the_model_takes_what_the_processor_gives(clip):
    """numpy arrays as they come, and not as many texts as pictures."""
    from PIL import Image

    model, processor = clip
    inputs = processor(images=[Image.new("RGB", (20, 30), "red")] * 2, text=["kucing tidur", "mobil merah", "ikan"])
    assert model(**inputs).logits_per_image.shape == (2, 3)
    assert_unit(model.encode_image(inputs["pixel_values"]), 2, 8)
    assert_unit(model.encode_text(inputs["input_ids"], inputs["attention_mask"]), 3, 8)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3))
def test_normalize(values):
    vector = jnp.asarray(values, jnp.float32)
    once = normalize(vector)
    norm = float(jnp.linalg.norm(vector))
    assert float(jnp.linalg.norm(once)) <= 1 + 1e-5
    if norm > 1e-2:
        np.testing.assert_allclose(once * norm, vector, rtol=1e-4, atol=1e-4)
    if not vector.any():
        assert not once.any()


def test_patchify_is_the_double_loop(clip, batch):
    model, _ = clip
    pixels = np.asarray(batch["pixel_values"])
    naive = [[picture[row : row + 8, column : column + 8].ravel() for row in (0, 8) for column in (0, 8)]
             for picture in pixels]
    np.testing.assert_array_equal(model.vision.patchify(batch["pixel_values"]), naive)


@pytest.mark.parametrize("shape", [(2, SIZE, SIZE + 8, 3), (2, SIZE + 8, SIZE + 8, 3)])
def test_another_picture_size_is_refused(clip, shape):
    with pytest.raises(ValueError, match=rf"expects \[B, {SIZE}, {SIZE}, 3\].*processor"):
        clip[0].encode_image(jnp.zeros(shape))


def test_a_patch_must_divide_the_picture():
    with pytest.raises(ValueError, match="image_size 50 is not a multiple of patch_size 8"):
        VisionTransformer(VisionConfig(image_size=50, patch_size=8), 4, rngs=nnx.Rngs(0))


def test_too_many_tokens_are_refused(clip):
    with pytest.raises(ValueError, match="have 17 tokens; this text tower takes 16: truncate in the processor"):
        clip[0].encode_text(jnp.ones((1, 17), jnp.int32), jnp.ones((1, 17), jnp.int32))


@pytest.mark.parametrize("bad", [-1, CONFIG.text.vocab_size])
def test_ids_beyond_the_table_are_refused(clip, bad):
    """JAX alone would take the last row for one that is too large."""
    ids, mask = np.array([[2, bad, 3]], np.int32), np.ones((1, 3), np.int32)
    for kind in (np.asarray, jnp.asarray):
        with pytest.raises(ValueError, match=f"have the id {bad}; the embedding table of this text tower has 300 rows"):
            clip[0].encode_text(kind(ids), mask)
    ids[0, 1] = CONFIG.text.vocab_size - 1
    assert_unit(clip[0].encode_text(ids, mask), 1, 8)


def test_logits_are_computed_at_full_precision(clip, batch):
    """On a TPU the default would round the vectors to bfloat16."""
    products = [equation for equation in jax.make_jaxpr(lambda inputs: clip[0](**inputs).logits_per_image)(batch).eqns
                if equation.primitive.name == "dot_general"]
    assert products[-1].outvars[0].aval.shape == (6, 6)
    assert products[-1].params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_forward_mode_reaches_every_parameter(clip, batch):
    graph, params = nnx.split(clip[0], nnx.Param)
    ones = jax.tree.map(jnp.ones_like, params)
    def logits(params):
        return nnx.merge(graph, params)(**batch).logits_per_image
    _, change = jax.jvp(logits, (params,), (ones,))
    by_hand = [logits(jax.tree.map(lambda p, step=step: p + step, params)) for step in (1e-3, -1e-3)]
    np.testing.assert_allclose(change, (by_hand[0] - by_hand[1]) / 2e-3, atol=0.05 * float(jnp.abs(change).max()))


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, logit_bias=-10.0), *PRESETS.values()])
def test_a_config_survives_its_dict(config):
    assert CLIPConfig.from_dict(dataclasses.asdict(config)) == config


def test_scale_is_the_exponential_and_never_above_100(clip):
    model, _ = tiny_clip(logit_scale=2.0)
    assert float(model.scale()) == pytest.approx(np.exp(2.0), rel=1e-6)
    model, _ = tiny_clip(logit_scale=9.0)
    assert float(model.scale()) == pytest.approx(100.0, rel=1e-5)
    assert pytest.approx(np.log(100.0)) == MAX_LOGIT_SCALE


def test_a_scale_at_its_limit_has_its_whole_gradient():
    """Published models are often stored at the limit; jnp.minimum gives half of the gradient there."""
    model, _ = tiny_clip(logit_scale=MAX_LOGIT_SCALE)
    graph, state = nnx.split(model)
    slope = jax.grad(lambda state: nnx.merge(graph, state).scale())(state)["logit_scale"][...]
    assert float(slope) == pytest.approx(100.0, rel=1e-5)


def test_a_bias_is_added_to_the_logits(batch):
    plain, _ = tiny_clip()
    biased, _ = tiny_clip(logit_bias=-10.0)
    np.testing.assert_allclose(biased(**batch).logits_per_image, plain(**batch).logits_per_image - 10, atol=1e-4)


def test_the_same_seed_is_the_same_model():
    leaves = [jax.tree.leaves(nnx.state(tiny_clip(seed)[0])) for seed in (1, 1, 2)]
    assert all((a == b).all() for a, b in zip(leaves[0], leaves[1], strict=True))
    assert any((a != b).any() for a, b in zip(leaves[0], leaves[2], strict=True))


# --- Texts ---------------------------------------------------------------------------------------------------------


def test_roberta_counts_from_its_offset_and_skips_padding():
    config = dataclasses.replace(CONFIG.text, position_offset=2)
    tower = TextEncoder(config, 8, rngs=nnx.Rngs(0))
    ids = jnp.array([[0, 7, 2, 1], [0, 1, 1, 1], [0, 7, 7, 2], [1, 1, 0, 2]])  # 1 is RoBERTa's padding, on any side
    assert tower.positions(ids).tolist() == [[2, 3, 4, 1], [2, 1, 1, 1], [2, 3, 4, 5], [1, 1, 2, 3]]
    assert tower.position_embedding.shape == (CONFIG.text.max_length + 2, CONFIG.text.width)
    assert tiny_clip()[0].text.positions(ids).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("change", [{}, {"position_offset": 2}, {"pooling": "mean"}])
def test_padding_does_not_change_a_text(change):
    tower = TextEncoder(dataclasses.replace(CONFIG.text, **change), 8, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(5, 50, (3, 6)), jnp.int32)
    grown = jnp.concatenate([ids, jnp.asarray(rng.integers(5, 50, (3, 4)), jnp.int32)], axis=1)
    mask = jnp.concatenate([jnp.ones((3, 6), jnp.int32), jnp.zeros((3, 4), jnp.int32)], axis=1)
    np.testing.assert_allclose(tower(grown, mask), tower(ids, mask[:, :6]), atol=1e-5)


def test_the_mean_counts_more_tokens_than_bfloat16_can():
    config = dataclasses.replace(CONFIG.text, pooling="mean", max_length=400, layers=0)
    tower = TextEncoder(config, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    ids, mask = np.full((1, 400), 7), (np.arange(400)[None] < 257).astype(int)
    tokens = np.asarray(tower.tokens(ids, mask), np.float32)[0, :257]
    expected = jnp.asarray(tokens.mean(0), jnp.bfloat16)
    np.testing.assert_array_equal(tower.pooled(ids, mask)[0], expected)


def test_mean_pooling_is_another_pooling(batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    mean, _ = tiny_clip(text=dataclasses.replace(CONFIG.text, pooling="mean"))
    assert float(jnp.abs(mean.encode_text(ids, mask) - tiny_clip()[0].encode_text(ids, mask)).max()) > 0.1


@settings(max_examples=10)
@given(st.permutations(range(6)))
def test_no_row_knows_of_another(clip, batch, order):
    """An embedding does not depend on what else is in the batch, nor on where it stands."""
    model, _ = clip
    out, shuffled = model(**batch), model(**{key: value[np.array(order)] for key, value in batch.items()})
    np.testing.assert_allclose(shuffled.image_embeds, out.image_embeds[np.array(order)], atol=1e-5)
    np.testing.assert_allclose(shuffled.text_embeds, out.text_embeds[np.array(order)], atol=1e-5)


# --- Precision and training's own switches -------------------------------------------------------------------------


def test_bfloat16_computes_with_float32_parameters(batch):
    exact, rough = tiny_clip()[0], tiny_clip(dtype=jnp.bfloat16)[0]
    for leaf in jax.tree.leaves(nnx.state(rough, nnx.Param)):
        assert leaf.dtype == jnp.float32
    assert rough.vision.tokens(batch["pixel_values"]).dtype == jnp.bfloat16
    one, other = exact(**batch), rough(**batch)
    assert_unit(other.image_embeds, 6, 8)
    assert_unit(other.text_embeds, 6, 8)
    assert other.logits_per_image.dtype == jnp.float32
    np.testing.assert_allclose(other.image_embeds, one.image_embeds, atol=0.03)
    np.testing.assert_allclose(other.text_embeds, one.text_embeds, atol=0.03)
    assert (other.image_embeds != one.image_embeds).any()


def keys_of(seed, count=6):
    return jax.random.split(jax.random.key(seed), count)


def test_kept_patches_are_drawn_and_the_others_never_computed(clip, batch):
    tower, pixels, keys = clip[0].vision, batch["pixel_values"], keys_of(0)
    assert tower.tokens(pixels, keys=keys, keep_patches=3).shape == (6, 4, 16)
    assert (tower.tokens(pixels, keys=keys, keep_patches=3) == tower.tokens(pixels, keys=keys, keep_patches=3)).all()
    assert (tower(pixels, keys=keys, keep_patches=3) != tower(pixels, keys=keys_of(1), keep_patches=3)).any()
    # All of them, or no keys (inference): the plain tower
    np.testing.assert_allclose(tower(pixels, keys=keys, keep_patches=4), tower(pixels), atol=1e-6)
    np.testing.assert_array_equal(tower(pixels, keep_patches=2), tower(pixels))


def test_a_kept_patch_keeps_its_place(clip):
    """One patch is left: the tower must say what it says when all others are the same picture's, wherever it stood."""
    tower = clip[0].vision
    picture = jnp.asarray(np.random.default_rng(1).normal(size=(1, SIZE, SIZE, 3)), jnp.float32)
    patches, place = tower.patchify(picture)[0], tower.position_embedding[...]
    alone = []  # by hand: the class token and one patch with its own position
    for p in range(4):
        x = jnp.stack([tower.class_embedding[...] + place[0], tower.patch_embedding(patches[p]) + place[1 + p]])[None]
        x = tower.ln_pre(x)
        for block in tower.blocks:
            x = block(x)
        alone.append(np.asarray(tower.projection(tower.ln_post(x[:, 0]))[0]))
    seen = set()
    for seed in range(12):
        out = np.asarray(tower(picture, keys=keys_of(seed, 1), keep_patches=1)[0])
        fits = [p for p in range(4) if np.allclose(out, alone[p], atol=1e-5)]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) >= 3


def test_stochastic_depth(clip, batch):
    tower, pixels = clip[0].vision, batch["pixel_values"]
    plain = tower(pixels)
    np.testing.assert_array_equal(tower(pixels, drop_path=0.5), plain)  # no keys: inference
    np.testing.assert_array_equal(tower(pixels, keys=keys_of(0)), plain)  # no chance: nothing is skipped
    one, again, other = (tower(pixels, keys=keys_of(seed), drop_path=0.5) for seed in (0, 0, 1))
    assert (one == again).all() and (one != other).any() and (one != plain).any()
    text = clip[0].text
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert (text(ids, mask, keys=keys_of(0), drop_path=0.5) != text(ids, mask)).any()


def test_a_skipped_branch_is_skipped_for_that_row_and_the_others_are_scaled_up(clip):
    from clipid_utils.model.layers import survivals

    scales = np.stack(survivals(keys_of(0, 2000), 0.5, 4, jnp.float32))  # [layers, 2, B, 1, 1]
    for layer, keep in enumerate([0.875, 0.75, 0.625, 0.5]):
        assert set(np.unique(scales[layer]).round(4)) == {0, np.float32(1 / keep).round(4)}
        assert abs(float(scales[layer].mean()) - 1) < 0.06  # so that inference needs no other scale
    block, x = clip[0].vision.blocks[0], jax.random.normal(jax.random.key(1), (3, 5, 16))
    survive = jnp.array([[0.0, 1, 1], [0, 0, 1]])[..., None, None]
    out = block(x, survive=survive)
    np.testing.assert_array_equal(out[0], x[0])
    np.testing.assert_allclose(out[1], (x + block.attn(block.ln_1(x)))[1], atol=1e-6)
    np.testing.assert_allclose(out[2], block(x)[2], atol=1e-6)
