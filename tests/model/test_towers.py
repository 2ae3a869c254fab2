"""Towers in all the forms that they are published in; errors that name what does not fit; and the way out again."""

import json
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx, serialization
from reference import GOLDEN, config_of, unpack, weights_of, write_folder
from safetensors.numpy import load_file, save_file
from test_weights import nested, stored, tensor, write_zip
from tokenizers import Tokenizer, models

from clipid_utils import CLIPProcessor, HybridCLIP, load_clip, load_towers, save_clip
from clipid_utils.model.pretrained.keys import key_table
from clipid_utils.model.pretrained.parameters import flatten_params

VISION, TEXT = "clip_vision_gelu", "xlm_roberta"  # the smallest of each side
DUAL = ["dual_clip_bert", "dual_vit_roberta"]
PICTURES_ONLY = CLIPProcessor(None, 16, 10)  # no tokenizer has as few ids as the tables of the references


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    names = [VISION, TEXT, *DUAL, "clip", "clip_vision_projection", "vit", "vit_no_pooler", "bert", "bert_masked_lm",
             "roberta"]
    return {name: unpack(name, root / name) for name in names}


@pytest.fixture
def towers(folders):
    """A model of two folders, or references' names: the smallest ones where none is given."""

    def towers(vision=VISION, text=TEXT, **options):
        return HybridCLIP.from_towers(vision=folders.get(vision, vision), text=folders.get(text, text), **options)

    return towers


def leaves(model) -> dict[str, np.ndarray]:
    return {key: np.asarray(value) for key, value in flatten_params(nnx.state(model, nnx.Param)).items()}


def assert_same(ours: dict, expected: dict) -> None:
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        assert ours[key].dtype == value.dtype and ours[key].tobytes() == value.tobytes(), key


def pretrained(model, side: str) -> dict:
    """A tower's parameters without its projection, which is new where the source has none."""
    return {key: value for key, value in leaves(model).items()
            if key.startswith(f"{side}.") and "projection" not in key}


def side_of(name: str) -> str:
    return "text" if "bert" in name else "vision"


def renamed(name: str, *substitutions: tuple[str, str]) -> dict[str, np.ndarray]:
    weights = weights_of(name)
    for pattern, new in substitutions:
        weights = {re.sub(pattern, new, key): value for key, value in weights.items()}
    return weights


# The table

@pytest.mark.parametrize("name", DUAL)
def test_the_table_names_every_key_of_transformers_and_every_parameter_once(folders, name):
    model, _ = load_clip(folders[name])
    table = key_table(model.config)
    hf_names, paths = [row[0] for row in table], [row[1] for row in table]
    assert sorted(hf_names) == sorted(weights_of(name))
    assert sorted(paths) == sorted(leaves(model))


def test_two_towers_are_the_two_towers_of_the_whole(tmp_path, folders, towers):
    """from_towers reads the same from each tower as load_clip from both."""
    whole, _ = load_clip(folders["dual_clip_bert"])
    config, weights = config_of("dual_clip_bert"), weights_of("dual_clip_bert")
    parts = {side: write_folder(tmp_path / side, config[f"{side}_config"], {
        key.removeprefix(f"{side}_model."): value for key, value in weights.items() if key.startswith(f"{side}_model.")
    }) for side in ("vision", "text")}
    joined = towers(**parts)
    for side in parts:
        assert_same(pretrained(joined, side), pretrained(whole, side))


# Prefixes, heads, old names, buffers

@pytest.mark.parametrize(
    "name, prefixes",
    [
        ("clip_vision_gelu", ["vision_model.", "vision_model.vision_model."]),  # transformers 4 wrote the first
        ("vit_no_pooler", ["vit."]),
        ("bert", ["bert.", "text_model."]),
        ("roberta", ["roberta.", "text_model."]),
        ("xlm_roberta", ["roberta."]),
    ],
)
def test_prefixes(tmp_path, towers, name, prefixes):
    expected = pretrained(towers(**{side_of(name): name}), side_of(name))
    for prefix in prefixes:
        folder = write_folder(tmp_path / prefix, config_of(name), renamed(name, ("^", prefix)))
        assert_same(pretrained(towers(**{side_of(name): folder}), side_of(name)), expected)


def test_a_dual_encoder_of_transformers_4(tmp_path, folders):
    """Its CLIP towers have their prefix twice."""
    weights = renamed("dual_clip_bert", (r"^vision_model\.", "vision_model.vision_model."))
    older = write_folder(tmp_path, config_of("dual_clip_bert"), weights)
    assert_same(leaves(load_clip(older)[0]), leaves(load_clip(folders["dual_clip_bert"])[0]))


def head(*shapes_of_keys) -> dict[str, np.ndarray]:
    return {key: np.ones(shape, np.float32) for key, shape in shapes_of_keys}


MASKED_BERT = head(("cls.predictions.bias", 40), ("cls.predictions.decoder.weight", (40, 24)),
                   ("cls.predictions.decoder.bias", 40), ("cls.predictions.transform.dense.weight", (24, 24)),
                   ("cls.predictions.transform.dense.bias", 24), ("cls.predictions.transform.LayerNorm.weight", 24),
                   ("cls.predictions.transform.LayerNorm.bias", 24))
NEXT_SENTENCE = head(("cls.seq_relationship.weight", (2, 24)), ("cls.seq_relationship.bias", 2))
MASKED_ROBERTA = head(("lm_head.bias", 40), ("lm_head.dense.weight", (24, 24)), ("lm_head.dense.bias", 24),
                      ("lm_head.layer_norm.weight", 24), ("lm_head.layer_norm.bias", 24),
                      ("lm_head.decoder.weight", (40, 24)), ("lm_head.decoder.bias", 40))
CLASSES = head(("classifier.weight", (3, 24)), ("classifier.bias", 3))


@pytest.mark.parametrize(
    "kind, name, prefix, its_head, pooler",
    [
        ("BertForPreTraining", "bert", "bert.", MASKED_BERT | NEXT_SENTENCE, True),
        ("BertForMaskedLM", "bert", "bert.", MASKED_BERT, False),
        ("BertForSequenceClassification", "bert", "bert.", CLASSES, True),
        ("BertForTokenClassification", "bert", "bert.", CLASSES, False),
        ("BertForQuestionAnswering", "bert", "bert.", head(("qa_outputs.weight", (2, 24)), ("qa_outputs.bias", 2)),
         False),
        ("RobertaForMaskedLM", "roberta", "roberta.", MASKED_ROBERTA, False),
        ("RobertaForSequenceClassification", "roberta", "roberta.",
         head(("classifier.dense.weight", (24, 24)), ("classifier.dense.bias", 24),
              ("classifier.out_proj.weight", (2, 24)), ("classifier.out_proj.bias", 2)), False),
        ("XLMRobertaForMaskedLM", "xlm_roberta", "roberta.", MASKED_ROBERTA, False),
        ("ViTForImageClassification", "vit_no_pooler", "vit.", CLASSES, None),
        ("ViTForMaskedImageModeling", "vit_no_pooler", "vit.",
         head(("vit.embeddings.mask_token", (1, 1, 24)), ("decoder.0.weight", (48, 24, 1, 1)), ("decoder.0.bias", 48)),
         None),
    ],
)
def test_heads_are_left_out_and_a_missing_pooler_is_new(tmp_path, towers, kind, name, prefix, its_head, pooler):
    """The head of another task is knowingly unused; a pooler that its model never had is drawn, with a warning."""
    side = side_of(name)
    weights = renamed(name, ("^", prefix)) | its_head
    if pooler is False:
        weights = {key: value for key, value in weights.items() if "pooler" not in key}
    folder = write_folder(tmp_path, config_of(name) | {"architectures": [kind]}, weights)
    expected = pretrained(towers(**{side: name}), side)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = towers(**{side: folder})
    ours, told = pretrained(model, side), [str(w.message) for w in caught if "pooler" in str(w.message)]
    if pooler is False:
        assert len(told) == 1 and "A new one is initialised" in told[0] and "pooling='mean'" in told[0]
        for part in ("kernel", "bias"):
            assert ours.pop(f"text.pooler.{part}").tobytes() != expected.pop(f"text.pooler.{part}").tobytes()
    else:
        assert not told
    assert_same(ours, expected)


def test_the_mean_needs_no_pooler(folders, towers):
    """Of a masked language model none is made, of BERT the one it has is left out; no warning in either case."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in ("bert_masked_lm", "bert"):
            model = towers(text=text, pooling="mean")
            assert model.text.pooler is None and not [key for key in leaves(model) if "pooler" in key]
    with pytest.raises(ValueError, match="pooling is 'max': it must be pooler or mean"):
        towers(pooling="max")


def test_names_of_the_first_berts_and_buffers_of_positions(tmp_path, towers):
    weights = renamed("bert", (r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta"),
                      ("^", "bert."))
    assert sum(key.endswith(".gamma") for key in weights) == 5
    weights |= {"bert.embeddings.position_ids": np.arange(10)[None],
                "bert.embeddings.token_type_ids": np.zeros((1, 10), np.int64)}
    folder = write_folder(tmp_path / "text", config_of("bert"), weights)
    assert_same(pretrained(towers(text=folder), "text"), pretrained(towers(text="bert"), "text"))
    weights = renamed(VISION, ("^", "vision_model.")) | {"vision_model.embeddings.position_ids": np.arange(17)[None]}
    folder = write_folder(tmp_path / "vision", config_of(VISION), weights)
    assert_same(pretrained(towers(vision=folder), "vision"), pretrained(towers(), "vision"))


# Files of every kind

def as_flax(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Torch's names and shapes as Flax has them: kernels transposed, convolutions [rows, columns, in, out]."""
    changed = {}
    for key, value in weights.items():
        name = key.removesuffix(".weight")
        if name == key:
            changed[key] = value
        elif value.ndim == 4:
            changed[f"{name}.kernel"] = value.transpose(2, 3, 1, 0)
        elif "embedding" in name.rsplit(".", 1)[-1]:
            changed[f"{name}.embedding"] = value
        else:
            changed[f"{name}.{'scale' if value.ndim == 1 else 'kernel'}"] = value.T
    return {key: np.ascontiguousarray(value) for key, value in changed.items()}


@pytest.mark.parametrize("name", ["clip_vision_projection", "vit", "bert", "bert_masked_lm", "roberta"])
@pytest.mark.filterwarnings("ignore:.*has no pooler")
def test_flax_files(tmp_path, towers, name):
    """As FlaxBertModel, FlaxCLIPVisionModel, FlaxViTModel … wrote them, before transformers 5 dropped them."""
    weights = as_flax(weights_of(name))
    assert {key.rsplit(".", 1)[-1] for key in weights} >= {"kernel", "scale", "bias"}
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(nested(weights)))
    side = side_of(name)
    assert_same(pretrained(towers(**{side: tmp_path}), side), pretrained(towers(**{side: name}), side))


@pytest.mark.parametrize("name", [*DUAL, "vit"])
def test_torch_files(tmp_path, folders, towers, name):
    """pytorch_model.bin, whose matrices lie here in column order as `state_dict` of a transposed one does."""
    state, storages = {}, {}
    for number, (key, value) in enumerate(weights_of(name).items()):
        across = value.ndim == 2 and number % 2 == 1
        storages[str(number)] = value.tobytes("F" if across else "C")
        strides = (1, value.shape[0]) if across else tuple(n // 4 for n in value.strides)
        state[key] = tensor(stored(key=str(number), numel=value.size), 0, value.shape, strides)
    write_zip(tmp_path, state, storages)
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    if name == "vit":
        assert_same(pretrained(towers(vision=tmp_path), "vision"), pretrained(towers(vision=name), "vision"))
    else:
        assert_same(leaves(load_clip(tmp_path)[0]), leaves(load_clip(folders[name])[0]))


def test_shards(tmp_path, folders):
    weights = weights_of("dual_clip_bert")
    shard_of = {key: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, key in enumerate(weights)}
    for shard in set(shard_of.values()):
        save_file({key: value for key, value in weights.items() if shard_of[key] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    (tmp_path / "config.json").write_text(json.dumps(config_of("dual_clip_bert")))
    assert_same(leaves(load_clip(tmp_path)[0]), leaves(load_clip(folders["dual_clip_bert"])[0]))


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_files_in_half_precision_are_held_in_float32(tmp_path, kind):
    third = {key: value / 3 for key, value in weights_of("dual_clip_bert").items()}  # which half precision must round
    config = config_of("dual_clip_bert")
    full, _ = load_clip(write_folder(tmp_path / "full", config, third))
    half, _ = load_clip(write_folder(tmp_path / "half", config, {k: v.astype(kind) for k, v in third.items()}))
    expected = leaves(full)
    for key, value in leaves(half).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, expected[key].astype(kind).astype(np.float32))


# Keys that do not fit

def drop(key):
    return lambda weights: weights.pop(key)


def put(key, value):
    return lambda weights: weights.update({key: np.asarray(value, np.float32)})


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("bert", put("encoder.layer.0.adapter.weight", [1]), r"unknown \['encoder\.layer\.0\.adapter\.weight'\]"),
        ("bert", put("encoder.layer.2.output.dense.bias", np.ones(24)), r"unknown \['encoder\.layer\.2\.output\.dense"),
        ("bert", put("stray", [1]), r"unknown \['stray'\]"),
        ("bert", drop("encoder.layer.1.attention.self.key.bias"),
         r"missing \['text_model\.encoder\.layer\.1\.attention\.self\.key\.bias'\]"),
        ("bert", drop("embeddings.word_embeddings.weight"), r"missing \[.*embeddings\.word_embeddings\.weight'\]"),
        ("bert", drop("pooler.dense.bias"), r"missing \['text_model\.pooler\.dense\.bias'\]"),
        ("bert", put("pooler.dense.weight", np.ones((24, 23))), r"wrong shape \[.pooler\.dense\.weight \(23, 24\) ins"),
        ("bert", put("embeddings.word_embeddings.weight", np.ones((39, 24))), r"wrong shape .*\(39, 24\).*\(40, 24\)"),
        ("bert", put("bert.pooler.dense.bias", np.ones(24)), r"'text_model\.pooler\.dense\.bias' twice"),
        (VISION, put("embeddings.patch_embedding.bias", np.ones(24)), r"unknown \['embeddings\.patch_embedding\.bias'"),
        (VISION, drop("pre_layrnorm.weight"), r"missing \['vision_model\.pre_layrnorm\.weight'\]"),
        (VISION, put("embeddings.patch_embedding.weight", np.ones((24, 3, 5, 5))), r"wrong shape .*patch_embedding"),
        (VISION, put("embeddings.patch_embedding.weight", np.ones((24, 48))), r"wrong shape .*patch_embedding"),
        (VISION, put("embeddings.class_embedding", np.ones((1, 1, 24))), r"wrong shape .*class_embedding"),
        ("vit_no_pooler", put("pooler.dense.weight", np.ones((24, 24))),
         r"missing \['vision_model\.pooler\.dense\.bias'\]"),
        ("vit_no_pooler", put("embeddings.cls_token", np.ones((1, 2, 12))), r"wrong shape .*cls_token"),
        ("vit_no_pooler", drop("embeddings.position_embeddings"), r"missing .*embeddings\.position_embeddings"),
        ("dual_clip_bert", drop("text_projection.weight"), r"missing \['text_projection\.weight'\]"),
        ("dual_clip_bert", drop("logit_scale"), r"missing \['logit_scale'\]"),
        ("dual_clip_bert", drop("text_model.pooler.dense.weight"), r"missing \['text_model\.pooler\.dense\.weight'\]"),
        ("dual_clip_bert", put("logit_bias", 1.0), r"unknown \['logit_bias'\]"),
        ("dual_clip_bert", put("visual_projection.bias", np.ones(16)), r"unknown \['visual_projection\.bias'\]"),
        ("dual_clip_bert", put("visual_projection.weight", np.ones((16, 16))), r"wrong shape \['visual_projection"),
        ("dual_clip_bert", put("logit_scale", [2.5, 2.5]), r"logit_scale"),
    ],
)
def test_keys_that_do_not_fit_are_listed(tmp_path, towers, name, change, message):
    weights = weights_of(name)
    change(weights)
    folder = write_folder(tmp_path / "source", config_of(name), weights)
    with pytest.raises(ValueError, match=message) as caught:
        load_clip(folder) if name in DUAL else towers(**{side_of(name): folder})
    assert str(folder) in str(caught.value)


def test_all_that_is_wrong_is_said_at_once(tmp_path, towers):
    weights = weights_of("bert")
    for change in (put("stray", [1]), put("another", [1]), drop("encoder.layer.0.output.dense.bias"),
                   put("embeddings.LayerNorm.weight", np.ones(23))):
        change(weights)
    with pytest.raises(ValueError, match=r"missing .*output\.dense\.bias.*'another', 'stray'.*embeddings\.LayerNorm"):
        towers(text=write_folder(tmp_path, config_of("bert"), weights))


def test_legacy_keys_that_do_not_fit_are_listed(tmp_path):
    shutil.copytree(GOLDEN / "legacy_bert", tmp_path / "legacy")
    tree = serialization.msgpack_restore((tmp_path / "legacy" / "flax_model.msgpack").read_bytes())
    tree["text_projection"]["bias"] = np.ones(24, np.float32)
    del tree["visual_projection"]
    (tmp_path / "legacy" / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(ValueError, match=r"missing \['visual_projection\.weight'\].*unknown \['text_projection\.bias'"):
        load_clip(tmp_path / "legacy")


# Configs that do not fit

@pytest.mark.parametrize(
    "name, change, message",
    [
        ("bert", {"model_type": "albert"}, "model_type .*'albert'.*bert, roberta, xlm-roberta"),
        ("bert", {"model_type": None, "architectures": None}, "model_type .*None.*bert, roberta"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'.*'absolute'"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"vocab_size": "66"}, "(?s)vocab_size.*'66'"),
        ("bert", {"hidden_act": "swish"}, "hidden_act is 'swish', not one of gelu, quick_gelu"),
        ("bert", {"num_attention_heads": 5}, "num_attention_heads|hidden_size"),
        (VISION, {"model_type": "swin"}, "model_type .*'swin'.*clip_vision_model.*vit"),
        (VISION, {"hidden_act": "relu"}, "hidden_act is 'relu', not one of gelu, quick_gelu"),
        (VISION, {"num_channels": 1}, "num_channels is 1"),
        (VISION, {"image_size": 18}, "image_size 18 is not a multiple of patch_size 4"),
        ("vit_no_pooler", {"qkv_bias": False}, "qkv_bias is False"),
        ("vit", {"pooler_act": "gelu"}, "pooler_act is 'gelu'"),
        ("vit", {"image_size": [16, 20]}, "image_size .*16, 20.*square"),
    ],
)
def test_configs_that_cannot_be_followed_are_named(tmp_path, towers, name, change, message):
    """The field of config.json, what it is, and what is known."""
    folder = write_folder(tmp_path / "source", config_of(name) | change, weights_of(name))
    with pytest.raises(ValueError, match=message) as caught:
        towers(**{side_of(name): folder})
    assert str(folder / "config.json") in str(caught.value) or "image_size 18" in message


@pytest.mark.parametrize("name", [VISION, "vit", "bert", "xlm_roberta"])
def test_one_tower_is_sent_to_load_towers(folders, name):
    kind = config_of(name)["model_type"]
    with pytest.raises(ValueError, match=rf"config\.json.*model_type .*'{kind}'.*load_towers"):
        load_clip(folders[name])


def test_towers_are_not_taken_for_each_other(folders, towers):
    with pytest.raises(ValueError, match=r"config\.json.*model_type of the image tower is 'bert'"):
        towers(vision="bert")
    with pytest.raises(ValueError, match=r"config\.json.*model_type of the text tower is 'vit'"):
        towers(text="vit")
    with pytest.raises(ValueError, match=r"config\.json.*model_type of the text tower is 'clip_vision_model'"):
        towers(text=VISION)


@pytest.mark.parametrize("field", ["vision_config", "text_config"])
def test_a_dual_encoder_without_one_of_its_configs(tmp_path, field):
    config = {key: value for key, value in config_of("dual_clip_bert").items() if key != field}
    with pytest.raises(ValueError, match=r"config\.json.*(vision_config|text_config|model_type)"):
        load_clip(write_folder(tmp_path, config, weights_of("dual_clip_bert")))


def test_a_tower_that_is_not_there(tmp_path, towers):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        towers(text=tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(config_of("bert")))
    with pytest.raises(FileNotFoundError, match="has no weights"):
        towers(text=tmp_path)


# What is new

def test_the_projections(towers):
    """CLIP's own image projection is kept where it fits; another is drawn, and so is the texts'."""
    for vision in ("clip_vision_projection", "clip"):
        own = weights_of(vision)["visual_projection.weight"].T
        for embed_dim in (None, 16):
            model = towers(vision=vision, embed_dim=embed_dim)
            assert model.config.embed_dim == 16
            np.testing.assert_array_equal(model.vision.projection.kernel[...], own)
            assert model.text.projection.kernel.shape == (24, 16)
        model = towers(vision=vision, embed_dim=8)
        assert model.vision.projection.kernel.shape == model.text.projection.kernel.shape == (24, 8)
        assert not np.isin(np.asarray(model.vision.projection.kernel[...]), own).any()
    assert towers(vision="vit").config.embed_dim == 512


def test_what_is_drawn_is_drawn_from_rngs(towers):
    one, again, other, default = (leaves(towers(embed_dim=8, **options)) for options in (
        {"rngs": nnx.Rngs(1)}, {"rngs": nnx.Rngs(1)}, {"rngs": nnx.Rngs(2)}, {}))
    assert_same(one, again)
    for key, value in one.items():
        drawn = "projection" in key
        assert (value.tobytes() != other[key].tobytes()) == (value.tobytes() != default[key].tobytes()) == drawn, key
        if drawn:  # as large as a model's own at its start
            assert np.std(value) == pytest.approx(24**-0.5, rel=0.25) and abs(value.mean()) < 0.05
    assert np.exp(one["logit_scale"]) == pytest.approx(1 / 0.07, rel=1e-6)


# Types

def test_bfloat16_parameters_halve_the_bytes_and_stay_near():
    with np.load(GOLDEN / "legacy_bert" / "expected.npz") as inputs:
        pixels, ids, mask = (inputs[key] for key in ("pixel_values", "input_ids", "attention_mask"))
    embed = nnx.jit(lambda model: (model.encode_image(pixels), model.encode_text(ids, mask)))
    exact, _ = load_clip(GOLDEN / "legacy_bert")
    for dtype in (jnp.float32, jnp.bfloat16):
        half, _ = load_clip(GOLDEN / "legacy_bert", dtype=dtype, param_dtype=jnp.bfloat16)
        assert all((leaf.dtype == jnp.float32) == (path == "logit_scale") for path, leaf in leaves(half).items())
        size, full = (sum(leaf.nbytes for leaf in leaves(model).values()) for model in (half, exact))
        assert 2 * (size - 4) == full - 4
        assert jax.eval_shape(half.vision.tokens, pixels).dtype == dtype
        for ours, theirs in zip(embed(half), embed(exact), strict=True):
            assert ours.dtype == jnp.float32
            np.testing.assert_allclose(ours, theirs, atol=0.03)
            assert (ours != theirs).any()


def test_towers_in_bfloat16(towers):
    model = towers("vit", "bert_masked_lm", pooling="mean", param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    assert all((leaf.dtype == jnp.float32) == (path == "logit_scale") for path, leaf in leaves(model).items())
    assert jax.eval_shape(model.vision.tokens, np.zeros((1, 16, 16, 3), np.float32)).dtype == jnp.bfloat16


def test_the_model_owns_its_parameters(tmp_path):
    """Nothing of them lies in the mapped file, which may change or go."""
    folder = unpack("dual_vit_roberta", tmp_path / "model")
    model, _ = load_clip(folder)
    before = leaves(model)
    (folder / "model.safetensors").write_bytes(bytes((folder / "model.safetensors").stat().st_size))
    assert_same(leaves(model), before)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


# Out again

@pytest.mark.parametrize("name", DUAL)
def test_a_dual_encoder_goes_out_as_it_came_in(tmp_path, folders, name):
    """Bit for bit, key for key, and with the fields of the config that shape a model."""
    model, _ = load_clip(folders[name])
    save_clip(model, PICTURES_ONLY, tmp_path, format="vision-text-dual-encoder")
    read = weights_of(name)  # the names of transformers 5; those of 4 have CLIP's image tower twice, and 5 takes them
    written = {key.replace("vision_model.vision_model.", "vision_model."): value
               for key, value in load_file(tmp_path / "model.safetensors").items()}
    assert_same(written, read)
    config, source = json.loads((tmp_path / "config.json").read_text()), config_of(name)
    for side in ("vision_config", "text_config"):
        assert {field: source[side].get(field) for field in config[side] if field != "projection_dim"} == {
            field: value for field, value in config[side].items() if field != "projection_dim"}
    assert all(source[field] == config[field] for field in ("model_type", "projection_dim", "architectures"))
    again, _ = load_clip(tmp_path)
    assert again.config.vision == model.config.vision and again.config.text == model.config.text
    assert_same(leaves(again), leaves(model))


@pytest.mark.parametrize("name", [*DUAL, "legacy_bert", "legacy_roberta"])
def test_what_was_loaded_is_saved_natively_and_comes_back(tmp_path, folders, name):
    model, processor = load_clip(folders.get(name, GOLDEN / name))
    save_clip(model, PICTURES_ONLY, tmp_path)
    again, _ = load_clip(tmp_path)
    assert again.config == model.config
    assert_same(leaves(again), leaves(model))


@pytest.mark.parametrize("name", ["legacy_bert", "legacy_roberta"])
def test_a_legacy_checkpoint_goes_out_as_a_dual_encoder(tmp_path, name):
    """RoBERTa with positions 0, 1, 2, … is BERT to transformers, and must stay so."""
    model, _ = load_clip(GOLDEN / name)
    save_clip(model, PICTURES_ONLY, tmp_path, format="vision-text-dual-encoder")
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["model_type"] == "bert"
    again, _ = load_clip(tmp_path)
    assert again.config.text == model.config.text and again.config.vision == model.config.vision
    assert_same(leaves(again), leaves(model))


def test_models_that_a_dual_encoder_cannot_hold_are_refused(tmp_path, towers):
    for options in ({"pooling": "mean"}, {"vision": "vit_no_pooler"}):
        with pytest.raises(ValueError, match="save it as format='native'"):
            save_clip(towers(**options), PICTURES_ONLY, tmp_path / "out", format="vision-text-dual-encoder")
    assert not (tmp_path / "out").exists()


def test_a_scale_above_100_is_the_one_it_was_trained_with(tmp_path):
    """The ancestor's effective 20 x 10 is no mistake to be clamped away."""
    shutil.copytree(GOLDEN / "legacy_bert", tmp_path / "legacy")
    tree = serialization.msgpack_restore((tmp_path / "legacy" / "flax_model.msgpack").read_bytes())
    tree["logit_scale"] = np.array(10.0, np.float32)
    (tmp_path / "legacy" / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    model, _ = load_clip(tmp_path / "legacy")
    assert float(model.scale()) == pytest.approx(200, rel=1e-6)
    save_clip(model, PICTURES_ONLY, tmp_path / "native")
    assert float(load_clip(tmp_path / "native")[0].scale()) == pytest.approx(200, rel=1e-6)


def test_a_config_of_2020_may_lack_its_model_type(tmp_path, folders, towers):
    config = config_of("bert") | {"architectures": ["BertForPreTraining"]}
    del config["model_type"]
    folder = write_folder(tmp_path, config, weights_of("bert"))
    assert_same(pretrained(towers(text=folder), "text"), pretrained(towers(text="bert"), "text"))


CHANGES = {"num_hidden_layers": 1, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-3}


@pytest.mark.parametrize("old", [
    {"vision_config_dict": CHANGES}, {"vision_config_dict": {}}, {"vision_config_dict": None},
    {"vision_config_dict": CHANGES, "vision_config": None}, {"vision_config_dict": None, "vision_config": None},
])
def test_old_configs_are_read_as_transformers_reads_them(old):
    """`vision_config_dict`, if it is there, overrides `vision_config` with its fields and with their defaults."""
    from transformers import CLIPConfig

    from clipid_utils.model.pretrained.families import vision_config

    values = {"model_type": "clip", "vision_config": {"num_hidden_layers": 3, "hidden_size": 24, "image_size": 32,
                                                      "patch_size": 8, "num_attention_heads": 4}} | old
    ours, theirs = vision_config(dict(values), False), CLIPConfig(**values).vision_config
    assert (ours.layers, ours.width, ours.heads, ours.mlp_dim, ours.activation, ours.norm_eps) == (
        theirs.num_hidden_layers, theirs.hidden_size, theirs.num_attention_heads, theirs.intermediate_size,
        theirs.hidden_act, theirs.layer_norm_eps)
    assert (ours.image_size, ours.patch_size) == (theirs.image_size, theirs.patch_size)


# load_towers: the model and its processor together

@pytest.fixture
def with_processor(tmp_path):
    """The smallest towers, with a tokenizer of `size` tokens and pictures resized to 20 and cut to 16."""

    def write(size=40):
        vision, text = unpack(VISION, tmp_path / "vision"), unpack(TEXT, tmp_path / "text")
        (vision / "preprocessor_config.json").write_text(json.dumps({
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 20}, "crop_size": 16}))
        tokenizer = Tokenizer(models.WordLevel({f"[{i}]": i for i in range(size)}, "[0]"))
        tokenizer.save(str(text / "tokenizer.json"))
        (text / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[1]", "model_max_length": 99}))
        return {"vision": vision, "text": text}

    return write


def test_two_towers_and_their_processor_come_together(with_processor):
    towers = with_processor()
    model, processor = load_towers(**towers, embed_dim=8, rngs=nnx.Rngs(3))
    assert_same(leaves(model), leaves(HybridCLIP.from_towers(**towers, embed_dim=8, rngs=nnx.Rngs(3))))
    assert (processor.image_size, processor.resize, processor.max_length) == (16, 20, model.config.text.max_length)
    with pytest.raises(TypeError, match="picture_size"):
        load_towers(**towers, picture_size=32)


def test_towers_whose_tokenizer_has_more_ids_are_refused(with_processor):
    with pytest.raises(ValueError, match=r"text has 41 tokens with ids up to 40, .* table has 40 rows"):
        load_towers(**with_processor(41))


@pytest.mark.parametrize("vision, text, drawn", [("clip", "clip", 0), (VISION, "clip", 1), (VISION, TEXT, 2)])
def test_only_new_layers_draw_numbers(towers, vision, text, drawn):
    rngs = nnx.Rngs(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        towers(vision, text, rngs=rngs, pooling=None if text == "clip" else "mean")
    assert int(rngs.default.count[...]) == drawn
