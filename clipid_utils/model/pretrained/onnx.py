"""Exports both towers as ONNX files, for use without Python or JAX: in a browser, on a phone, from C++, Java or Rust.

    from clipid_utils.model.pretrained.onnx import export_onnx
    export_onnx(model, "onnx", processor)   # image_encoder.onnx, text_encoder.onnx, and the processor's own files

| file | inputs | output |
|---|---|---|
| `image_encoder.onnx` | `pixel_values` [B, H, W, 3] float32 | `image_embeds` [B, E] float32, unit length |
| `text_encoder.onnx` | `input_ids`, `attention_mask` [B, L] int64 | `text_embeds` [B, E] float32, unit length |

B and L are free in each call, L up to `max_length`; a text tower without a mask (SigLIP's) takes `max_length` tokens.
Pictures are NHWC, as this library's processor, a canvas and a camera give them. Ids are int64, as runtimes' tokenizers
give them: `batch["input_ids"].astype("int64")` from ours.

The graphs are built from the config, node by node, with the `onnx` package: a transformer needs about twenty kinds of
node, all standard in opset 20 (2024), for which runtimes have fast kernels. Tracing the program with jax2onnx (0.13.0)
was tried: the image tower of the mini had 349 nodes, not 138, and was not faster; the text tower failed: its number
of tokens is free. The price: each new part of the towers must be added here. A parameter that no node reads is an
error, and the tests compare every variant of the config with JAX.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx

import clipid_utils
from clipid_utils.files import need
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import TextConfig, VisionConfig
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.model.processor import CLIPProcessor

onnx = need("onnx", "onnx")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto
OPSET = 20  # the first with Gelu
LARGEST_FILE = 1_500_000_000  # bytes of weights; protobuf ends at 2 GiB, and larger weights get a file of their own
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


def export_onnx(model: HybridCLIP, folder: str | os.PathLike, processor: CLIPProcessor) -> tuple[Path, Path]:
    """Writes `image_encoder.onnx` and `text_encoder.onnx` into `folder` and returns their paths, in this order.

    Everything is float32, whatever the model computes in. A tower of more than 1.5 GB has its weights in
    `<name>.onnx.data` beside it; the two belong together. The processor's files (`tokenizer.json`,
    `preprocessor_config.json`) are written too, so the folder has all that a program needs. `logit_scale` in the ONNX
    files' metadata is a logarithm, at most `max_logit_scale`: logits are exp(logit_scale) * image_embeds @
    text_embeds.T, plus `logit_bias` if there is one. Raises FileExistsError if `folder` is a file, ValueError for a
    different model's processor.
    """
    folder = Path(folder).expanduser()
    if not isinstance(model.config.vision, VisionConfig) or model.config.text.classes:
        raise ValueError("EfficientNet-Lite, and a text tower with classes, cannot be exported")
    if processor.image_size != model.config.vision.image_size:
        raise ValueError(f"the processor makes pictures of {processor.image_size} px and the model takes "
                         f"{model.config.vision.image_size}: give export_onnx the model's own processor")
    known = {"logit_scale": str(np.log(np.float64(model.scale())))}
    if model.logit_bias is not None:
        known["logit_bias"] = str(float(model.logit_bias[...]))
    image = _image_encoder(model, known)
    text = _text_encoder(model, known)
    processor.save(folder)
    return _save(image, folder / "image_encoder.onnx"), _save(text, folder / "text_encoder.onnx")


class _Graph:
    """A graph under construction: each method adds the operation of its name and returns the name of the output."""

    def __init__(self, tower: nnx.Module):
        params = flatten_params(nnx.state(tower, nnx.Param))
        self.params = {name: np.asarray(value, np.float32) for name, value in params.items()}
        self.unread = set(self.params)
        self.nodes, self.tensors = [], {}

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes) -> str:
        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{kind}_{len(self.nodes)}", **attributes))
        return output

    def tensor(self, name: str, value: np.ndarray | np.generic) -> str:
        self.tensors[name] = np.asarray(value)
        return name

    def floats(self, value: float) -> str:
        return self.tensor(f"float_{value:.9g}", np.float32(value))

    def ints(self, *values: int) -> str:
        return self.tensor("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def read(self, name: str) -> np.ndarray:
        """A parameter's value, for computing something once here and not in the graph."""
        self.unread.discard(name)
        return self.params[name]

    def parameter(self, name: str) -> str:
        return self.tensor(name, self.read(name))

    def linear(self, x: str, name: str) -> str:
        x = self.node("MatMul", x, self.parameter(f"{name}.kernel"))
        return self.node("Add", x, self.parameter(f"{name}.bias")) if f"{name}.bias" in self.params else x

    def norm(self, x: str, name: str, epsilon: float) -> str:
        params = [self.parameter(f"{name}.{part}") for part in ("scale", "bias") if f"{name}.{part}" in self.params]
        return self.node("LayerNormalization", x, *params, axis=-1, epsilon=epsilon)

    def attention(
        self, x: str, name: str, config: VisionConfig | TextConfig, hidden: str | None = None, *,
        among: str | None = None, turned: tuple[str, str] | None = None,
    ) -> str:
        """Attention of the tokens of `x` to those of `among`, by default their own.

        `hidden` [B, 1, 1 or L, L] is added to the scores: 0, or the lowest number for a hidden token. `turned` has the
        cosines and sines of rotary positions.
        """
        size, width = config.width // config.heads, self.ints(0, 0, config.width)
        q, k, v = (self.node("Reshape", self.linear(tokens, f"{name}.{part}_proj"), self.ints(0, 0, config.heads, size))
                   for part, tokens in (("q", x), ("k", among or x), ("v", among or x)))
        # 0 in a shape keeps the size, so B and L are never computed
        if turned is not None:
            q, k = self.turn(q, *turned), self.turn(k, *turned)
        q = self.node("Mul", self.node("Transpose", q, perm=(0, 2, 1, 3)), self.floats(size**-0.5))
        scores = self.node("MatMul", q, self.node("Transpose", k, perm=(0, 2, 3, 1)))  # [B, heads, L, L]
        scores = scores if hidden is None else self.node("Add", scores, hidden)
        weights = self.node("Softmax", scores, axis=-1)
        out = self.node("MatMul", weights, self.node("Transpose", v, perm=(0, 2, 1, 3)))  # [B, heads, L, size]
        out = self.node("Reshape", self.node("Transpose", out, perm=(0, 2, 1, 3)), width)  # [B, L, D]
        return self.linear(out, f"{name}.out_proj")

    def turn(self, x: str, cos: str, sin: str) -> str:
        """`modernbert.rotated` of [B, L, heads, size]; the tables are [L, 1, size / 2]."""
        first, second = f"Split_{len(self.nodes)}_0", f"Split_{len(self.nodes)}_1"
        self.nodes.append(helper.make_node("Split", [x], [first, second], axis=-1, num_outputs=2))
        real = self.node("Sub", self.node("Mul", first, cos), self.node("Mul", second, sin))
        imaginary = self.node("Add", self.node("Mul", second, cos), self.node("Mul", first, sin))
        return self.node("Concat", real, imaginary, axis=-1)

    def activation(self, x: str, name: str) -> str:
        if name == "quick_gelu":
            return self.node("Mul", x, self.node("Sigmoid", self.node("Mul", x, self.floats(1.702))))
        if name not in ("gelu", "gelu_pytorch_tanh"):
            raise ValueError(f"activation is {name!r}: the ONNX export has gelu, gelu_pytorch_tanh and quick_gelu "
                             "only: add it to onnx.py")
        return self.node("Gelu", x, approximate="none" if name == "gelu" else "tanh")

    def mlp(self, x: str, name: str, config: VisionConfig | TextConfig) -> str:
        return self.linear(self.activation(self.linear(x, f"{name}.fc1"), config.activation), f"{name}.fc2")

    def gated_mlp(self, x: str, name: str, config: TextConfig) -> str:
        value, gate = f"Split_{len(self.nodes)}_value", f"Split_{len(self.nodes)}_gate"
        x = self.linear(x, f"{name}.fc1")
        self.nodes.append(helper.make_node("Split", [x], [value, gate], axis=-1, num_outputs=2))
        return self.linear(self.node("Mul", self.activation(value, config.activation), gate), f"{name}.fc2")

    def project(self, features: str, config: VisionConfig | TextConfig) -> str:
        """`layers.projection`."""
        if config.projection == "none":
            return features
        if config.projection == "mlp":
            features = self.node("Gelu", self.linear(features, "projection.fc1"))
            return self.linear(features, "projection.fc2")
        return self.linear(features, "projection")

    def unit(self, features: str, output: str | None = None) -> str:
        """`ops.normalize`."""
        squares = self.node("ReduceSumSquare", features, self.ints(-1), keepdims=1)
        length = self.node("Sqrt", self.node("Add", squares, self.floats(1e-12)))
        return self.node("Div", features, length, output=output)

    def block(self, x: str, name: str, config: VisionConfig | TextConfig, hidden: str | None = None) -> str:
        """CLIP's order, with a norm before each part, or BERT's, with a norm after each sum."""
        if isinstance(config, VisionConfig) or config.pre_norm:
            normed = self.norm(x, f"{name}.ln_1", config.norm_eps)
            attended = self.attention(normed, f"{name}.attn", config, hidden)
            x = self.node("Add", x, self._scaled(attended, f"{name}.scale_1"))
            normed = self.norm(x, f"{name}.ln_2", config.norm_eps)
            return self.node("Add", x, self._scaled(self.mlp(normed, f"{name}.mlp", config), f"{name}.scale_2"))
        x = self.node("Add", x, self.attention(x, f"{name}.attn", config, hidden))
        x = self.norm(x, f"{name}.ln_1", config.norm_eps)
        x = self.node("Add", x, self.mlp(x, f"{name}.mlp", config))
        return self.norm(x, f"{name}.ln_2", config.norm_eps)

    def _scaled(self, x: str, name: str) -> str:
        """Layer scale, where a block has it."""
        return self.node("Mul", x, self.parameter(name)) if name in self.params else x

    def finish(self, features: str, inputs: list, output: str, embed_dim: int, known: dict[str, str]):
        """Brings `features` [B, E] to unit length like `clip.normalize`, and makes a model of the whole graph."""
        self.unit(features, output)
        if self.unread:
            raise ValueError(f"the {output} graph does not use {sorted(self.unread)}: add these parameters to onnx.py, "
                             "as the towers use them")
        outputs = [helper.make_tensor_value_info(output, FLOAT, ["batch", embed_dim], "unit vectors")]
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            helper.make_graph(self.nodes, output, inputs, outputs), opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),  # runtimes of last year refuse the newest one
            producer_name="clip-indonesian", producer_version=clipid_utils.__version__,
        )
        helper.set_model_props(model, known)
        for name, value in self.tensors.items():  # directly into their place: each make_… above copies its arguments
            model.graph.initializer.add().CopyFrom(numpy_helper.from_array(value, name))
        return model


def _image_encoder(model: HybridCLIP, known: dict[str, str]) -> onnx.ModelProto:
    config, graph = model.config.vision, _Graph(model.vision)
    side, grid, size = config.image_size, config.grid, config.patch_size
    inputs = [helper.make_tensor_value_info(
        "pixel_values", FLOAT, ["batch", side, side, 3], "RGB / 255, less image_mean, by image_std")]
    x = "pixel_values"
    if side % size:  # pixels beyond the last whole patch
        x = graph.node("Slice", x, graph.ints(0, 0), graph.ints(grid * size, grid * size), graph.ints(1, 2))
    # One row of patches at a time: every accelerator can transpose four axes, and nothing here has more
    x = graph.node("Reshape", x, graph.ints(-1, size, grid, 3 * size))
    x = graph.node("Transpose", x, perm=(0, 2, 1, 3))  # [B * grid, grid, size, 3 * size]
    x = graph.node("Reshape", x, graph.ints(-1, grid**2, 3 * size**2))
    x = graph.linear(x, "patch_embedding")  # [B, P, D]
    place = graph.read("position_embedding").copy()
    if config.class_token:
        # A row of zeros in front makes room for the class token, which is added with its position
        x = graph.node("Pad", x, graph.ints(0, 1, 0, 0, 0, 0))
        place[0] += graph.read("class_embedding")
    x = graph.node("Add", x, graph.tensor("class_and_position_embedding", place))  # [B, 1 + P or P, D]
    x = graph.norm(x, "ln_pre", config.norm_eps) if config.ln_pre else x
    for layer in range(config.layers):
        x = graph.block(x, f"blocks.{layer}", config)
    if config.pooling == "attention":
        x = graph.norm(x, "ln_post", config.norm_eps)
        probe = graph.tensor("probe", graph.read("head.probe")[None, None])
        batch = graph.node("Concat", graph.node("Shape", x, end=1), graph.ints(1, config.width), axis=0)
        pooled = graph.attention(graph.node("Expand", probe, batch), "head.attn", config, among=x)  # [B, 1, D]
        normed = graph.norm(pooled, "head.ln", config.norm_eps)
        x = _first(graph, graph.node("Add", pooled, graph.mlp(normed, "head.mlp", config)))
    else:
        x = graph.norm(_first(graph, x), "ln_post", config.norm_eps)  # [B, D]
        x = graph.node("Tanh", graph.linear(x, "pooler")) if config.pooling == "pooler" else x
    return graph.finish(graph.project(x, config), inputs, "image_embeds", model.config.embed_dim, known)


def _text_encoder(model: HybridCLIP, known: dict[str, str]) -> onnx.ModelProto:
    config, graph = model.config.text, _Graph(model.text)
    fixed = config.mask == "none"
    shape = ["batch", config.max_length if fixed else "tokens"]
    inputs = [helper.make_tensor_value_info("input_ids", INT, shape,
                                            f"{'exactly' if fixed else 'at most'} {config.max_length} tokens"),
              helper.make_tensor_value_info("attention_mask", INT, shape, "1, and 0 for padding")]
    x = graph.node("Gather", graph.parameter("word_embedding"), "input_ids")
    if config.rotary is None:
        places = graph.node("Gather", graph.parameter("position_embedding"), _positions(graph, config))
        x = graph.node("Add", x, places)
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


def _pooled(graph: _Graph, config: TextConfig, x: str) -> str:
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


def _hidden(graph: _Graph, config: TextConfig, window: int | None = None) -> str:
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


def _modern_blocks(graph: _Graph, config: TextConfig, x: str, hidden: str) -> str:
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


def _range(graph: _Graph) -> str:
    """0, 1, 2, … for the tokens [L]."""
    length = graph.node("Shape", "input_ids", start=1, end=2)
    zero, one = (graph.tensor(f"int_{value}", np.int64(value)) for value in (0, 1))
    return graph.node("Range", zero, graph.node("Squeeze", length), one)


def _positions(graph: _Graph, config: TextConfig) -> str:
    """`TextEncoder.positions` in the graph. A text that is too long asks for a row that the table does not have."""
    if config.position_offset == 0:
        return _range(graph)
    padding = graph.ints(config.position_offset - 1)
    seen = graph.node("Cast", graph.node("Not", graph.node("Equal", "input_ids", padding)), to=INT)
    counted = graph.node("CumSum", seen, graph.tensor("int_1", np.int64(1)))
    return graph.node("Add", graph.node("Mul", counted, seen), padding)  # [B, L]


def _first(graph: _Graph, x: str) -> str:
    """The first token [B, D] of [B, L, D]."""
    return graph.node("Gather", x, graph.tensor("int_0", np.int64(0)), axis=1)


def _save(model: onnx.ModelProto, path: Path) -> Path:
    """Writes the file, complete before it replaces an older one; large weights go beside it into `<name>.onnx.data`."""
    data = path.with_name(path.name + ".data")
    large = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= 1024]
    outside = sum(len(tensor.raw_data) for tensor in large) > LARGEST_FILE
    for tensor in large if outside else ():  # save_model's own option would look for the file in the working folder
        onnx.external_data_helper.set_external_data(tensor, data.name)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as partial:
        onnx.save_model(model, Path(partial) / path.name)
        if outside:
            (Path(partial) / data.name).replace(data)
        (Path(partial) / path.name).replace(path)
    if not outside:
        data.unlink(missing_ok=True)
    return path
