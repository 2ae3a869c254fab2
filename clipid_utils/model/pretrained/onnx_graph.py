"""The builder of ONNX graphs: a method for each operation and layer that the towers are made of.

`onnx_towers` puts the towers together, and `onnx` writes the files.
"""

from collections.abc import Callable

import numpy as np
from flax import nnx

import clipid_utils
from clipid_utils.files import need
from clipid_utils.model.config import EfficientNetConfig, TextConfig, VisionConfig
from clipid_utils.model.efficientnet import same_padding
from clipid_utils.model.pretrained.parameters import SCALE, flatten_params, quantized

onnx = need("onnx", "onnx")
helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto
OPSET = 20  # the first with Gelu
FLOAT, INT = TensorProto.FLOAT, TensorProto.INT64


class Graph:
    """A graph under construction: each method adds the operation of its name and returns the name of the output.

    `params` has the tower's parameters by name. With `quantize` matrices are int8, and have their scales as `save_clip`
    stores them.
    """

    def __init__(self, tower: nnx.Module, *, quantize: bool = False):
        params = flatten_params(nnx.state(tower, nnx.Param))
        self.params = {name: np.asarray(value, np.float32) for name, value in params.items()}
        self.unread = set(self.params)
        self.params = quantized(self.params) if quantize else self.params
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
        """A parameter's value in float32, for computing something once here and not in the graph."""
        self.unread.discard(name)
        return self.params[name] * self.params.get(name + SCALE, np.float32(1))

    def parameter(self, name: str, axis: int = -1, arranged: Callable[[np.ndarray], np.ndarray] = np.asarray) -> str:
        """A parameter, `arranged` as its node needs it. If it is int8, it has a scale for each place along `axis`."""
        self.unread.discard(name)
        value, scale = self.tensor(name, arranged(self.params[name])), self.params.get(name + SCALE)
        if scale is None:
            return value
        return self.node("DequantizeLinear", value, self.tensor(name + SCALE, scale.ravel()), axis=axis)

    def rows(self, name: str, ids: str) -> str:
        """Rows of a table. Of an int8 table, only these rows become float32.

        DequantizeLinear has no scale for each row of more than one axis, so a product takes its place.
        """
        self.unread.discard(name)
        rows = self.node("Gather", self.tensor(name, self.params[name]), ids)
        if name + SCALE not in self.params:
            return rows
        scales = self.node("Gather", self.tensor(name + SCALE, self.params[name + SCALE]), ids)
        return self.node("Mul", self.node("Cast", rows, to=FLOAT), scales)

    def linear(self, x: str, name: str) -> str:
        x = self.node("MatMul", x, self.parameter(f"{name}.kernel"))
        return self.node("Add", x, self.parameter(f"{name}.bias")) if f"{name}.bias" in self.params else x

    def convolution(
        self, x: str, name: str, arranged: Callable[[np.ndarray], np.ndarray], *, side: int, stride: int = 1
    ) -> str:
        """A convolution of pictures [B, C, side, side] with the padding of TensorFlow's SAME.

        `arranged` makes a kernel [outputs, inputs, K, K] of the parameter; each channel is on its own if inputs is 1.
        """
        outputs, inputs, size, _ = arranged(self.params[f"{name}.kernel"]).shape
        kernel = self.parameter(f"{name}.kernel", 0, arranged)
        before, after = same_padding(side, size, stride)
        return self.node("Conv", x, kernel, self.parameter(f"{name}.bias"), strides=(stride, stride),
                         pads=(before, before, after, after), group=outputs if inputs == 1 else 1)

    def relu6(self, x: str) -> str:
        return self.node("Clip", x, self.floats(0.0), self.floats(6.0))

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
                             "only: add it to onnx_graph.py")
        return self.node("Gelu", x, approximate="none" if name == "gelu" else "tanh")

    def mlp(self, x: str, name: str, config: VisionConfig | TextConfig) -> str:
        return self.linear(self.activation(self.linear(x, f"{name}.fc1"), config.activation), f"{name}.fc2")

    def gated_mlp(self, x: str, name: str, config: TextConfig) -> str:
        value, gate = f"Split_{len(self.nodes)}_value", f"Split_{len(self.nodes)}_gate"
        x = self.linear(x, f"{name}.fc1")
        self.nodes.append(helper.make_node("Split", [x], [value, gate], axis=-1, num_outputs=2))
        return self.linear(self.node("Mul", self.activation(value, config.activation), gate), f"{name}.fc2")

    def project(self, features: str, config: EfficientNetConfig | VisionConfig | TextConfig) -> str:
        """`layers.projection`."""
        if getattr(config, "classes", 0):
            logits = self.node("Mul", self.linear(features, "projection.classifier"), self.floats(config.class_scale))
            vectors = self.parameter("projection.class_vectors", 0)
            return self.node("MatMul", self.node("Softmax", logits, axis=-1), vectors)
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
            raise ValueError(f"the {output} graph does not use {sorted(self.unread)}: add these parameters to "
                             "onnx_towers.py, as the towers use them")
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
