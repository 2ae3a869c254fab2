"""Models of transformers, stage by stage, against what PyTorch made of them, at 1e-5.

Everything goes in as a user has it, a folder with config.json and model.safetensors, and through the public loader, so
that what is compared is the table of names as much as the arithmetic. `make parity` does the same at true sizes.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import GOLDEN, cases, close, compiled, unpack

from clipid_utils import HybridCLIP, load_clip
from clipid_utils.model.clip import TextEncoder, VisionTransformer

IMAGE_TOWERS = ["clip_vision_projection", "clip_vision_gelu", "clip", "vit", "vit_no_pooler"]
TEXT_TOWERS = ["bert", "bert_masked_lm", "roberta", "xlm_roberta"]
DUAL_ENCODERS = ["dual_clip_bert", "dual_vit_roberta"]
LEGACY = ["legacy_bert", "legacy_roberta"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("towers")
    return {name: unpack(name, root / name) for name in IMAGE_TOWERS + TEXT_TOWERS + DUAL_ENCODERS}


@pytest.fixture(scope="module")
def join(folders):
    """A tower is loaded together with another one, which is not looked at, and once for all its cases."""

    @functools.cache
    def join(vision="clip_vision_gelu", text="bert", **options) -> HybridCLIP:
        return HybridCLIP.from_towers(vision=folders[vision], text=folders[text], rngs=nnx.Rngs(0), **options)

    return join


def image_stages(tower: VisionTransformer, pixels: np.ndarray) -> dict[str, jax.Array]:
    patches = tower.patch_embedding(tower.patchify(pixels))
    blocks, tower.blocks = tower.blocks, type(tower.blocks)([])
    hidden = [tower.tokens(pixels)]
    tower.blocks = blocks
    for block in blocks:
        hidden.append(block(hidden[-1]))
    pooled = tower.ln_post(hidden[-1][:, 0])
    pooled = pooled if tower.pooler is None else jnp.tanh(tower.pooler(pooled))
    stages = {f"hidden_{number}": state for number, state in enumerate(hidden)}
    return {"patches": patches, **stages, "pooled": pooled, "projected": tower.projection(pooled),
            "features": tower(pixels)}


def text_stages(tower: TextEncoder, inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    hidden = [tower.embeddings(ids)]
    for block in tower.blocks:
        hidden.append(block(hidden[-1], jnp.asarray(mask, bool)[:, None, :]))
    if tower.pooler is None:
        pooled = (hidden[-1] * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    else:
        pooled = jnp.tanh(tower.pooler(hidden[-1][:, 0]))
    stages = {f"hidden_{number}": state for number, state in enumerate(hidden)}
    features = tower(ids, mask)
    return {**stages, "pooled": pooled, "projected": tower.projection(pooled), "features": features}


def whole_stages(model: HybridCLIP, inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    images = image_stages(model.vision, inputs["pixel_values"])
    words = text_stages(model.text, {key: inputs[key] for key in ("input_ids", "attention_mask")})
    stages = {f"image_{key}": images[key] for key in ("pooled", "features")}
    stages |= {f"text_{key}": words[key] for key in ("pooled", "features")}
    out = model(**inputs)
    return stages | {name: getattr(out, name) for name in ("image_embeds", "text_embeds", "logits_per_image")}


@pytest.mark.parametrize("name, case", [(name, case) for name in IMAGE_TOWERS for case in cases(name)])
def test_image_towers(join, name, case):
    model = join(vision=name)
    expected = cases(name)[case]
    ours = compiled(image_stages, model.vision, expected.pop("pixel_values"))
    close(ours["features"], ours.pop("projected"), "the tower as a whole")
    assert {"hidden_0", "pooled"} <= expected.keys() <= ours.keys()
    for stage, value in expected.items():
        close(ours[stage], value, stage)


@pytest.mark.parametrize("name, case", [(name, case) for name in TEXT_TOWERS for case in cases(name)])
def test_text_towers(join, name, case):
    model = join(text=name, pooling="mean" if name == "bert_masked_lm" else "pooler")
    expected = cases(name)[case]
    inputs = {key: expected.pop(key) for key in ("input_ids", "attention_mask")}
    ours = compiled(text_stages, model.text, inputs)
    close(ours.pop("features"), ours.pop("projected"), "the tower as a whole")
    assert expected.keys() == ours.keys()
    real = inputs["attention_mask"].astype(bool)  # what stands at a padded place is never used
    for stage, value in expected.items():
        places = real if stage.startswith("hidden") else slice(None)
        close(np.asarray(ours[stage])[places], value[places], stage)


@pytest.mark.parametrize("name, side", [(name, side) for name in DUAL_ENCODERS for side in ("right", "left")])
def test_whole_dual_encoders(folders, name, side):
    model, _ = load_clip(folders[name])
    expected = cases(name)[side]
    inputs = {key: expected.pop(key) for key in ("pixel_values", "input_ids", "attention_mask")}
    ours = compiled(whole_stages, model, inputs)
    assert expected.keys() == ours.keys()
    for stage, value in expected.items():
        close(ours[stage], value, stage)
    assert float(model.scale()) == pytest.approx(np.exp(2.5), rel=1e-6)


# --- The ancestor's checkpoints ---------------------------------------------------------------------------------------


def assert_legacy_outputs(model: HybridCLIP, name: str) -> None:
    with np.load(GOLDEN / name / "expected.npz") as file:
        expected = dict(file)
    inputs = {key: expected.pop(key) for key in ("pixel_values", "input_ids", "attention_mask")}
    ours = compiled(whole_stages, model, inputs)
    del ours["image_pooled"], ours["text_pooled"]
    assert expected.keys() == ours.keys()
    for stage, value in expected.items():
        close(ours[stage], value, stage)


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_checkpoints(name):
    """The ancestor's own outputs: with its linear scale, and with positions 0, 1, 2, … for RoBERTa too."""
    model, processor = load_clip(GOLDEN / name)
    assert_legacy_outputs(model, name)
    assert model.config.text.position_offset == 0
    with pytest.raises(ValueError, match="tokenizer"):  # it has none, and says so when it is asked for texts
        processor(text=["seekor kucing"])


@pytest.mark.parametrize("name", LEGACY)
@pytest.mark.parametrize("form", ["clip", "nested", "nested, both", "nested, no dict", "nested in its dict"])
def test_the_forms_of_a_legacy_vision_config(tmp_path, name, form):
    shutil.copytree(GOLDEN / name, tmp_path / name)
    config = json.loads((GOLDEN / name / "config.json").read_text())
    flat = config["vision_config"]
    assert flat["model_type"] == "clip_vision_model"
    config["vision_config"] = {
        "clip": flat | {"model_type": "clip"},
        "nested": {"model_type": "clip", "projection_dim": 512, "text_config": {"hidden_size": 512},
                   "vision_config": flat},
        "nested in its dict": {"model_type": "clip", "vision_config_dict": flat, "vision_config": None},
        "nested, no dict": {"model_type": "clip", "vision_config_dict": None, "vision_config": flat},
        "nested, both": {"model_type": "clip", "vision_config_dict": flat, "vision_config": flat},
    }[form]
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    model, processor = load_clip(tmp_path / name)
    assert processor.image_size == model.config.vision.image_size == 32
    as_recorded, _ = load_clip(GOLDEN / name)
    assert model.config == as_recorded.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(as_recorded))
