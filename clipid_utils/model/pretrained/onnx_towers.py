"""Both towers as ONNX graphs, node by node, in the order in which `vision`, `efficientnet` and `text` compute them."""

import numpy as np

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import EfficientNetConfig, TextConfig, VisionConfig
from clipid_utils.model.pretrained.onnx_graph import FLOAT, INT, Graph, TensorProto, helper, onnx


def image_encoder(model: HybridCLIP, known: dict[str, str], *, quantize: bool) -> onnx.ModelProto:
    """`pixel_values` [B, H, W, 3] to `image_embeds` [B, E]; `known` is for the file's metadata."""
    config, graph = model.config.vision, Graph(model.vision, quantize=quantize)
    side = config.image_size
    inputs = [helper.make_tensor_value_info(
        "pixel_values", FLOAT, ["batch", side, side, 3], "RGB / 255, less image_mean, by image_std")]
    x = _lite(graph, config) if isinstance(config, EfficientNetConfig) else _transformer(graph, config)  # [B, D]
    return graph.finish(graph.project(x, config), inputs, "image_embeds", model.config.embed_dim, known)


def _lite(graph: Graph, config: EfficientNetConfig) -> str:
    """`EfficientNetLite.pooled`, with the channels in front, where runtimes have their fast convolutions."""
    side = config.image_size
    x = graph.node("Transpose", "pixel_values", perm=(0, 3, 1, 2))
    x = graph.relu6(graph.convolution(x, "stem", lambda kernel: kernel.transpose(3, 2, 0, 1), side=side, stride=2))
    side = -(-side // 2)
    for layer, (_, stride, expansion, d_in, d_out) in enumerate(config.blocks):
        name, before = f"blocks.{layer}", x
        if expansion != 1:
            x = graph.relu6(graph.convolution(x, f"{name}.expand", _pointwise, side=side))
        x = graph.relu6(graph.convolution(x, f"{name}.depthwise", _depthwise, side=side, stride=stride))
        side = -(-side // stride)
        x = graph.convolution(x, f"{name}.narrow", _pointwise, side=side)
        x = graph.node("Add", before, x) if stride == 1 and d_in == d_out else x
    x = graph.relu6(graph.convolution(x, "head", _pointwise, side=side))
    return graph.node("Flatten", graph.node("GlobalAveragePool", x))


def _pointwise(kernel: np.ndarray) -> np.ndarray:
    """A linear layer's kernel as one of a 1 x 1 convolution."""
    return kernel.T[:, :, None, None]


def _depthwise(kernel: np.ndarray) -> np.ndarray:
    return kernel.transpose(2, 0, 1)[:, None]


def _transformer(graph: Graph, config: VisionConfig) -> str:
    """`VisionTransformer.pooled`."""
    side, grid, size = config.image_size, config.grid, config.patch_size
    x = "pixel_values"
    if side % size:  # pixels beyond the last whole patch
        x = graph.node("Slice", x, graph.ints(0, 0), graph.ints(grid * size, grid * size), graph.ints(1, 2))
    # One row of patches at a time: every accelerator can transpose four axes, and nothing here has more
    x = graph.node("Reshape", x, graph.ints(-1, size, grid, 3 * size))
    x = graph.node("Transpose", x, perm=(0, 2, 1, 3))  # [B * grid, grid, size, 3 * size]
    x = graph.node("Reshape", x, graph.ints(-1, grid**2, 3 * size**2))
    x = graph.linear(x, "patch_embedding")  # [B, P, D]
    place = graph.parameter("position_embedding", 0)
    if config.class_token:
        # A row of zeros in front makes room for the class token, which is added with its position
        x = graph.node("Pad", x, graph.ints(0, 1, 0, 0, 0, 0))
        token = graph.tensor("class_embedding", graph.read("class_embedding")[None])
        place = graph.node("Add", place, graph.node("Pad", token, graph.ints(0, 0, grid**2, 0)))
    x = graph.node("Add", x, place)  # [B, 1 + P or P, D]
    x = graph.norm(x, "ln_pre", config.norm_eps) if config.ln_pre else x
    for layer in range(config.layers):
        x = graph.block(x, f"blocks.{layer}", config)
    if config.pooling == "attention":
        x = graph.norm(x, "ln_post", config.norm_eps)
        probe = graph.tensor("probe", graph.read("head.probe")[None, None])
        batch = graph.node("Concat", graph.node("Shape", x, end=1), graph.ints(1, config.width), axis=0)
        pooled = graph.attention(graph.node("Expand", probe, batch), "head.attn", config, among=x)  # [B, 1, D]
        normed = graph.norm(pooled, "head.ln", config.norm_eps)
        return _first(graph, graph.node("Add", pooled, graph.mlp(normed, "head.mlp", config)))
    x = graph.norm(_first(graph, x), "ln_post", config.norm_eps)  # [B, D]
    return graph.node("Tanh", graph.linear(x, "pooler")) if config.pooling == "pooler" else x


def text_encoder(model: HybridCLIP, known: dict[str, str], *, quantize: bool) -> onnx.ModelProto:
    """`input_ids` and `attention_mask` [B, L] to `text_embeds` [B, E]; `known` is for the file's metadata."""
    config, graph = model.config.text, Graph(model.text, quantize=quantize)
    fixed = config.mask == "none"
    shape = ["batch", config.max_length if fixed else "tokens"]
    inputs = [helper.make_tensor_value_info("input_ids", INT, shape,
                                            f"{'exactly' if fixed else 'at most'} {config.max_length} tokens"),
              helper.make_tensor_value_info("attention_mask", INT, shape, "1, and 0 for padding")]
    x = graph.rows("word_embedding", "input_ids")
    if config.rotary is None:
        x = graph.node("Add", x, graph.rows("position_embedding", _positions(graph, config)))
    if config.token_types:
        kind = graph.tensor("token_type_embedding.0", graph.read("token_type_embedding")[0])
        x = graph.node("Add", x, kind)
    x = graph.norm(x, "ln", config.norm_eps) if config.rotary or not config.pre_norm else x  # [B, L, D]
    hidden = None if fixed else _hidden(graph, config)
    if config.rotary is None:
        for layer in range(config.layers):
            x = graph.block(x, f"blocks.{layer}", config, hidden)
    else:
        x = _modern_blocks(graph, config, x, hidden)
    x = graph.norm(x, "ln_final", config.norm_eps) if config.pre_norm else x
    x = _pooled(graph, config, x)  # [B, D]
    x = graph.unit(x) if config.normalize_pooled else x
    return graph.finish(graph.project(x, config), inputs, "text_embeds", model.config.embed_dim, known)


def _pooled(graph: Graph, config: TextConfig, x: str) -> str:
    if config.pooling in ("pooler", "first"):
        x = _first(graph, x)
        return graph.node("Tanh", graph.linear(x, "pooler")) if config.pooling == "pooler" else x
    if config.pooling == "last":
        return graph.node("Gather", x, graph.tensor("int_-1", np.int64(-1)), axis=1)
    if config.pooling == "end":
        ids = "input_ids"
        if config.end_id is not None:
            ids = graph.node("Cast", graph.node("Equal", ids, graph.ints(config.end_id)), to=INT)
        return graph.node("GatherND", x, graph.node("ArgMax", ids, axis=1, keepdims=1), batch_dims=1)
    weight = graph.node("Cast", graph.node("Unsqueeze", "attention_mask", graph.ints(-1)), to=FLOAT)
    total, count = (graph.node("ReduceSum", part, graph.ints(1), keepdims=0)
                    for part in (graph.node("Mul", x, weight), weight))
    return graph.node("Div", total, count)


def _hidden(graph: Graph, config: TextConfig, window: int | None = None) -> str:
    """The mask that is added to the scores [B, 1, 1 or L, L]: 0, or the lowest number where a token may not look."""
    seen = graph.node("Cast", graph.node("Unsqueeze", "attention_mask", graph.ints(1, 2)), to=TensorProto.BOOL)
    if config.mask == "causal" or window is not None:
        place = _range(graph)
        rows, columns = (graph.node("Unsqueeze", place, graph.ints(axis)) for axis in (1, 0))
        if window is None:
            near = graph.node("GreaterOrEqual", rows, columns)
        else:
            far = graph.node("Abs", graph.node("Sub", rows, columns))
            near = graph.node("LessOrEqual", far, graph.tensor(f"window_{window}", np.int64(window)))
        seen = graph.node("And", seen, near)
    return graph.node("Where", seen, graph.floats(0.0), graph.floats(float(np.finfo(np.float32).min)))


def _modern_blocks(graph: Graph, config: TextConfig, x: str, hidden: str) -> str:
    """`modernbert.Block`, one after the other."""
    rotary, size = config.rotary, config.width // config.heads
    near, place, tables = _hidden(graph, config, rotary.window), _range(graph), {}
    for kind, theta in (("global", rotary.global_theta), ("local", rotary.local_theta)):
        angles = np.arange(config.max_length)[:, None, None] * theta ** (-np.arange(size // 2) / (size // 2))
        waves = {name: graph.tensor(f"{name}_{kind}", wave(angles).astype(np.float32))
                 for name, wave in (("cos", np.cos), ("sin", np.sin))}
        tables[kind] = tuple(graph.node("Gather", table, place) for table in waves.values())
    for layer, kind in enumerate(rotary.layers):
        name = f"blocks.{layer}"
        normed = graph.norm(x, f"{name}.ln_1", config.norm_eps) if layer else x
        mask = hidden if kind == "global" else near
        x = graph.node("Add", x, graph.attention(normed, f"{name}.attn", config, mask, turned=tables[kind]))
        x = graph.node("Add", x, graph.gated_mlp(graph.norm(x, f"{name}.ln_2", config.norm_eps), name, config))
    return x


def _range(graph: Graph) -> str:
    """0, 1, 2, … for the tokens [L]."""
    length = graph.node("Shape", "input_ids", start=1, end=2)
    zero, one = (graph.tensor(f"int_{value}", np.int64(value)) for value in (0, 1))
    return graph.node("Range", zero, graph.node("Squeeze", length), one)


def _positions(graph: Graph, config: TextConfig) -> str:
    """`TextEncoder.positions` in the graph. A text that is too long asks for a row that the table does not have."""
    if config.position_offset == 0:
        return _range(graph)
    padding = graph.ints(config.position_offset - 1)
    seen = graph.node("Cast", graph.node("Not", graph.node("Equal", "input_ids", padding)), to=INT)
    counted = graph.node("CumSum", seen, graph.tensor("int_1", np.int64(1)))
    return graph.node("Add", graph.node("Mul", counted, seen), padding)  # [B, L]


def _first(graph: Graph, x: str) -> str:
    """The first token [B, D] of [B, L, D]."""
    return graph.node("Gather", x, graph.tensor("int_0", np.int64(0)), axis=1)
