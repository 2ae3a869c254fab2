"""The ONNX files, run by onnxruntime, against the JAX towers they were made from: every variant of the config.

int8 files are compared with the model that `save_clip` and `load_clip` make of the same int8 numbers.
"""

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
from safetensors.numpy import load_file
from tiny import CONFIG, SIZE, tiny_clip, tiny_processor
from tiny_towers import LITE, enlarged

from clipid_utils import CLIPProcessor, load_clip, save_clip
from clipid_utils.model.config import Rotary
from clipid_utils.model.ops import ACTIVATIONS
from clipid_utils.model.pretrained import onnx as onnx_export
from clipid_utils.model.pretrained.onnx import export_onnx
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.paths import CHECKPOINTS

TOLERANCE = 1e-4
TEXTS = ["seekor kucing", "bendera Indonesia", "sepiring nasi goreng dengan telur mata sapi", "perahu", "gunung berapi"]
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
IMAGE_TOWERS = {name: dataclasses.replace(CONFIG.vision, **changes) for name, changes in VISION.items()} | {
    # Both kernels meet even sides, which SAME pads more at the end than at the beginning, and odd ones
    "EfficientNet-Lite": dataclasses.replace(LITE, image_size=40, class_scale=0.33),
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
    "classes": {"classes": 7, "class_scale": 2.5},
    "e5 with classes": {"pooling": "mean", "normalize_pooled": True, "classes": 7, "class_scale": 17.0},
}


def noisy(seed=0, **changes):
    """A tiny model none of whose parameters is 0 or 1, as biases and norms begin."""
    model, _ = tiny_clip(seed, **changes)
    rng = np.random.default_rng(seed)
    graph, params = nnx.split(model, nnx.Param)
    return nnx.merge(graph, jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape).astype(np.float32), params))


def processor_of(model):
    """Without a tokenizer, because the files are the model's."""
    return CLIPProcessor(None, model.config.vision.image_size, 10**6)


def export(model, folder, **options):
    return export_onnx(model, folder, processor_of(model), **options)


def rounded_to_int8(model, folder):
    save_clip(model, processor_of(model), folder, quantize=True)
    return load_clip(folder)[0]


def tensors_of(path):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def as_in_checkpoint(kernel):
    """A convolution's kernel [outputs, inputs, K, K] in the checkpoint's order; tables and matrices as they are."""
    if kernel.ndim < 4:
        return kernel
    if kernel.shape[2] == 1:
        return kernel[:, :, 0, 0].T
    return kernel[:, 0].transpose(1, 2, 0) if kernel.shape[1] == 1 else kernel.transpose(2, 3, 1, 0)


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
    assert np.abs(ours[1:] - ours[0]).max() > 100 * TOLERANCE  # else the pictures would not matter
    for count in (1, 5):
        theirs = runs.run(None, {"pixel_values": pixels[:count]})[0]
        assert theirs.shape == (count, model.config.embed_dim) and theirs.dtype == np.float32
        np.testing.assert_allclose(theirs, ours[:count], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)


# --- The same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", IMAGE_TOWERS.values(), ids=IMAGE_TOWERS)
def test_every_image_tower_in_float32_and_int8(tmp_path, config):
    model = noisy(vision=config)
    assert_image_tower_agrees(model, export(model, tmp_path / "float32")[0])
    rounded = rounded_to_int8(model, tmp_path / "checkpoint")
    assert_image_tower_agrees(rounded, export(model, tmp_path / "int8", quantize=True)[0])


@pytest.mark.parametrize("changes", TEXT.values(), ids=TEXT)
def test_every_text_tower_in_float32_and_int8(tmp_path, changes):
    model = noisy(text=dataclasses.replace(CONFIG.text, **changes))
    assert_text_tower_agrees(model, export(model, tmp_path / "float32")[1])
    rounded = rounded_to_int8(model, tmp_path / "checkpoint")
    assert_text_tower_agrees(rounded, export(model, tmp_path / "int8", quantize=True)[1])


def test_every_activation_is_compared_in_both_towers():
    for variants, default in ((VISION, CONFIG.vision), (TEXT, CONFIG.text)):
        assert {changes.get("activation", default.activation) for changes in variants.values()} == set(ACTIVATIONS)


def test_the_shipped_checkpoint(tmp_path):
    model, processor = load_clip(CHECKPOINTS / "mini")
    image, text = export_onnx(model, tmp_path, processor)
    assert_image_tower_agrees(model, image)
    assert_text_tower_agrees(model, text)
    batch = processor(text=TEXTS)
    theirs = run(text, **{name: value.astype(np.int64) for name, value in batch.items()})
    np.testing.assert_allclose(theirs, model.encode_text(**batch), atol=1e-5)


@pytest.mark.slow
def test_the_shipped_photo(tmp_path):
    """Its checkpoint is int8: the int8 files have the same numbers, and give the same vectors as float32 files."""
    model, processor = load_clip(CHECKPOINTS / "photo")
    blocks = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    batch = processor(text=TEXTS)
    inputs = {name: value.astype(np.int64) for name, value in batch.items()}
    files = {quantize: export_onnx(model, tmp_path / str(quantize), processor, quantize=quantize)
             for quantize in (False, True)}
    pixels = enlarged(blocks, 224)
    for towers, ours in ((0, model.encode_image(pixels)), (1, model.encode_text(**batch))):
        given = inputs if towers else {"pixel_values": pixels}
        for quantize in (False, True):
            np.testing.assert_allclose(run(files[quantize][towers], **given), ours, atol=TOLERANCE, rtol=0)
    stored, exported = load_file(CHECKPOINTS / "photo" / "model.safetensors"), {}
    for side, path in zip(("vision", "text"), files[True], strict=True):
        exported |= {f"{side}.{name}": value for name, value in tensors_of(path).items()}
        assert 0.25 < path.stat().st_size / files[False][side == "text"].stat().st_size < 0.26
        assert path.stat().st_size < 34e6 and not path.with_name(path.name + ".data").exists()
    names = {name for name, value in stored.items() if value.dtype == np.int8} - {"text.token_type_embedding"}
    assert len(names) > 120
    for name in names:
        np.testing.assert_array_equal(as_in_checkpoint(exported[name]), stored[name], err_msg=name)
        scale = stored[f"{name}:scale"].ravel()  # 127 times a scale, divided by 127, may differ in the last bit
        np.testing.assert_allclose(exported[f"{name}:scale"].ravel(), scale, rtol=3e-7, err_msg=name)


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


@pytest.mark.parametrize("tower, quantize", [("ViT", False), ("ViT", True), ("Lite", False), ("Lite", True)])
def test_the_files_are_valid_and_of_versions_that_older_runtimes_read(tmp_path, tower, quantize):
    model = noisy(vision=LITE if tower == "Lite" else CONFIG.vision)
    for path in export(model, tmp_path, quantize=quantize):
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
        assert model.ir_version == 9 and model.producer_name == "clip-indonesian"
        assert all(len(tensor.dims) <= 4 for tensor in model.graph.initializer)


def test_weights_keep_their_names(tmp_path):
    model = noisy()
    tensors = tensors_of(export(model, tmp_path)[1])
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


@pytest.mark.parametrize("quantize", [False, True])
def test_the_same_model_gives_the_same_bytes(tmp_path, quantize):
    first, second = (export(noisy(), tmp_path / name, quantize=quantize) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize("vision", [CONFIG.vision, LITE], ids=["ViT", "Lite"])
def test_matrices_and_tables_are_int8_with_one_scale_for_each_output_or_row(tmp_path, vision):
    model = noisy(vision=vision, text=dataclasses.replace(CONFIG.text, classes=7))
    for tower, path in zip((model.vision, model.text), export(model, tmp_path, quantize=True), strict=True):
        tensors = tensors_of(path)
        for name, value in flatten_params(nnx.state(tower, nnx.Param)).items():
            if name == "token_type_embedding":  # only its first row is used, as a vector
                assert tensors[f"{name}.0"].dtype == np.float32 and tensors[f"{name}.0"].shape == value.shape[1:]
            elif value.ndim < 2:
                np.testing.assert_array_equal(tensors.get(name, value).ravel(), value, err_msg=name)
            else:
                stored, scale = as_in_checkpoint(tensors[name]), tensors[f"{name}:scale"]
                kernel = name.endswith(".kernel")
                assert stored.dtype == np.int8 and scale.dtype == np.float32, name
                assert scale.size == value.shape[-1 if kernel else 0], name
                steps = scale.ravel() if kernel else scale.reshape(-1, 1)
                assert (np.abs(stored * steps - value) <= steps * (0.5 + 1e-5)).all(), name


def test_rows_of_an_int8_table_are_taken_before_they_become_float32(tmp_path):
    graph = onnx.load(export(noisy(), tmp_path, quantize=True)[1]).graph
    for table in ("word_embedding", "position_embedding"):
        assert [node.op_type for node in graph.node if table in node.input] == ["Gather"]
    kernels = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert "pooler.kernel" in kernels and len(kernels) == 2 * 6 + 2


def test_int8_files_of_the_mini_take_a_quarter_and_give_nearly_the_same_vectors(tmp_path):
    model, processor = load_clip(CHECKPOINTS / "mini")
    first = export_onnx(model, tmp_path / "float32", processor)
    second = export_onnx(model, tmp_path / "int8", processor, quantize=True)
    assert {path.name for path in (tmp_path / "int8").iterdir()} == {path.name for path in first[0].parent.iterdir()}
    texts = {name: value.astype(np.int64) for name, value in processor(text=TEXTS).items()}
    blocks = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), dtype=np.uint8)
    pixels = processor.normalize(np.kron(blocks, np.ones((1, 8, 8, 1), np.uint8)))
    for wide, narrow, inputs in zip(first, second, ({"pixel_values": pixels}, texts), strict=True):
        assert 0.25 < narrow.stat().st_size / wide.stat().st_size < 0.27
        cosines = (run(wide, **inputs) * run(narrow, **inputs)).sum(1)
        assert len(cosines) > 3 and 0.999 < cosines.min() < 1 - 1e-6


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
