"""Checkpoints in int8: a quarter of the space, each weight within half a step, and wrong files with clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny import tiny_clip
from tiny_towers import tiny_photo

from clipid_utils import load_clip, save_clip
from clipid_utils.model.embed import embed_texts, fingerprint
from clipid_utils.model.pretrained.parameters import flatten_params

KERNEL, TABLE = "text.blocks.0.mlp.fc1.kernel", "text.word_embedding"


def params_of(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in flatten_params(nnx.state(model, nnx.Param)).items()}


def stored(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A model of both packaged towers, and the folder with its int8 checkpoint."""
    folder = tmp_path_factory.mktemp("quantized")
    model, processor = tiny_photo(folder)
    model.text.word_embedding[...] = model.text.word_embedding[...].at[7].set(0.0)
    save_clip(model, processor, folder / "int8", quantize=True)
    return model, processor, folder / "int8"


@pytest.fixture
def folder(tmp_path):
    save_clip(*tiny_clip(), tmp_path / "int8", quantize=True)
    return tmp_path / "int8"


def test_each_weight_is_within_half_a_step(photo):
    model, _, folder = photo
    arrays, before, after = stored(folder), params_of(model), params_of(load_clip(folder)[0])
    assert before.keys() == after.keys()
    for name, value in before.items():
        if value.ndim < 2:
            np.testing.assert_array_equal(after[name], value, err_msg=name)
            assert arrays[name].dtype == np.float32 and f"{name}:scale" not in arrays
        else:
            scale = arrays[f"{name}:scale"]
            assert arrays[name].dtype == np.int8 and scale.dtype == np.float32 and after[name].dtype == np.float32
            assert (np.abs(after[name] - value) <= scale * (0.5 + 1e-5)).all(), name
    assert not after["text.word_embedding"][7].any()  # a row of zeros has no NaN


def test_each_output_and_each_row_has_its_own_scale(photo):
    model, _, folder = photo
    for name, value in params_of(model).items():
        if value.ndim > 1:
            shape = (*[1] * (value.ndim - 1), value.shape[-1]) if name.endswith(".kernel") else (len(value), 1)
            scale = stored(folder)[f"{name}:scale"]
            assert scale.shape == shape, name
            axes = tuple(axis for axis, count in enumerate(shape) if count == 1)
            largest = np.abs(stored(folder)[name].astype(int)).max(axis=axes, keepdims=True)
            np.testing.assert_array_equal(largest, np.where(np.abs(value).max(axes, keepdims=True) > 0, 127, 0))
    kinds = {"vision.stem.kernel": (1, 1, 1, 8), "vision.blocks.0.depthwise.kernel": (1, 1, 8),
             "vision.projection.class_vectors": (10, 1), "text.word_embedding": (60, 1)}
    assert {name: stored(folder)[f"{name}:scale"].shape for name in kinds} == kinds


def test_the_vectors_are_nearly_the_same(photo):
    model, processor, folder = photo
    again, its_processor = load_clip(folder)
    texts = ["kucing tidur", "anjing", "a cat sleeps"]
    cosines = (embed_texts(model, processor, texts) * embed_texts(again, its_processor, texts)).sum(1)
    assert again.config == model.config and cosines.min() > 0.999


def test_the_shipped_model_takes_a_quarter(tmp_path):
    model, processor = load_clip("mini")
    save_clip(model, processor, tmp_path / "float32")
    save_clip(model, processor, tmp_path / "int8", quantize=True)
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("float32", "int8")}
    assert sizes["float32"] > 4e6 and 0.25 < sizes["int8"] / sizes["float32"] < 0.28
    for name, value in stored(tmp_path / "float32").items():
        assert value.dtype == np.float32 and ":" not in name
        np.testing.assert_array_equal(value, params_of(model)[name])


def test_the_shipped_model_is_the_same_as_ever():
    """Indexes and features on users' disks are known by it; it changes only if the mini is trained again."""
    assert fingerprint(*load_clip("mini")) == "44fb4e2b92e7352e"


def test_a_loaded_model_is_saved_as_it_was(photo, tmp_path):
    _, _, folder = photo
    model, processor = load_clip(folder)
    save_clip(model, processor, tmp_path, quantize=True)
    first, second = stored(folder), stored(tmp_path)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if name.endswith(":scale"):  # 127 times a scale, divided by 127, may differ in the last bit
            np.testing.assert_allclose(second[name], value, rtol=3e-7)
        else:
            np.testing.assert_array_equal(second[name], value, err_msg=name)
    assert (folder / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_it_is_loaded_in_bfloat16(folder):
    exact, half = params_of(load_clip(folder)[0]), flatten_params(nnx.state(load_clip(
        folder, param_dtype=jnp.bfloat16)[0], nnx.Param))
    assert half[KERNEL].dtype == jnp.bfloat16
    np.testing.assert_array_equal(half[KERNEL], jnp.asarray(exact[KERNEL], jnp.bfloat16))


def test_a_loaded_model_can_be_saved_in_float32(folder, tmp_path):
    model, processor = load_clip(folder)
    save_clip(model, processor, tmp_path / "float32")
    again = load_clip(tmp_path / "float32")[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


# --- What is wrong --------------------------------------------------------------------------------------------------


def test_another_format_has_no_int8(tmp_path):
    with pytest.raises(ValueError, match="'vision-text-dual-encoder' has no int8 weights: .* format='native'"):
        save_clip(*tiny_clip(), tmp_path / "clip", format="vision-text-dual-encoder", quantize=True)
    assert not (tmp_path / "clip").exists()


SCALES = f"{KERNEL}:scale"


@pytest.mark.parametrize("changes, message", [
    ({SCALES: None}, rf"int8 has '{KERNEL}' of shape \(16, 32\) as int8, and '{SCALES}' is missing"),
    ({SCALES: np.ones((1, 31), "f")}, rf"'{SCALES}' is of shape \(1, 31\)"),
    ({SCALES: np.ones(32, "f")}, rf"'{SCALES}' is of shape \(32,\)"),
    ({SCALES: np.ones((16, 32, 2), "f")}, rf"'{SCALES}' is of shape \(16, 32, 2\)"),
    ({f"{TABLE}:scale": np.ones((0, 1), "f")}, rf"'{TABLE}:scale' is of shape \(0, 1\)"),
    ({"extra:scale": np.ones((1, 2), "f")}, r"unknown \['extra:scale'\]"),
    ({KERNEL: None}, rf"missing \['{KERNEL}'\], unknown \['{SCALES}'\]"),
    ({KERNEL: np.ones((16, 31), np.int8), SCALES: np.ones((1, 31), "f")},
     rf"wrong shape \['{KERNEL} \(16, 31\) instead of \(16, 32\)'\]"),
])
def test_scales_that_do_not_fit_are_named(folder, changes, message):
    arrays = {name: value for name, value in (stored(folder) | changes).items() if value is not None}
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_clip(folder)
