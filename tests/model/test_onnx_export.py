"""The ONNX files, run by onnxruntime, against the JAX towers they were made from: every variant of the config."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx
from tiny import CONFIG, SIZE, tiny_clip, tiny_processor

from clipid_utils import CLIPProcessor, load_clip
from clipid_utils.model.config import Rotary
from clipid_utils.model.ops import ACTIVATIONS
from clipid_utils.model.pretrained import onnx as onnx_export
from clipid_utils.model.pretrained.onnx import export_onnx
from clipid_utils.paths import CHECKPOINTS

TOLERANCE = 1e-4
SIGLIP = {"class_token": False, "pooling": "attention", "ln_pre": False, "patch_bias": True, "projection": "none",
          "activation": "gelu_pytorch_tanh", "width": CONFIG.embed_dim}
CLIP_TEXT = {"pre_norm": True, "mask": "causal", "pooling": "end", "token_types": 0}
VISION = {
    "CLIP": {},
    "gelu": {"activation": "gelu"},
    "without ln_pre": {"ln_pre": False},
    "biased patches": {"patch_bias": True},
    "pooler": {"pooling": "pooler"},
    "ViT": {"ln_pre": False, "patch_bias": True, "pooling": "pooler", "activation": "gelu", "norm_eps": 1e-12},
    "one patch": {"patch_size": SIZE},
    "four heads, no square of patches": {"heads": 4, "patch_size": 4, "layers": 1, "mlp_dim": 48},
    "SigLIP": SIGLIP,
    "SigLIP with a rest": SIGLIP | {"image_size": SIZE + 5},
    "DINOv2": {"ln_pre": False, "patch_bias": True, "layer_scale": True, "activation": "gelu"},
}
TEXT = {
    "BERT": {},
    "quick_gelu": {"activation": "quick_gelu"},
    "mean": {"pooling": "mean"},
    "RoBERTa": {"position_offset": 2, "token_types": 1, "norm_eps": 1e-5},
    "RoBERTa, mean": {"position_offset": 2, "token_types": 1, "pooling": "mean"},
    "padding is token 0": {"position_offset": 1},
    "four heads": {"heads": 4, "layers": 1, "mlp_dim": 48},
    "DistilBERT": {"token_types": 0, "pooling": "mean"},
    "the first token": {"pooling": "first"},
    "e5": {"pooling": "mean", "normalize_pooled": True},
    "M-CLIP": {"pooling": "mean", "projection": "affine"},
    "open_clip": {"pooling": "mean", "projection": "mlp"},
    "CLIP": CLIP_TEXT | {"end_id": 7},
    "CLIP of before 2023": CLIP_TEXT,
    "SigLIP": {"pre_norm": True, "mask": "none", "pooling": "last", "projection": "affine", "token_types": 0,
               "activation": "gelu_pytorch_tanh"},
    "ModernBERT": {"pre_norm": True, "token_types": 0, "pooling": "mean", "layers": 3,
                   "rotary": Rotary(("global", "local", "local"), window=3)},
}


def noisy(seed=0, **changes):
    """A tiny model none of whose parameters is 0 or 1, as biases and norms begin."""
    model, _ = tiny_clip(seed, **changes)
    rng = np.random.default_rng(seed)
    graph, params = nnx.split(model, nnx.Param)
    return nnx.merge(graph, jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), params))


def export(model, folder):
    """Without a tokenizer, because the files are the model's."""
    return export_onnx(model, folder, CLIPProcessor(None, model.config.vision.image_size, 10**6))


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path, **inputs):
    return session(path).run(None, inputs)[0]


def pictures(count, size=SIZE, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size, size, 3)).astype(np.float32)


def texts(count, length, side, config=CONFIG.text, seed=0):
    """Random ids of which at least one a row is no padding; where the model skips padding by its id, with that id."""
    rng = np.random.default_rng([seed, count, length])
    ids = rng.integers(0, config.vocab_size, (count, length))
    kept = np.arange(length) < rng.integers(1, length + 1, (count, 1))
    kept = {"right": kept, "left": kept[:, ::-1], "none": np.ones_like(kept)}[side]
    return np.where(kept, ids, max(config.position_offset - 1, 0)), kept.astype(np.int64)


def assert_text_tower_agrees(model, path):
    runs = session(path)
    for side in ("right", "left", "none"):
        longest = model.config.text.max_length
        for count, length in ((1, 1), (3, 7), (2, longest)) if model.config.text.mask != "none" else ((2, longest),):
            ids, mask = texts(count, length, side, model.config.text)
            ours = np.asarray(model.encode_text(ids.astype(np.int32), mask.astype(np.int32)))
            theirs = runs.run(None, {"input_ids": ids, "attention_mask": mask})[0]
            assert theirs.shape == (count, model.config.embed_dim) and theirs.dtype == np.float32
            np.testing.assert_allclose(theirs, ours, atol=TOLERANCE, rtol=0, err_msg=f"{side} {count} x {length}")
            np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)


def assert_image_tower_agrees(model, path):
    pixels, runs = pictures(5, model.config.vision.image_size), session(path)
    ours = np.asarray(model.encode_image(pixels))
    for count in (1, 5):
        theirs = runs.run(None, {"pixel_values": pixels[:count]})[0]
        assert theirs.shape == (count, model.config.embed_dim) and theirs.dtype == np.float32
        np.testing.assert_allclose(theirs, ours[:count], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)


# --- The same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", VISION.values(), ids=VISION)
def test_every_image_tower(tmp_path, changes):
    model = noisy(vision=dataclasses.replace(CONFIG.vision, **changes))
    assert_image_tower_agrees(model, export(model, tmp_path)[0])


@pytest.mark.parametrize("changes", TEXT.values(), ids=TEXT)
def test_every_text_tower(tmp_path, changes):
    model = noisy(text=dataclasses.replace(CONFIG.text, **changes))
    assert_text_tower_agrees(model, export(model, tmp_path)[1])


def test_every_activation_is_compared_in_both_towers():
    for variants, default in ((VISION, CONFIG.vision), (TEXT, CONFIG.text)):
        assert {changes.get("activation", default.activation) for changes in variants.values()} == set(ACTIVATIONS)


def test_the_shipped_checkpoint(tmp_path):
    model, processor = load_clip(CHECKPOINTS / "mini")
    image, text = export_onnx(model, tmp_path, processor)
    assert_image_tower_agrees(model, image)
    assert_text_tower_agrees(model, text)
    batch = processor(text=["seekor kucing", "bendera Indonesia", "sepiring nasi goreng dengan telur mata sapi"])
    theirs = run(text, **{name: value.astype(np.int64) for name, value in batch.items()})
    np.testing.assert_allclose(theirs, model.encode_text(**batch), atol=1e-5)


def test_a_text_that_is_all_padding_is_the_same_number_too(tmp_path):
    model = noisy()
    ids = np.full((3, 7), 7)
    theirs = run(export(model, tmp_path)[1], input_ids=ids, attention_mask=np.zeros_like(ids))
    np.testing.assert_allclose(theirs, model.encode_text(ids, np.zeros_like(ids)), atol=TOLERANCE)


@pytest.mark.parametrize("kept", [jnp.float32, jnp.bfloat16])
def test_a_half_precision_model_is_exported_in_float32(tmp_path, kept):
    model = noisy()
    graph, params = nnx.split(model, nnx.Param)
    params = jax.tree.map(lambda x: x.astype(kept), params)
    rounded = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    model, _ = tiny_clip(dtype=jnp.bfloat16)
    nnx.update(model, params)
    image, text = export(model, tmp_path)
    assert_image_tower_agrees(rounded, image)
    assert_text_tower_agrees(rounded, text)


# --- The files --------------------------------------------------------------------------------------------------------


def test_the_files_are_valid_and_of_versions_that_older_runtimes_read(tmp_path):
    for path in export(noisy(), tmp_path):
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
        assert model.ir_version == 9 and model.producer_name == "clip-indonesian"
        assert all(len(tensor.dims) <= 4 for tensor in model.graph.initializer)


def test_weights_keep_their_names(tmp_path):
    model = noisy()
    stored = onnx.load(export(model, tmp_path)[1]).graph.initializer
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in stored}
    np.testing.assert_array_equal(tensors["blocks.1.attn.q_proj.kernel"], model.text.blocks[1].attn.q_proj.kernel[...])
    np.testing.assert_array_equal(tensors["word_embedding"], model.text.word_embedding[...])


def test_the_folder_has_all_that_a_program_needs(tmp_path):
    model, processor = tiny_clip(logit_scale=9.0, logit_bias=-10.0)
    for path in export_onnx(model, tmp_path, processor):
        known = session(path).get_modelmeta().custom_metadata_map
        assert float(known["logit_scale"]) == pytest.approx(np.log(100))  # its limit
        assert float(known["logit_bias"]) == -10.0
    assert {path.name for path in tmp_path.iterdir()} == {
        "image_encoder.onnx", "text_encoder.onnx", "tokenizer.json", "tokenizer_config.json",
        "preprocessor_config.json"}


def test_a_large_tower_has_its_weights_in_a_file_of_their_own(tmp_path, monkeypatch):
    first, second = noisy(1), noisy(2)
    monkeypatch.chdir(tmp_path)  # the name of that file is relative, and must not be sought here
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 20_000)
    for model in (first, second):  # again over the older ones, neither refused nor appended to
        image, text = export(model, ".")
        assert text.stat().st_size < 20_000 < (tmp_path / "text_encoder.onnx.data").stat().st_size < 60_000
        onnx.checker.check_model(text, full_check=True)
        assert_image_tower_agrees(model, image)
        assert_text_tower_agrees(model, text)
    monkeypatch.undo()
    image, text = export(second, tmp_path)
    assert_text_tower_agrees(second, text)
    assert {path.name for path in tmp_path.glob("*.onnx*")} == {"image_encoder.onnx", "text_encoder.onnx"}


def test_an_interrupted_export_leaves_the_older_files(tmp_path, monkeypatch):
    paths = export(noisy(1), tmp_path)
    before = [path.read_bytes() for path in paths]

    def broken(model, path):
        path.write_bytes(b"half a fi")
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx, "save_model", broken)
    with pytest.raises(KeyboardInterrupt):
        export(noisy(2), tmp_path)
    assert [path.read_bytes() for path in paths] == before
    assert {*tmp_path.iterdir()} == {*paths, tmp_path / "preprocessor_config.json"}


def test_the_same_model_gives_the_same_bytes(tmp_path):
    first, second = (export(noisy(), tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_who_does_not_export_does_not_import_onnx():
    program = "import sys, clipid_utils, clipid_utils.model.pretrained.load; print('onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


# --- What is wrong ----------------------------------------------------------------------------------------------------


def test_a_text_that_is_too_long_is_refused_by_the_runtime(tmp_path):
    for offset in (0, 2):
        model = noisy(text=dataclasses.replace(CONFIG.text, position_offset=offset))
        ids = np.full((1, CONFIG.text.max_length + 1), 7)
        with pytest.raises(Exception, match="out of data bounds, idx=|broadcast an axis .* 16 by 17"):
            run(export(model, tmp_path)[1], input_ids=ids, attention_mask=np.ones_like(ids))


def test_a_picture_of_another_size_is_refused_by_the_runtime(tmp_path):
    with pytest.raises(Exception, match="pixel_values"):
        run(export(noisy(), tmp_path)[0], pixel_values=pictures(1, 2 * SIZE))


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(FileExistsError, match="a'"):
        export(noisy(), tmp_path / "a")


def test_a_processor_of_another_model(tmp_path):
    processor = tiny_processor()
    processor.image_size = 224
    with pytest.raises(ValueError, match="224 px and the model takes 16"):
        export_onnx(noisy(), tmp_path / "new", processor)
    assert not (tmp_path / "new").exists()


def test_an_activation_without_a_node(tmp_path):
    model = noisy(text=dataclasses.replace(CONFIG.text, activation="relu"))
    with pytest.raises(ValueError, match=r"activation is 'relu'.*gelu_pytorch_tanh and quick_gelu only"):
        export(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_parameter_that_the_graph_does_not_read(tmp_path):
    model = noisy()
    model.vision.blocks[1].attn.gate = nnx.Param(jnp.ones(3))
    with pytest.raises(ValueError, match=r"image_embeds graph does not use \['blocks\.1\.attn\.gate'\]"):
        export(model, tmp_path)
