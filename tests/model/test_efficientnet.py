"""EfficientNet-Lite: the sizes of the published networks, the outputs of the package in torch, and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import recorded
from tiny_towers import LITE, enlarged, tiny_photo, with_params

from clipid_utils.model import layers
from clipid_utils.model.config import CLIPConfig, EfficientNetConfig, TextConfig, VisionConfig
from clipid_utils.model.efficientnet import Depthwise, EfficientNetLite, InvertedBottleneck, same_padding
from clipid_utils.model.pretrained.families import to_hf_config
from clipid_utils.model.pretrained.packaged import LITE_SIZES, read_lite
from clipid_utils.model.pretrained.parameters import dotted, flatten_params
from clipid_utils.paths import CACHE
from clipid_utils.training.optimizers import rate_factors

GOLDEN = recorded("efficientnet_lite")
PUBLISHED = [(4.7, 224), (5.4, 240), (6.1, 260)]  # millions of parameters and the picture's side, by TensorFlow's table


class ShortConfig(EfficientNetConfig):
    """The first three blocks, which compile in a third of the time; a sum stands around the first."""

    @property
    def blocks(self):
        return super().blocks[:3]


SHORT = ShortConfig(**dataclasses.asdict(LITE))


@functools.cache
def jitted(call, graph):
    return jax.jit(lambda state, *inputs, **options: call(nnx.merge(graph, state), *inputs, **options))


def compiled(call, module, *inputs, **options):
    graph, state = nnx.split(module)
    return jitted(call, graph)(state, *inputs, **options)


@pytest.fixture(scope="module")
def tower() -> EfficientNetLite:
    return noisy(EfficientNetLite(SHORT, 24, rngs=nnx.Rngs(0)))


def noisy(module: nnx.Module) -> nnx.Module:
    """With biases that are not 0."""
    rng = np.random.default_rng(0)
    graph, params = nnx.split(module, nnx.Param)
    return nnx.merge(graph, jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), params))


def pixels(count: int = 3, seed: int = 0) -> np.ndarray:
    side = LITE.image_size
    return np.random.default_rng(seed).normal(size=(count, side, side, 3)).astype(np.float32)


# --- Sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(3))
def test_the_sizes_are_the_published_ones(number):
    config, (millions, side) = LITE_SIZES[number], PUBLISHED[number]
    np.testing.assert_array_equal(config.blocks, GOLDEN[f"lite{number}/table"])
    assert config.image_size == side == GOLDEN[f"lite{number}/image_size"]
    shapes = nnx.eval_shape(lambda: EfficientNetLite(config, 1, rngs=nnx.Rngs(0)))
    params = {name: value for name, value in flat_shapes(shapes).items()
              if name != "projection.class_vectors"}
    # A batch norm has a scale beside its bias; here it is in the kernel
    norms = sum(shape[0] for name, shape in params.items() if name.endswith("bias") and "classifier" not in name)
    count = sum(map(np.prod, params.values())) + norms
    assert count == GOLDEN[f"lite{number}/parameters"] and round(count / 1e6, 1) == millions


def flat_shapes(module) -> dict[str, tuple]:
    return {dotted(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


@pytest.mark.parametrize("config", [LITE, LITE_SIZES[2]])
def test_shapes(config):
    model = nnx.eval_shape(lambda: EfficientNetLite(config, 24, rngs=nnx.Rngs(0)))
    pictures = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, 3), jnp.float32)
    cells = nnx.eval_shape(lambda model, x: model.feature_map(x), model, pictures)
    assert cells.shape == (2, config.grid, config.grid, config.width) and config.grid == -(-config.image_size // 32)
    assert nnx.eval_shape(lambda model, x: model(x), model, pictures).shape == (2, 24)
    assert config.layers == len(model.blocks) == len(config.blocks)


# --- The same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [37, 32])
def test_the_outputs_of_the_package(tmp_path, size):
    """A random network with norms that are not trivial, and kernels that lie in the file in torch's two orders."""
    path = tmp_path / "lite.pth"
    path.write_bytes(GOLDEN["small/weights"].tobytes())
    config = dataclasses.replace(LITE, image_size=size)
    tower = with_params(EfficientNetLite(config, 24, rngs=nnx.Rngs(0)), read_lite(path, config))
    cells = GOLDEN[f"small/{size}/cells"]
    assert (cells == 6).any() and (cells == 0).any()  # ReLU6 cuts on both sides
    features, logits = compiled(outputs, tower, GOLDEN[f"small/{size}/pixels"])
    np.testing.assert_allclose(features, GOLDEN[f"small/{size}/features"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits, GOLDEN[f"small/{size}/logits"], rtol=0, atol=1e-4)


def outputs(tower: EfficientNetLite, pixels):
    features = tower.pooled(pixels)
    return features, tower.projection.classifier(features)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_the_outputs_of_the_true_networks(number):
    found = list((CACHE / "packages").glob(f"efficientnet*lite{number}*/**/efficientnet-lite{number}-*.pth"))
    if not found:
        pytest.skip(f"the package with the weights of Lite{number} is not in the cache")
    config = LITE_SIZES[number]
    tower = with_params(EfficientNetLite(config, 8, rngs=nnx.Rngs(0)), read_lite(found[0], config))
    features, logits = compiled(outputs, tower, enlarged(GOLDEN["blocks"], config.image_size))
    np.testing.assert_allclose(features, GOLDEN[f"lite{number}/features"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(logits, GOLDEN[f"lite{number}/logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [1, 2, 7, 8, 37, 224, 65])
@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2), (2, 3)])
def test_the_padding_of_xla(side, kernel, stride):
    assert [same_padding(side, kernel, stride)] == jax.lax.padtype_to_pads((side,), (kernel,), (stride,), "SAME")


@pytest.mark.parametrize("kernel, stride, height, width", [
    (1, 1, 4, 3), (3, 1, 7, 8), (3, 2, 7, 8), (3, 2, 8, 5), (5, 1, 6, 9), (5, 2, 9, 6), (5, 2, 2, 1), (3, 3, 10, 11),
])
def test_a_depthwise_convolution_is_xlas(kernel, stride, height, width):
    layer = noisy(Depthwise(kernel, stride, 5, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(1).normal(size=(2, height, width, 5)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x, layer.kernel[...][:, :, None, :], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=5) + layer.bias[...]
    np.testing.assert_allclose(compiled(Depthwise.__call__, layer, x), expected, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_class_vectors_are_mixed_like_conse(scale):
    layer = noisy(layers.projection(dataclasses.replace(LITE, class_scale=scale), 24, dtype=jnp.float32,
                                       rngs=nnx.Rngs(0)))
    features = np.random.default_rng(1).normal(size=(2, 3, LITE.width)).astype(np.float32)
    params = {name: np.asarray(value, np.float64) for name, value in flatten_params(nnx.state(layer)).items()}
    powers = np.exp(scale * (features @ params["classifier.kernel"] + params["classifier.bias"]))
    chances = powers / powers.sum(-1, keepdims=True)
    np.testing.assert_allclose(layer(jnp.asarray(features)), chances @ params["class_vectors"], atol=1e-5)


def test_a_sum_stands_around_a_block_that_keeps_the_shape():
    for stride, d_out, summed in ((1, 4, True), (2, 4, False), (1, 8, False)):
        block = InvertedBottleneck(3, stride, 6, 4, d_out, dtype=jnp.float32, rngs=nnx.Rngs(0))
        block.narrow.kernel[...] = jnp.zeros_like(block.narrow.kernel[...])
        x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 4)), jnp.float32)
        np.testing.assert_array_equal(block(x), x if summed else jnp.zeros((1, 4 // stride, 4 // stride, d_out)))


# --- Cells ----------------------------------------------------------------------------------------------------------


def test_cells_are_projected_like_the_whole_picture(tmp_path):
    model = noisy(tiny_photo(tmp_path)[0])
    x = pixels()
    cells = compiled(lambda model, x: model.encode_patches(x), model, x)
    assert cells.shape == (3, LITE.grid**2, 24) and LITE.grid == 2
    np.testing.assert_allclose(np.linalg.norm(cells, axis=-1), 1, atol=1e-5)
    patches = compiled(lambda model, x: model.vision.patches(x), model, x)
    assert patches.std(axis=1).max() > 0.01  # they differ
    np.testing.assert_allclose(patches.mean(axis=1), compiled(lambda model, x: model.vision.pooled(x), model, x),
                               atol=1e-5)
    projected = np.asarray(model.vision.projection(patches))
    np.testing.assert_allclose(cells, projected / np.linalg.norm(projected, axis=-1, keepdims=True), atol=1e-5)
    whole = np.asarray(model.vision.projection(patches.mean(axis=1)))
    np.testing.assert_allclose(compiled(lambda model, x: model.encode_image(x), model, x),
                               whole / np.linalg.norm(whole, axis=-1, keepdims=True), atol=1e-5)


def test_cells_are_in_the_order_of_rows(tower):
    x = pixels(1)
    cells = compiled(EfficientNetLite.feature_map, tower, x)
    patches = compiled(EfficientNetLite.patches, tower, x)
    assert cells.shape[1:3] == (5, 5)
    np.testing.assert_allclose(patches[0, 1], cells[0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(patches[0, 7], cells[0, 1, 2], atol=1e-6)


# --- Training -------------------------------------------------------------------------------------------------------


def dropped(tower, x, keys):
    return tower.pooled(x, keys=keys, drop_path=0.9)


def test_stochastic_depth_is_drawn_row_by_row(tower):
    x, keys = np.repeat(pixels(1), 6, axis=0), jax.random.split(jax.random.key(0), 6)
    whole = np.asarray(compiled(dropped, tower, x, keys))
    parts = [np.asarray(compiled(dropped, tower, x[start : start + 3], keys[start : start + 3])) for start in (0, 3)]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-5)
    plain = np.asarray(compiled(EfficientNetLite.pooled, tower, x[:1]))
    assert (np.abs(whole - plain).max(axis=1) > 1e-3).any() and np.unique(whole.round(4), axis=0).shape[0] > 1
    np.testing.assert_array_equal(compiled(lambda tower, x, keys: tower.pooled(x, keys=keys), tower, x[:1], keys[:1]),
                                  plain)
    with pytest.raises(ValueError, match="drop_path is 1.0"):
        tower.pooled(x, keys=keys, drop_path=1.0)


def test_stochastic_depth_scales_the_branch_beside_the_sum(tower):
    keys = jax.random.split(jax.random.key(0), 4)
    scales = layers.survivals(keys, 0.9, SHORT.layers, jnp.float32)
    expected = compiled(scaled, tower, pixels(4), [scale[0].reshape(4, 1, 1, 1) for scale in scales])
    assert [block.skip for block in tower.blocks] == [True, False, False] and len(np.unique(scales[0][0])) == 2
    np.testing.assert_allclose(compiled(dropped, tower, pixels(4), keys), expected, atol=1e-4)


def scaled(tower, x, scales):
    x = jax.nn.relu6(tower.stem(x))
    for block, scale in zip(tower.blocks, scales, strict=True):
        y = block(x)
        x = x + scale * (y - x) if block.skip else y
    return jax.nn.relu6(tower.head(x)).mean((1, 2))


def test_remat_gives_the_same_gradient(tower):
    x, keys = pixels(2), jax.random.split(jax.random.key(0), 2)
    graph, params = nnx.split(tower, nnx.Param)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, remat):
        def loss(params):
            return (nnx.merge(graph, params)(x, keys=keys, drop_path=0.3, remat=remat) ** 2).sum()

        return jax.grad(loss)(params)

    plain, again = (flatten_params(gradient(params, remat)) for remat in (False, True))
    for name, value in plain.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-4, atol=1e-5 * (1 + np.abs(value).max()), err_msg=name)


def test_a_gradient_reaches_every_parameter(tower):
    graph, params = nnx.split(tower, nnx.Param)
    gradient = jax.jit(jax.grad(lambda params: nnx.merge(graph, params)(pixels(2))[0, 1]))(params)
    for name, value in flatten_params(gradient).items():
        assert np.abs(value).max() > 0, name


def test_it_computes_in_bfloat16(tower):
    params = flatten_params(nnx.state(tower, nnx.Param))
    half = with_params(EfficientNetLite(SHORT, 24, dtype=jnp.bfloat16, rngs=nnx.Rngs(1)), params)
    ours, exact = (compiled(EfficientNetLite.pooled, one, pixels()) for one in (half, tower))
    assert ours.dtype == half.projection(ours).dtype == jnp.bfloat16 and exact.dtype == jnp.float32
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=0.03 * np.abs(exact).max())


def test_the_rate_of_the_stem_is_that_of_embeddings(tmp_path):
    """`layer_decay` once for each block after it, and once more; the head and the projection have the full rate."""
    model, _ = tiny_photo(tmp_path)
    params = nnx.state(model, nnx.Param)
    factors = rate_factors(params, {"*.stem.bias": 3.0}, 0.5, {"vision": LITE.layers, "text": 2})
    factors = {dotted(path): leaf.get_value() for path, leaf in nnx.to_flat_state(factors)}
    assert LITE.layers == 10
    assert factors["vision.stem.kernel"] == 0.5**11 and factors["vision.stem.bias"] == 3 * 0.5**11
    assert factors["vision.blocks.0.depthwise.kernel"] == 0.5**10 and factors["vision.blocks.9.narrow.bias"] == 0.5
    assert factors["text.word_embedding"] == 0.5**3
    full = ["vision.head.kernel", "vision.projection.class_vectors", "vision.projection.classifier.bias", "logit_scale"]
    assert [factors[name] for name in full] == [1.0] * 4


# --- Configs and errors ---------------------------------------------------------------------------------------------


def test_a_tower_without_tokens_leaves_no_patches_out(tower):
    with pytest.raises(ValueError, match="keep_patches needs a vision transformer"):
        tower.pooled(pixels(), keep_patches=2)


@pytest.mark.parametrize("shape", [(1, 36, 37, 3), (1, 37, 36, 3), (1, 74, 74, 3)])
def test_pictures_of_another_size_are_refused(tower, shape):
    with pytest.raises(ValueError, match=r"the model expects \[B, 37, 37, 3\]: use the checkpoint's own processor"):
        tower(np.zeros(shape, np.float32))


@pytest.mark.parametrize("vision", [LITE, LITE_SIZES[2], VisionConfig()])
def test_a_config_comes_back_from_its_dict(vision):
    text = TextConfig(pooling="mean", normalize_pooled=True, classes=7, class_scale=2.0)
    config = CLIPConfig(vision=vision, text=text, logit_bias=-10.0)
    again = CLIPConfig.from_dict(dataclasses.asdict(config))
    assert again == config and type(again.vision) is type(vision)


@pytest.mark.parametrize("changes", [
    {"vision": LITE}, {"text": TextConfig(normalize_pooled=True)}, {"text": TextConfig(classes=5)},
])
def test_transformers_has_no_such_model(changes):
    with pytest.raises(ValueError, match="save this model as format='native'"):
        to_hf_config(CLIPConfig(**changes))
