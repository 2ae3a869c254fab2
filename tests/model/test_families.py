"""Today's families, opened as their users have them, against torch's outputs: unit vectors at 1e-5, logits at 1e-4.

`golden/record_families.py` recorded the references; `make parity` does the same at true sizes.
"""

import json

import numpy as np
import pytest
from flax import nnx
from reference import assert_outputs, cases, close, compiled, unpack, write_folder
from safetensors.numpy import load_file
from transformers import AutoConfig

from clipid_utils import HybridCLIP, load_clip, save_clip
from clipid_utils.model.pretrained.keys import key_table
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.model.pretrained.towers import resized_positions
from clipid_utils.model.processor import CLIPProcessor

WHOLE = ["siglip", "clip_whole", "clip_whole_old", "metaclip_2"]
OPEN_CLIP = ["open_clip_mean_mlp", "open_clip_cls_linear", "open_clip_own_text"]
SENTENCES = ["m_clip", "st_distilbert_dense", "st_bert_cls_tanh", "st_bert_mean"]
DUAL = ["dual_clip_bert", "dual_vit_roberta"]
ALL = [*WHOLE, *OPEN_CLIP, *SENTENCES, *DUAL, "distilbert", "modernbert", "dinov2", "clip_vision_gelu", "bert",
       "xlm_roberta"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each reference's folder. Names of other repositories in it become folders beside its config."""
    root = tmp_path_factory.mktemp("families")
    found = {name: unpack(name, root / name) for name in ALL}
    for name in OPEN_CLIP[:2]:
        path = found[name] / "open_clip_config.json"
        settings = json.loads(path.read_text())
        settings["model_cfg"]["text_cfg"]["hf_model_name"] = str(found[name] / "text")
        path.write_text(json.dumps(settings))
    path = found["m_clip"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modelBase": str(found["m_clip"] / "base")}))
    return found


@pytest.mark.parametrize("name", WHOLE + OPEN_CLIP)
def test_whole_models(folders, name):
    model, _ = load_clip(folders[name])
    assert_outputs(model, name)
    assert (model.logit_bias is not None) == (name == "siglip")


@pytest.mark.parametrize("name", WHOLE)
def test_the_table_has_each_key_and_each_parameter_once(folders, name):
    model, _ = load_clip(folders[name])
    table, params = key_table(model.config), flatten_params(nnx.state(model, nnx.Param))
    assert sorted(key.nnx_path for key in table) == sorted(params)


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("name", ["distilbert", "modernbert"])
def test_text_towers(folders, name, pooling):
    model = HybridCLIP.from_towers(folders["clip_vision_gelu"], folders[name], pooling=pooling)
    for case, expected in cases(name).items():
        ours = compiled(lambda tower, *inputs: tower.pooled(*inputs), model.text, expected["input_ids"],
                        expected["attention_mask"])
        if pooling in expected:
            close(ours, expected[pooling], case)


@pytest.mark.parametrize("name", SENTENCES)
def test_sentence_embeddings(folders, name):
    model = HybridCLIP.from_towers(folders["clip_vision_gelu"], folders[name])
    for case, expected in cases(name).items():
        projected = name in ("m_clip", "st_distilbert_dense")
        tower = (lambda tower, *inputs: tower(*inputs)) if projected else (lambda tower, *inputs: tower.pooled(*inputs))
        ours = compiled(tower, model.text, expected["input_ids"], expected["attention_mask"])
        close(ours, expected["features"], case)


def test_dinov2_with_smaller_pictures_than_its_positions(folders):
    model = HybridCLIP.from_towers(folders["dinov2"], folders["bert"])
    assert model.config.vision.image_size == 16
    expected = cases("dinov2")["smaller pictures"]
    ours = compiled(lambda tower, pixels: tower.pooled(pixels), model.vision, expected["pixel_values"])
    close(ours, expected["pooled"], "pooled")


def test_positions_of_the_same_size_stay():
    table = np.random.default_rng(0).normal(size=(1 + 36, 5)).astype(np.float32)
    np.testing.assert_allclose(resized_positions(table, 6, 6), table, atol=1e-6)


PICTURES_ONLY = CLIPProcessor(None, 16, 10)


@pytest.mark.parametrize("format", ["native", "transformers"])
@pytest.mark.parametrize("name", WHOLE)
def test_saved_and_opened_again(tmp_path, folders, name, format):
    model, _ = load_clip(folders[name])
    save_clip(model, PICTURES_ONLY, tmp_path, format)
    again, _ = load_clip(tmp_path)
    assert again.config.text == model.config.text and again.config.vision == model.config.vision
    assert_outputs(again, name)


@pytest.mark.parametrize("name", ["open_clip_own_text", "clip_whole_old"])
def test_transformers_files_have_the_keys_of_its_class(tmp_path, folders, name):
    """Those of the recorded CLIPModel, which has as many layers."""
    model, _ = load_clip(folders[name])
    save_clip(model, PICTURES_ONLY, tmp_path, "transformers")
    layers = {side: getattr(model.config, side).layers for side in ("vision", "text")}
    ours = {key for key in load_file(tmp_path / "model.safetensors") if ".layers." not in key}
    theirs = {key for key in load_file(folders["clip_whole"] / "model.safetensors") if ".layers." not in key}
    assert ours == theirs and min(layers.values()) > 0
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["CLIPModel"]


@pytest.mark.parametrize("name", WHOLE + DUAL)
def test_transformers_finds_what_it_wrote(tmp_path, folders, name):
    """Each weight under its name, and each field that its config class has; a projection's size counts on top only."""
    model, _ = load_clip(folders[name])
    save_clip(model, PICTURES_ONLY, tmp_path, "transformers")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, folders[name]))
    ours = {key.replace("vision_model.vision_model.", "vision_model."): value for key, value in ours.items()}
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], value) for key, value in theirs.items())
    ours, theirs = (AutoConfig.from_pretrained(folder) for folder in (tmp_path, folders[name]))
    assert type(ours) is type(theirs) and ours.architectures == theirs.architectures
    ours, theirs = (fields(config.to_dict()) for config in (ours, theirs))
    assert ours == theirs and min(len(ours[side]) for side in ("vision_config", "text_config")) > 10


def fields(config: dict, unused: tuple[str, ...] = ("_name_or_path", "bos_token_id")) -> dict:
    """The fields on which an output can depend."""
    return {name: fields(value, (*unused, "projection_dim")) if isinstance(value, dict) else value
            for name, value in config.items() if name not in unused}


def test_transformers_finds_xlm_roberta_as_roberta(tmp_path, folders):
    """A dual encoder of it: the two are the same tower."""
    model = HybridCLIP.from_towers(folders["clip_vision_gelu"], folders["xlm_roberta"])
    save_clip(model, PICTURES_ONLY, tmp_path, "transformers")
    theirs = load_file(folders["xlm_roberta"] / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    ours = {key.removeprefix("text_model."): value for key, value in written.items() if key.startswith("text_model.")}
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], value) for key, value in theirs.items())
    ours = AutoConfig.from_pretrained(tmp_path).text_config.to_dict()
    theirs = AutoConfig.from_pretrained(folders["xlm_roberta"]).to_dict()
    assert (ours["model_type"], theirs["model_type"]) == ("roberta", "xlm-roberta")
    unused = ("_name_or_path", "bos_token_id", "model_type", "architectures", "dtype", "transformers_version")
    assert fields(ours, unused) == fields(theirs, unused)


def test_a_text_for_a_tower_without_a_mask_must_be_padded(folders):
    model, _ = load_clip(folders["siglip"])
    ids = np.full((1, 5), 3, np.int32)
    with pytest.raises(ValueError, match="exactly 8"):
        model.encode_text(ids, np.ones_like(ids))


def test_both_pretrained_projections_are_kept_with_the_scale(folders):
    """CLIP's image tower and M-CLIP need no training."""
    clip, _ = load_clip(folders["clip_whole"])
    model = HybridCLIP.from_towers(folders["clip_whole"], folders["m_clip"])
    assert float(model.scale()) == pytest.approx(float(clip.scale()), rel=1e-6)
    np.testing.assert_array_equal(model.vision.projection.kernel[...], clip.vision.projection.kernel[...])
    assert model.text.projection.bias is not None


def test_a_projection_to_a_different_space_is_replaced_with_a_warning(folders):
    with pytest.warns(UserWarning, match="projection to 16 numbers, and the common space has 24"):
        model = HybridCLIP.from_towers(folders["siglip"], folders["m_clip"])
    assert model.text.projection.kernel.shape == (24, 24)
    model = HybridCLIP.from_towers(folders["siglip"], folders["m_clip"], embed_dim=12)  # asked for: no warning
    assert model.text.projection.kernel.shape == model.vision.projection.kernel.shape == (24, 12)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "siglip2"}, "NaFlex.*google/siglip2-base-patch16-224"),
        ({"model_type": "gpt2"}, "load_towers"),
        ({"model_type": "jina_clip", "auto_map": {"AutoModel": "code.Model"}}, "auto_map.*not run"),
    ],
)
def test_refused_with_a_remedy(tmp_path, config, message):
    folder = write_folder(tmp_path, config, {"weight": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=message):
        load_clip(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"is_decoder": True, "model_type": "bert"}, "decoder"),
        ({"model_type": "qwen2"}, "qwen2.*supported are bert"),
        ({"model_type": "bert", "auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
    ],
)
def test_refused_text_towers(tmp_path, folders, changes, message):
    folder = write_folder(tmp_path, changes, {"weight": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=message):
        HybridCLIP.from_towers(folders["clip_vision_gelu"], folder)


@pytest.mark.parametrize(
    "side, field, value",
    [("vision_cfg", "timm_model_name", "vit_base"), ("vision_cfg", "attentional_pool", True),
     ("text_cfg", "hf_pooler_type", "max_pooler"), ("vision_cfg", "ls_init_value", 1e-5)],
)
def test_open_clip_settings_that_do_not_fit(tmp_path, folders, side, field, value):
    settings = json.loads((folders["open_clip_mean_mlp"] / "open_clip_config.json").read_text())
    settings["model_cfg"][side][field] = value
    for file in folders["open_clip_mean_mlp"].glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=field if field != "timm_model_name" else "vision_cfg"):
        load_clip(tmp_path)


def test_modules_that_do_not_fit(tmp_path, folders):
    folder = folders["st_bert_mean"]
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    modules = json.loads((folder / "modules.json").read_text())
    (tmp_path / "modules.json").unlink()
    (tmp_path / "modules.json").write_text(json.dumps([*modules, {"type": "x.LSTM", "path": "3_LSTM"}]))
    with pytest.raises(ValueError, match="LSTM is not supported"):
        HybridCLIP.from_towers(folders["clip_vision_gelu"], tmp_path)
