"""Exports both towers as ONNX files, for use without Python or JAX: in a browser, on a phone, from C++, Java or Rust.

    from clipid_utils.model.pretrained.onnx import export_onnx
    export_onnx(model, "onnx", processor)   # image_encoder.onnx, text_encoder.onnx, and the processor's own files

| file | inputs | output |
|---|---|---|
| `image_encoder.onnx` | `pixel_values` [B, H, W, 3] float32 | `image_embeds` [B, E] float32, unit length |
| `text_encoder.onnx` | `input_ids`, `attention_mask` [B, L] int64 | `text_embeds` [B, E] float32, unit length |

B and L are free in each call, L up to `max_length`. Pictures are NHWC, as this library's processor, a canvas and a
camera give them. Ids are int64, as runtimes' tokenizers give them: `batch["input_ids"].astype("int64")` from ours.

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
    text = model.config.text
    if not isinstance(model.config.vision, VisionConfig) or text.classes or text.normalize_pooled:
        raise ValueError("EfficientNet-Lite, and a text tower with classes or normalize_pooled, cannot be exported")
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
        scale, bias = self.parameter(f"{name}.scale"), self.parameter(f"{name}.bias")
        return self.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)

    def attention(self, x: str, name: str, config: VisionConfig | TextConfig, hidden: str | None) -> str:
        """Self-attention; `hidden` [B, 1, 1, L] is added to the scores: 0, or the lowest number for padding."""
        size, width = config.width // config.heads, self.ints(0, 0, config.width)
        q, k, v = (self.node("Reshape", self.linear(x, f"{name}.{part}_proj"), self.ints(0, 0, config.heads, size))
                   for part in "qkv")  # 0 in a shape keeps the size, so B and L are never computed
        q = self.node("Mul", self.node("Transpose", q, perm=(0, 2, 1, 3)), self.floats(size**-0.5))
        scores = self.node("MatMul", q, self.node("Transpose", k, perm=(0, 2, 3, 1)))  # [B, heads, L, L]
        scores = scores if hidden is None else self.node("Add", scores, hidden)
        weights = self.node("Softmax", scores, axis=-1)
        out = self.node("MatMul", weights, self.node("Transpose", v, perm=(0, 2, 1, 3)))  # [B, heads, L, size]
        out = self.node("Reshape", self.node("Transpose", out, perm=(0, 2, 1, 3)), width)  # [B, L, D]
        return self.linear(out, f"{name}.out_proj")

    def mlp(self, x: str, name: str, config: VisionConfig | TextConfig) -> str:
        x = self.linear(x, f"{name}.fc1")
        if config.activation == "gelu":
            x = self.node("Gelu", x)
        elif config.activation == "quick_gelu":
            x = self.node("Mul", x, self.node("Sigmoid", self.node("Mul", x, self.floats(1.702))))
        else:
            raise ValueError(f"{type(config).__name__}.activation is {config.activation!r}: the ONNX export has gelu "
                             "and quick_gelu only: add it to onnx.py")
        return self.linear(x, f"{name}.fc2")

    def block(self, x: str, name: str, config: VisionConfig | TextConfig, hidden: str | None = None) -> str:
        """CLIP's order, with a norm before each part, or BERT's, with a norm after each sum."""
        if isinstance(config, VisionConfig):
            normed = self.norm(x, f"{name}.ln_1", config.norm_eps)
            x = self.node("Add", x, self.attention(normed, f"{name}.attn", config, hidden))
            normed = self.norm(x, f"{name}.ln_2", config.norm_eps)
            return self.node("Add", x, self.mlp(normed, f"{name}.mlp", config))
        x = self.node("Add", x, self.attention(x, f"{name}.attn", config, hidden))
        x = self.norm(x, f"{name}.ln_1", config.norm_eps)
        x = self.node("Add", x, self.mlp(x, f"{name}.mlp", config))
        return self.norm(x, f"{name}.ln_2", config.norm_eps)

    def finish(self, features: str, inputs: list, output: str, embed_dim: int, known: dict[str, str]):
        """Brings `features` [B, E] to unit length like `clip.normalize`, and makes a model of the whole graph."""
        squares = self.node("ReduceSumSquare", features, self.ints(-1), keepdims=1)
        length = self.node("Sqrt", self.node("Add", squares, self.floats(1e-12)))
        self.node("Div", features, length, output=output)
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
    # One row of patches at a time: every accelerator can transpose four axes, and nothing here has more
    x = graph.node("Reshape", "pixel_values", graph.ints(-1, size, grid, 3 * size))
    x = graph.node("Transpose", x, perm=(0, 2, 1, 3))  # [B * grid, grid, size, 3 * size]
    x = graph.node("Reshape", x, graph.ints(-1, grid**2, 3 * size**2))
    x = graph.linear(x, "patch_embedding")  # [B, P, D]
    # A row of zeros in front makes room for the class token, which is added with its position
    x = graph.node("Pad", x, graph.ints(0, 1, 0, 0, 0, 0))
    place = graph.read("position_embedding").copy()
    place[0] += graph.read("class_embedding")
    x = graph.node("Add", x, graph.tensor("class_and_position_embedding", place))  # [B, 1 + P, D]
    x = graph.norm(x, "ln_pre", config.norm_eps) if config.ln_pre else x
    for layer in range(config.layers):
        x = graph.block(x, f"blocks.{layer}", config)
    x = graph.norm(_first(graph, x), "ln_post", config.norm_eps)  # [B, D]
    x = graph.node("Tanh", graph.linear(x, "pooler")) if config.pooling == "pooler" else x
    return graph.finish(graph.linear(x, "projection"), inputs, "image_embeds", model.config.embed_dim, known)


def _text_encoder(model: HybridCLIP, known: dict[str, str]) -> onnx.ModelProto:
    config, graph = model.config.text, _Graph(model.text)
    shape = ["batch", "tokens"]
    inputs = [helper.make_tensor_value_info("input_ids", INT, shape, f"at most {config.max_length} tokens"),
              helper.make_tensor_value_info("attention_mask", INT, shape, "1, and 0 for padding")]
    words = graph.node("Gather", graph.parameter("word_embedding"), "input_ids")
    places = graph.node("Gather", graph.parameter("position_embedding"), _positions(graph, config))
    kind = graph.tensor("token_type_embedding.0", graph.read("token_type_embedding")[0])
    x = graph.node("Add", graph.node("Add", words, places), kind)
    x = graph.norm(x, "ln", config.norm_eps)  # [B, L, D]
    seen = graph.node("Cast", graph.node("Unsqueeze", "attention_mask", graph.ints(1, 2)), to=TensorProto.BOOL)
    lowest = graph.floats(float(np.finfo(np.float32).min))
    hidden = graph.node("Where", seen, graph.floats(0.0), lowest)  # [B, 1, 1, L]
    for layer in range(config.layers):
        x = graph.block(x, f"blocks.{layer}", config, hidden)
    if config.pooling == "pooler":
        x = graph.node("Tanh", graph.linear(_first(graph, x), "pooler"))  # [B, D]
    else:
        weight = graph.node("Cast", graph.node("Unsqueeze", "attention_mask", graph.ints(-1)), to=FLOAT)
        total, count = (graph.node("ReduceSum", part, graph.ints(1), keepdims=0)
                        for part in (graph.node("Mul", x, weight), weight))
        x = graph.node("Div", total, count)
    return graph.finish(graph.linear(x, "projection"), inputs, "text_embeds", model.config.embed_dim, known)


def _positions(graph: _Graph, config: TextConfig) -> str:
    """`TextEncoder.positions` in the graph. A text that is too long asks for a row that the table does not have."""
    if config.position_offset == 0:
        length = graph.node("Shape", "input_ids", start=1, end=2)
        zero, one = (graph.tensor(f"int_{value}", np.int64(value)) for value in (0, 1))
        return graph.node("Range", zero, graph.node("Squeeze", length), one)  # [L]
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
