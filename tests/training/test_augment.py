"""Each random change alone, with the others off; then what holds for all draws together."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from clipid_utils.training.augment import Affine, AugmentConfig, augment, warp

OFF = {field.name: 0.0 for field in dataclasses.fields(AugmentConfig)} | {"scale": (1.0, 1.0)}
SIZE, KEY = 16, jax.random.key(0)


def only(**changes) -> AugmentConfig:
    return AugmentConfig(**{**OFF, **changes})


def pictures(count: int = 4, size: int = SIZE, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def may(count: int, value: bool = True):
    return jnp.full(count, value)


def apply(images, config, key=KEY, may_flip=None, size=SIZE):
    may_flip = may(len(images)) if may_flip is None else may_flip
    keys = jax.random.split(key, len(images))
    return np.asarray(jax.jit(augment, static_argnums=(3, 4))(keys, images, may_flip, size, config))


def test_all_off_changes_nothing():
    images = pictures()
    np.testing.assert_allclose(apply(images, only()), np.asarray(images) / 255, atol=2e-5)


def test_only_pictures_that_may_are_mirrored():
    images = pictures(6)
    out = apply(images, only(flip=1.0), may_flip=jnp.array([1, 0, 1, 0, 0, 1], bool))
    plain = np.asarray(images) / 255
    for row, mirrored in enumerate([1, 0, 1, 0, 0, 1]):
        np.testing.assert_allclose(out[row], plain[row][:, ::-1] if mirrored else plain[row], atol=2e-5)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31 - 1))
def test_a_picture_with_a_left_is_never_mirrored(seed):
    """Whatever the draw: an arrow that points left keeps its tip in the left half."""
    arrow = np.full((1, SIZE, SIZE, 3), 255, np.uint8)
    arrow[0, 5:11, 3:7] = 0
    config = only(flip=0.9, degrees=20.0, shear=0.15, stretch=0.1)
    out = apply(jnp.asarray(arrow), config, jax.random.key(seed), may(1, False))
    ink = 1 - out[0].mean(axis=-1)
    assert ink[:, : SIZE // 2].sum() > ink[:, SIZE // 2 :].sum()


def test_about_half_are_mirrored():
    image = pictures(1)
    out = apply(jnp.repeat(image, 400, axis=0), only(flip=0.5))
    mirrored = np.abs(out - np.asarray(image)[0, :, ::-1] / 255).max(axis=(1, 2, 3)) < 1e-4
    plain = np.abs(out - np.asarray(image)[0] / 255).max(axis=(1, 2, 3)) < 1e-4
    assert (mirrored ^ plain).all() and 160 < mirrored.sum() < 240


@pytest.mark.parametrize("name", [name for name in OFF if name != "flip"])
def test_each_picture_has_its_own_draw_and_each_key_another(name):
    default = getattr(AugmentConfig(), name)
    config = only(**{name: 0.5 if name == "grey" else default})
    same = jnp.repeat(pictures(1), 8, axis=0)
    out, again, other = (apply(same, config, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(out, again)
    assert (out != other).any()
    different = {picture.tobytes() for picture in out}
    assert len(different) == (2 if name == "grey" else 8)
    assert np.abs(out - np.asarray(same) / 255).max() > 0.01


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31 - 1))
def test_values_stay_in_range_and_paper_white(seed):
    config = AugmentConfig(brightness=0.0, contrast=0.0)  # the two that are meant to change white too
    images = pictures(3, seed=seed).at[2].set(255)
    out = apply(images, config, jax.random.key(seed))
    assert out.min() >= 0 and out.max() <= 1 and np.isfinite(out).all()
    np.testing.assert_allclose(out[2], 1, atol=1e-4)


def test_grey_is_grey_and_keeps_its_lightness():
    out = apply(pictures(), only(grey=1.0))
    assert np.ptp(out, axis=-1).max() < 0.01
    np.testing.assert_allclose(out[..., 0], np.asarray(pictures()) / 255 @ [0.299, 0.587, 0.114], atol=0.01)


def test_hue_turns_colours_and_not_greys():
    grey = jnp.repeat(pictures()[..., :1], 3, axis=-1)
    np.testing.assert_allclose(apply(grey, only(hue=0.5)), np.asarray(grey) / 255, atol=0.01)
    assert np.abs(apply(pictures(), only(hue=0.5)) - np.asarray(pictures()) / 255).max() > 0.1


def test_a_larger_source_is_sampled_down():
    flat = jnp.full((2, 32, 32, 3), 77, jnp.uint8)
    out = apply(flat, only(), size=SIZE)
    assert out.shape == (2, SIZE, SIZE, 3)
    np.testing.assert_allclose(out, 77 / 255, atol=1e-4)
    fine = pictures(1, 32)
    halves = np.asarray(fine, np.float32)[0].reshape(SIZE, 2, SIZE, 2, 3).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(apply(fine, only())[0], halves, atol=1e-4)


# --- The geometry, without chance ----------------------------------------------------------------------------------


def moved(image, matrix, shift=(0.0, 0.0)):
    return np.asarray(warp(image, Affine(jnp.asarray(matrix, jnp.float32), jnp.asarray(shift, jnp.float32)), SIZE))


def test_a_quarter_turn_is_rot90():
    image = pictures()[0] / 255.0
    turned = moved(image, [[0, -1], [1, 0]])
    assert any(np.allclose(turned, np.rot90(image, k), atol=1e-4) for k in (1, 3))


def test_a_shift_of_whole_pixels_brings_white_in():
    image = pictures()[0] / 255.0
    out = moved(image, np.eye(2), (2 * 3 / SIZE, 0))  # looks 3 pixels further right
    np.testing.assert_allclose(out[:, : SIZE - 3], image[:, 3:], atol=1e-4)
    np.testing.assert_allclose(out[:, SIZE - 3 :], 1, atol=1e-6)


def test_half_the_size_has_white_around():
    black = jnp.zeros((SIZE, SIZE, 3))
    out = moved(black, 2 * np.eye(2))
    assert (out[4:12, 4:12] < 0.01).all()
    assert (out[:3] > 0.99).all() and (out[:, :3] > 0.99).all() and (out[13:] > 0.99).all()


@settings(max_examples=20)
@given(st.floats(-3, 3), st.floats(0.25, 4.0), st.floats(-1, 1))
def test_white_stays_white_however_it_is_moved(angle, scale, shift):
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(moved(jnp.ones((SIZE, SIZE, 3)), matrix, (shift, -shift)), 1, atol=1e-4)
