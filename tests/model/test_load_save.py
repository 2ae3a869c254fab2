"""Checkpoints: what is saved comes back bit for bit, and what is broken is named."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny import SIZE, tiny_clip

import clipid_utils
from clipid_utils import HybridCLIP, load_clip, save_clip
from clipid_utils.model.pretrained import save
from clipid_utils.model.pretrained.parameters import flatten_params


@pytest.fixture
def folder(tmp_path):
    save_clip(*tiny_clip(), tmp_path / "clip")
    return tmp_path / "clip"


def leaves(model):
    return flatten_params(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("changes", [{}, {"logit_bias": -10.0, "logit_scale": 1.25}])
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, changes):
    model, processor = tiny_clip(3, **changes)
    save_clip(model, processor, tmp_path / "a" / "b")
    again, its_processor = load_clip(tmp_path / "a" / "b")
    assert again.config == model.config
    before, after = leaves(model), leaves(again)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype == jnp.float32
        assert np.asarray(after[key]).tobytes() == np.asarray(value).tobytes(), key
    batch = its_processor(images=[_picture()], text=["kucing tidur"])
    assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(model))  # not the parameters alone
    batch = {key: jnp.asarray(value) for key, value in batch.items()}
    np.testing.assert_array_equal(again(**batch).logits_per_image, model(**batch).logits_per_image)


def _picture():
    from PIL import Image

    return Image.new("RGB", (SIZE, 2 * SIZE), "orange")


def test_a_checkpoint_is_saved_over_an_older_one(folder):
    model, processor = tiny_clip(7)
    save_clip(model, processor, folder)
    for key, value in leaves(load_clip(folder)[0]).items():
        np.testing.assert_array_equal(value, leaves(model)[key])
    assert not list(folder.glob("*.partial"))


def test_an_interrupted_save_leaves_the_older_checkpoint(folder, monkeypatch):
    before = load_file(folder / "model.safetensors")

    def broken(tensors, path, metadata):
        Path(path).write_bytes(b"half a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(save, "save_file", broken)
    with pytest.raises(KeyboardInterrupt):
        save_clip(*tiny_clip(7), folder)
    after = leaves(load_clip(folder)[0])
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


def test_others_may_read_the_weights_as_the_umask_says(folder):
    """safetensors itself lets only the owner read them."""
    os.umask(mask := os.umask(0))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folder / name).stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_names_in_the_file_are_paths_in_the_model(folder):
    keys = load_file(folder / "model.safetensors").keys()
    assert {"vision.blocks.0.attn.q_proj.kernel", "text.word_embedding", "logit_scale"} <= keys
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "clip-indonesian" and config["vision"]["image_size"] == SIZE


def test_a_model_may_be_loaded_to_compute_in_bfloat16(folder):
    model, _ = load_clip(folder, dtype=jnp.bfloat16)
    assert model.vision.tokens(jnp.zeros((1, SIZE, SIZE, 3))).dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("bias", [None, -10.23])
def test_the_scale_stays_float32_in_bfloat16(tmp_path, bias):
    """bfloat16 would make 27 of 27.23, and a moving average of it would never move."""
    scale = float(np.log(27.23))
    save_clip(*tiny_clip(logit_scale=scale, logit_bias=bias), tmp_path)
    model, _ = load_clip(tmp_path, param_dtype=jnp.bfloat16)
    exact = {"logit_scale": scale} if bias is None else {"logit_scale": scale, "logit_bias": bias}
    for path, leaf in leaves(model).items():
        assert leaf.dtype == (jnp.float32 if path in exact else jnp.bfloat16), path
        if path in exact:
            assert float(leaf) == np.float32(exact[path])


def test_a_loaded_model_can_be_trained(folder):
    """Its parameters are ordinary ones: a gradient reaches each."""
    model, _ = load_clip(folder)
    graph, params = nnx.split(model, nnx.Param)

    def loss(params):
        model = nnx.merge(graph, params)
        ids = jnp.arange(5, 11, dtype=jnp.int32)[None]
        pixels = jnp.linspace(-1, 1, SIZE * SIZE * 3).reshape(1, SIZE, SIZE, 3)
        return model(pixels, ids, jnp.ones_like(ids)).logits_per_image.sum()

    for path, leaf in nnx.to_flat_state(jax.grad(loss)(params)):
        if "k_proj" not in path or path[-1] != "bias":  # a key's bias moves all scores alike, and softmax forgets it
            assert np.abs(leaf[...]).max() > 0, path


# --- What is broken ------------------------------------------------------------------------------------------------


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' is not a folder"):
        load_clip(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json not found.*save_clip"):
        load_clip(tmp_path)


def test_a_config_of_another_kind(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="config.json: model_type is not 'clip-indonesian'"):
        load_clip(folder)


@pytest.mark.parametrize(
    "text",
    [
        "{ half a",
        "",
        '{"model_type": "clip-indonesian", "vision": {"image_sise": 48}, "text": {}}',
        '{"model_type": "clip-indonesian", "text": {}}',
    ],
)
def test_a_config_that_cannot_be_read_is_named(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        load_clip(folder)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_broken_weights_are_named(folder, damage):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    cut = whole[: len(whole) // 2]
    file.write_bytes({"cut": cut, "empty": b"", "text": b"<html>not found</html>"}[damage])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read.*again"):
        load_clip(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("text.ln.bias"), r"missing \['text\.ln\.bias'\], unknown \[\]"),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), r"missing \[\], unknown \['extra'\]"),
        (lambda t: t.update(logit_scale=np.zeros(2, np.float32)), r"wrong shape \['logit_scale \(2,\) instead of \(\)"),
        (lambda t: t.update({"text.ln.bias": np.zeros(15, "f")}), r"wrong shape \['text\.ln\.bias \(15,\) instead"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_clip(folder)


def test_a_missing_tokenizer_is_named(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        load_clip(folder)


def test_a_model_without_a_tokenizer_comes_back_without_one(folder):
    model, processor = tiny_clip(7)
    processor.tokenizer = None
    save_clip(model, processor, folder)  # over one that has a tokenizer
    again, its_processor = load_clip(folder)
    assert its_processor(images=[_picture()])["pixel_values"].shape == (1, SIZE, SIZE, 3)
    with pytest.raises(ValueError, match="without a tokenizer.*tokenizer="):
        its_processor(text=["kucing"])
    assert again.config == model.config


@pytest.mark.parametrize("rows, fits", [(300, True), (50, False)])
def test_a_tokenizer_with_ids_beyond_the_table_is_refused(tmp_path, rows, fits):
    """Its own tokenizer or a different folder's. One whose largest id is the table's last row fits."""
    model, processor = tiny_clip()
    rows = max(processor.tokenizer.get_vocab().values()) + 1 if fits else rows
    small = dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, vocab_size=rows))
    save_clip(HybridCLIP(small, rngs=nnx.Rngs(0)), processor, tmp_path / "small")
    for options in ({}, {"tokenizer": tmp_path / "small"}):
        if fits:
            load_clip(tmp_path / "small", **options)
            continue
        with pytest.raises(ValueError, match=r"small has \d+ tokens with ids up to \d+, .* table has 50 rows"):
            load_clip(tmp_path / "small", **options)


def test_an_unknown_format_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="format 'onnx' is not known"):
        save_clip(*tiny_clip(), tmp_path / "clip", format="onnx")
    assert not (tmp_path / "clip").exists()


def test_the_package_offers_its_names_without_loading_jax():
    program = ("import sys, clipid_utils; assert 'jax' not in sys.modules; "
               "assert all(hasattr(clipid_utils, name) for name in clipid_utils.__all__)")
    subprocess.run([sys.executable, "-c", program], check=True)
    assert set(clipid_utils.__all__) <= set(dir(clipid_utils)) and clipid_utils.load_clip is load_clip
    with pytest.raises(AttributeError, match="no attribute 'load_clap'"):
        clipid_utils.load_clap  # noqa: B018


def test_another_folders_tokenizer_cuts_where_the_text_tower_ends(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    model, processor = tiny_clip()
    processor.max_length = 10 * config["text"]["max_length"]
    processor.save(tmp_path / "longer")
    assert load_clip(folder, tokenizer=tmp_path / "longer")[1].max_length == model.config.text.max_length
