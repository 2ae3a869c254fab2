"""The image tower of the model `photo`: EfficientNet-Lite with its classifier.

EfficientNet (Tan & Le 2019) is a stack of inverted bottlenecks (Sandler et al. 2018). Lite has ReLU6 and no squeeze and
excitation. Its batch norms are folded into the convolutions when the weights are read (`pretrained.packaged`).

Letters in shapes: B batch, H height, W width, C channels, P cells of the last feature map, D width, E embedding.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from clipid_utils.model import layers
from clipid_utils.model.config import EfficientNetConfig
from clipid_utils.model.layers import Arrays


class Depthwise(nnx.Module):
    """A convolution of each channel on its own, as a sum of shifted pictures.

    XLA's grouped convolution is 4 to 20 times slower on a CPU (`benchmarks/bench_encode.py` measures the tower).
    """

    def __init__(self, kernel: int, stride: int, channels: int, *, dtype, rngs: nnx.Rngs):
        self.stride, self.dtype = stride, dtype
        self.kernel = nnx.Param(nnx.initializers.normal(1 / kernel)(rngs.params(), (kernel, kernel, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        kernel, size, step = self.kernel[...].astype(self.dtype), self.kernel.shape[0], self.stride
        x = jnp.pad(x, ((0, 0), *(same_padding(side, size, step) for side in x.shape[1:3]), (0, 0)))
        rows, columns = ((side - size) // step + 1 for side in x.shape[1:3])
        shifted = (
            x[:, i : i + step * rows : step, j : j + step * columns : step] * kernel[i, j]
            for i in range(size) for j in range(size)
        )  # fmt: skip
        return sum(shifted) + self.bias[...].astype(self.dtype)


def same_padding(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, so that the output has ceil(side / stride) cells, as TensorFlow's SAME."""
    total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    return total // 2, total - total // 2


class InvertedBottleneck(nnx.Module):
    """Widens, filters channel by channel, and narrows again; adds the input if the shape is the same."""

    def __init__(self, kernel: int, stride: int, expansion: int, d_in: int, d_out: int, *, dtype, rngs: nnx.Rngs):
        inner, self.skip = expansion * d_in, stride == 1 and d_in == d_out
        self.expand = None if expansion == 1 else layers.linear(d_in, inner, dtype=dtype, rngs=rngs)
        self.depthwise = Depthwise(kernel, stride, inner, dtype=dtype, rngs=rngs)
        self.narrow = layers.linear(inner, d_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"], survive: Array | None = None) -> Float[Array, "B h w M"]:
        """`survive` scales the branch beside the sum, as in a transformer's block."""
        y = x if self.expand is None else jax.nn.relu6(self.expand(x))
        y = self.narrow(jax.nn.relu6(self.depthwise(y)))
        if not self.skip:
            return y
        return x + (y if survive is None else survive[0][..., None] * y)


class EfficientNetLite(nnx.Module):
    """Pixels in, projected features out (not of unit length)."""

    def __init__(self, config: EfficientNetConfig, embed_dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.stem = nnx.Conv(3, config.stem, (3, 3), strides=2, padding="SAME", dtype=dtype, rngs=rngs)
        self.blocks = layers.module_list(
            [InvertedBottleneck(*block, dtype=dtype, rngs=rngs) for block in config.blocks])
        self.head = layers.linear(config.blocks[-1][-1], config.width, dtype=dtype, rngs=rngs)
        self.projection = layers.projection(config, embed_dim, dtype=dtype, rngs=rngs)

    def feature_map(
        self, pixel_values: Float[Arrays, "B H W 3"], *, keys: Key[Array, " B"] | None = None, drop_path: float = 0.0,
        keep_patches: int | None = None, remat: bool = False,
    ) -> Float[Array, "B h w D"]:
        """The last feature map; the options are those of the vision transformer's `tokens`.

        Raises ValueError for `keep_patches`, which a convolution cannot leave out, and for pictures of a wrong size.
        """
        if keep_patches is not None:
            raise ValueError("keep_patches needs a vision transformer; EfficientNet computes the whole picture")
        side = self.config.image_size
        if pixel_values.shape[1:] != (side, side, 3):
            raise ValueError(f"pixel_values have shape {pixel_values.shape}; the model expects [B, {side}, {side}, 3]: "
                             "use the checkpoint's own processor")
        x = jax.nn.relu6(self.stem(jnp.asarray(pixel_values, self.dtype)))
        x = layers.through_blocks(self.blocks, x, (), keys, drop_path, remat)
        return jax.nn.relu6(self.head(x))

    def patches(self, pixel_values: Float[Arrays, "B H W 3"]) -> Float[Array, "B P D"]:
        """One vector for each cell of the last feature map, row by row, before the projection."""
        x = self.feature_map(pixel_values)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def pooled(self, pixel_values: Float[Arrays, "B H W 3"], **training) -> Float[Array, "B D"]:
        """One vector for each picture, before the projection: the mean over the cells."""
        return self.feature_map(pixel_values, **training).mean(axis=(1, 2), dtype=jnp.float32).astype(self.dtype)

    def __call__(self, pixel_values: Float[Arrays, "B H W 3"], **training) -> Float[Array, "B E"]:
        return self.projection(self.pooled(pixel_values, **training))
