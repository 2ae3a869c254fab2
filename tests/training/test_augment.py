"""Each random change alone, with the others off; then what holds for all draws together."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from clipid_utils.training.augment import Affine, AugmentConfig, augment, draw_affine, warp

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


def test_rotation_and_shear_are_drawn_apart():
    def draw(key):
        return draw_affine(key, jnp.array(False), only(degrees=7.0, shear=0.07)).matrix

    matrices = np.asarray(jax.vmap(draw)(jax.random.split(KEY, 400)))
    angle = np.arctan2(matrices[:, 1, 0], matrices[:, 0, 0])
    shear = np.cos(angle) * matrices[:, 0, 1] + np.sin(angle) * matrices[:, 1, 1]
    assert 0.06 < np.abs(shear).max() <= 0.07 + 1e-6 and abs(np.corrcoef(angle, shear)[0, 1]) < 0.2


def test_the_matrix_leads_from_the_output_to_the_input():
    image = pictures(1)[0] / 255
    quarter = Affine(jnp.array([[0.0, -1.0], [1.0, 0.0]]), jnp.zeros(2))  # column x, row y -> column -y, row x
    np.testing.assert_allclose(warp(image, quarter, SIZE), np.rot90(image), atol=1e-5)


def test_light_comes_from_every_side():
    out = apply(jnp.full((60, SIZE, SIZE, 3), 60, jnp.uint8), only(shading=0.2)).mean(axis=-1)[:, 1:-1, 1:-1]
    across, down = (np.diff(out.mean(axis=axis), axis=1).sum(axis=1) for axis in (1, 2))
    assert np.abs(across).max() > 0.15 and np.abs(down).max() > 0.15
    assert (np.hypot(across, down) > 2 * np.abs(across)).any() and (np.hypot(across, down) > 2 * np.abs(down)).any()


def test_a_full_colour_is_shaded_and_white_paper_is_not():
    for colour, shaded in (((255, 0, 0), True), ((255, 255, 255), False)):
        image = jnp.broadcast_to(jnp.array(colour, jnp.uint8), (8, SIZE, SIZE, 3))
        change = np.abs(apply(image, only(shading=0.2)) - np.asarray(image) / 255)[:, 1:-1, 1:-1].max()
        assert (change > 0.03) == shaded


def test_moves_and_colours_are_drawn_apart():
    """A smaller picture has more white around it; contrast makes its grey darker or lighter."""
    out = apply(jnp.full((200, SIZE, SIZE, 3), 64, jnp.uint8), only(scale=(0.5, 1.0), contrast=0.25)).mean(axis=-1)
    area, grey = (out < 0.9).sum(axis=(1, 2)), out[:, SIZE // 2, SIZE // 2]
    assert area.std() > 20 and grey.std() > 0.02 and abs(np.corrcoef(area, grey)[0, 1]) < 0.25


def chroma(config):
    """How 400 draws change a colour: the turns of its hue, as a share of a full turn, and its saturation's factor."""
    image, to_iq = jnp.array([140, 128, 116], jnp.uint8), np.array([[0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    out = apply(jnp.broadcast_to(image, (400, 2, 2, 3)), config)[:, 8, 8]
    (i, q), (before_i, before_q) = to_iq @ out.T, to_iq @ (np.asarray(image) / 255)
    ratio = (i + 1j * q) / (before_i + 1j * before_q)
    return np.angle(ratio) / (2 * np.pi), np.abs(ratio)


def test_hue_turns_up_to_its_share_of_a_full_turn():
    turn, _ = chroma(only(hue=0.4))
    assert 0.38 < turn.max() < 0.41 and -0.41 < turn.min() < -0.38


def test_hue_and_saturation_are_drawn_apart():
    turn, factor = chroma(only(hue=0.2, saturation=0.4))
    assert 1.35 < factor.max() < 1.45 and 0.55 < factor.min() < 0.65
    assert abs(np.corrcoef(turn, factor)[0, 1]) < 0.2


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


# --- The draws -----------------------------------------------------------------------------------------------------


def draws(count=2000, may_flip=True, **changes):
    """The affine maps of so many keys: matrices [N, 2, 2], shifts [N, 2]."""
    keys = jax.random.split(KEY, count)
    drawn = jax.jit(jax.vmap(lambda key: draw_affine(key, jnp.asarray(may_flip), only(**changes))))(keys)
    return np.asarray(drawn.matrix, np.float64), np.asarray(drawn.shift, np.float64)


def assert_uniform(values, low, high):
    """Over the whole range, and evenly."""
    edge = 0.01 * (high - low)
    assert low - 1e-5 <= values.min() < low + edge and high - edge < values.max() <= high + 1e-5
    assert abs(values.mean() - (low + high) / 2) < 0.05 * (high - low)


def test_each_range_is_reached_and_not_passed():
    matrix, shift = draws(degrees=30.0)
    assert_uniform(np.degrees(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0])), -30, 30)
    assert not shift.any()
    matrix, shift = draws(translate=0.1)
    np.testing.assert_allclose(matrix, np.broadcast_to(np.eye(2), matrix.shape))
    for side in shift.T:
        assert_uniform(side, -0.2, 0.2)  # of a frame of [-1, 1]
    matrix, _ = draws(scale=(0.5, 2.0))
    assert_uniform(1 / matrix[:, 0, 0], 0.5, 2.0)  # the inverse map: a larger picture looks at less
    matrix, _ = draws(shear=0.3)
    assert_uniform(matrix[:, 0, 1], -0.3, 0.3)
    matrix, _ = draws(stretch=0.4)
    assert_uniform(np.log(matrix[:, 1, 1] / matrix[:, 0, 0]), -0.4, 0.4)
    np.testing.assert_allclose(np.linalg.det(matrix), 1, rtol=1e-5)


def test_no_draw_depends_on_a_different_one():
    matrix, shift = draws(degrees=20.0, translate=0.1, scale=(0.8, 1.2), flip=0.5)
    flipped = np.sign(np.linalg.det(matrix))
    angle = np.arctan2(-matrix[:, 0, 1], matrix[:, 1, 1])
    found = np.corrcoef(np.stack([flipped, angle, np.abs(np.linalg.det(matrix)), *shift.T]))
    np.testing.assert_allclose(found, np.eye(5), atol=0.1)


def test_half_the_scale_shows_all_and_twice_the_scale_a_half():
    image = pictures(1)
    small = apply(image, only(scale=(0.5, 0.5)))[0]
    np.testing.assert_allclose(small[:3], 1, atol=1e-5)
    large = apply(image, only(scale=(2.0, 2.0)))[0]
    middle = np.asarray(image)[0, 4:12, 4:12] / 255
    np.testing.assert_allclose(large[1:-1:2, 1:-1:2].mean(axis=(0, 1)), middle.mean(axis=(0, 1)), atol=0.1)
    assert (large < 0.99).mean() > 0.9


def test_colours_change_by_their_range():
    """Of a grey, which hue and saturation leave alone: brightness is added, contrast turns about the middle."""
    grey = jnp.full((500, 4, 4, 3), 51, jnp.uint8)  # 0.2
    assert_uniform(apply(grey, only(brightness=0.15), size=4)[:, 0, 0, 0], 0.05, 0.35)
    assert_uniform(apply(grey, only(contrast=0.5), size=4)[:, 0, 0, 0], 0.05, 0.35)
    shaded = apply(grey, only(shading=0.5), size=4)
    assert shaded.max() > 0.4 and shaded.min() < 0.01
    np.testing.assert_allclose(shaded.mean(axis=(1, 2, 3)), 0.2, atol=0.1)  # light on one side, dark on the other
    red = jnp.broadcast_to(jnp.array([200, 60, 60], jnp.uint8), (500, 4, 4, 3))
    spread = np.ptp(apply(red, only(saturation=0.4), size=4)[:, 0, 0], axis=-1)
    assert_uniform(spread, 0.6 * 140 / 255, 1.4 * 140 / 255)
