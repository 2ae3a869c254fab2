"""Low-rank adapters: they begin as nothing, learn beside frozen matrices, and end in them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny import tiny_clip, tiny_pairs

from clipid_utils import load_clip, save_clip
from clipid_utils.model.adapters import add_adapters, merge_adapters
from clipid_utils.model.pretrained.parameters import flatten_params


def params(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in flatten_params(nnx.state(model, nnx.Param)).items()}


def disturbed(model):
    """With adapters that are no longer 0."""
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), leaf.dtype) if "lora_b" in str(path) else leaf,
        state))


def inputs(processor):
    images = [Image.fromarray(pixels) for pixels in tiny_pairs(3).images]
    return processor(images=images, text=["kucing tidur", "mobil merah", "perahu layar"])


def test_new_adapters_change_nothing_and_leave_the_model_alone():
    model, processor = tiny_clip()
    before = params(model)
    adapted, batch = add_adapters(model, 4), inputs(processor)
    np.testing.assert_array_equal(adapted(**batch).logits_per_image, model(**batch).logits_per_image)
    assert params(model).keys() == before.keys()
    learning = [name for name in params(adapted) if ".lora_" in name]
    # two layers in each tower, six products in a layer, two matrices each
    assert len(learning) == 2 * 2 * 6 * 2 and all(".blocks." in name for name in learning)
    assert params(adapted)["text.blocks.0.mlp.fc1.lora_a"].shape == (16, 4)


def test_merged_adapters_compute_the_same():
    model, processor = tiny_clip()
    adapted, batch = disturbed(add_adapters(model, 2)), inputs(processor)
    merged = merge_adapters(adapted)
    assert params(merged).keys() == params(model).keys()
    ours, expected = merged(**batch).logits_per_image, adapted(**batch).logits_per_image
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert np.abs(np.asarray(ours - model(**batch).logits_per_image)).max() > 1e-3
    assert merge_adapters(merged) is merged


def test_a_saved_model_has_its_adapters_merged(tmp_path):
    model, processor = tiny_clip()
    adapted, batch = disturbed(add_adapters(model, 2)), inputs(processor)
    save_clip(adapted, processor, tmp_path)
    again, _ = load_clip(tmp_path)
    np.testing.assert_allclose(again(**batch).logits_per_image, adapted(**batch).logits_per_image, atol=1e-5)


def test_one_tower_alone():
    adapted = add_adapters(tiny_clip()[0], 2, sides=("text",))
    assert all(name.startswith("text.") for name in params(adapted) if ".lora_" in name)


def test_a_rank_of_0():
    with pytest.raises(ValueError, match="rank of the adapters is 0"):
        add_adapters(tiny_clip()[0], 0)
