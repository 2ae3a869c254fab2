"""Brings parameters from files into a model: each one is used, is new, or is named in an error.

    Source: a folder's weights under the names of `keys.key_table`
    Leaf: one array for one parameter; made when it is needed, so that only one is in memory twice
    fill: a model of the config with all its leaves
    quantized: matrices as int8 numbers and scales, as checkpoints and ONNX files store them
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub.errors import StrictDataclassError

from clipid_utils.model.config import CLIPConfig
from clipid_utils.model.pretrained import families, keys
from clipid_utils.model.pretrained.keys import TRANSFORMS, Key, key_table
from clipid_utils.model.pretrained.processor_files import read_json
from clipid_utils.model.pretrained.weights import read_weights

SCALE = ":scale"  # after the name of an int8 array: the name of the factors for its numbers
FLOAT32 = ("logit_scale", "logit_bias")  # whatever param_dtype is: bfloat16 would round a scale of 27.23 to 27


def dotted(path: Iterable) -> str:
    return ".".join(map(str, path))


def flatten_params(state: nnx.State) -> dict[str, jax.Array]:
    """Parameters by dotted nnx path, e.g. `vision.blocks.0.attn.q_proj.kernel`."""
    return {dotted(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def quantized(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Matrices as int8, each followed by its scales (max / 127, under its name and SCALE); other arrays as they are.

    A layer's kernel has a scale for each output, its last axis, and a table for each row: token, position or class.
    """
    parts = {}
    for name, value in params.items():
        if value.ndim < 2:
            parts[name] = value
            continue
        others = tuple(range(value.ndim - 1)) if name.endswith(".kernel") else -1
        scale = np.maximum(np.abs(value).max(axis=others, keepdims=True), np.float32(1e-30)) / np.float32(127)
        parts |= {name: np.round(value / scale).astype(np.int8), name + SCALE: scale}
    return parts


class Leaf(NamedTuple):
    """An array for a parameter, under the name that it has in its file."""

    name: str
    array: Callable[[], np.ndarray]


class OneKey(nnx.Rngs):
    """Gives each parameter the same key. For shapes alone that is enough; counting keys takes seconds under a trace."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


class Source:
    """A folder's weights under the names of `key_table`; without `sides`, under their own names."""

    def __init__(self, folder: Path, *sides: str):
        self.folder, self.sides, self.weights = folder, sides, read_weights(folder)
        self.names: dict[str, tuple[str, bool]] = {}  # by the table's name: the file's, and whether Flax wrote it
        for name in self.weights:
            known_as, flax = keys.canonical(name, sides) if sides else (name, False)
            if known_as in self.names:
                raise ValueError(f"{folder} has {known_as!r} twice, as {self.names[known_as][0]!r} and {name!r}")
            self.names[known_as] = (name, flax)

    def take(self, table: Iterable[Key]) -> dict[str, Leaf]:
        """Takes the table's weights that are here out of this source, by nnx path."""
        found = [key for key in table if key.hf_name in self.names]
        stored = {name: self.names.pop(name) for name in dict.fromkeys(key.hf_name for key in found)}
        made = {name: self._dequantized(stored[name][0]) for name in stored}  # one array can have several parameters
        return {key.nnx_path: self._leaf(*stored[key.hf_name], made[key.hf_name], TRANSFORMS[key.transform])
                for key in found}

    def _leaf(self, name: str, flax: bool, make: Callable[[], np.ndarray], transform: keys.Transform) -> Leaf:
        change = transform.from_flax if flax else transform.from_torch

        def array() -> np.ndarray:
            try:
                return change(make())
            except (IndexError, ValueError):  # the array has a different rank, which `fill` reports
                return make()

        return Leaf(name, array)

    def _dequantized(self, name: str) -> Callable[[], np.ndarray]:
        """Makes the array, multiplied by its scales if it is int8. Raises ValueError if they do not fit it."""
        make, stored = self.weights.data.pop(name), self.names.pop(name + SCALE, None)
        scale = None if stored is None else self.weights.data.pop(stored[0])
        if scale is None and make().dtype != np.int8:
            return make
        shape, fits = make().shape, scale is not None and scale().ndim == make().ndim
        if not fits or any(n not in (1, m) for n, m in zip(scale().shape, shape, strict=True)):
            found = "missing" if scale is None else f"of shape {scale().shape}"
            raise ValueError(f"{self.folder} has {name!r} of shape {shape} as int8, and {name + SCALE!r} is {found}: "
                             "save or fetch the checkpoint again")
        return lambda: make().astype(np.float32) * scale()

    def unknown(self, config: CLIPConfig) -> list[str]:
        """The file's keys that were not taken and are not listed as unused."""
        return [name for known_as, (name, _) in self.names.items()
                if not keys.unused(known_as, config, self.sides)]


def read_config(folder: Path, name: str = "config.json") -> dict:
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: name a folder written by save_clip, or by transformers' "
                                "save_pretrained")
    return read_json(file)


@contextlib.contextmanager
def naming(folder: Path, name: str = "config.json") -> Iterator[None]:
    """Adds the config's file to errors about its values."""
    try:
        yield
    except families.ConfigError as error:
        raise ValueError(f"{folder / name}: {error}") from error
    except (TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{folder / name} cannot be read ({error}): fetch or save the checkpoint again"
                         ) from error


def _copied(array: np.ndarray | np.generic, dtype) -> jax.Array:
    """A copy on the device. `jnp.array` would make two on a CPU, as its buffers begin at a multiple of 64 bytes."""
    size = array.size * np.dtype(dtype).itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + size].view(dtype).reshape(array.shape)
    np.copyto(copy, array, casting="unsafe")
    return jax.device_put(copy, may_alias=True)  # nothing else has this buffer


def fill(model_class: type, config: CLIPConfig, leaves: dict[str, Leaf], unknown: list[str], where: Path | str, dtype,
         param_dtype, *, native: bool = False):
    """A model with these parameters; `leaves` is emptied. `native` weights are named by their nnx paths.

    Raises ValueError that lists missing and unknown keys and wrong shapes.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: model_class(config, dtype=dtype, rngs=OneKey(0))))
    flat = nnx.to_flat_state(state)
    wanted = {dotted(path): leaf.shape for path, leaf in flat}
    names = {} if native else {key.nnx_path: key.hf_name for key in key_table(config)}
    missing = sorted(names.get(path, path) for path in wanted.keys() - leaves.keys())
    unknown = sorted({*unknown, *(leaves[path].name for path in leaves.keys() - wanted.keys())})
    shapes = {path: leaves[path].array().shape for path in sorted(wanted.keys() & leaves.keys())}
    wrong = [f"{leaves[path].name} {shape} instead of {wanted[path]}" for path, shape in shapes.items()
             if shape != wanted[path]]
    if missing or unknown or wrong:
        raise ValueError(f"the weights in {where} do not fit config.json: missing {missing}, unknown "
                         f"{unknown}, wrong shape {wrong}")
    filled = {}
    # The largest first: an array is in memory twice while it is copied, and then there is little else in memory
    for path, variable in sorted(flat, key=lambda item: -math.prod(item[1].shape)):
        leaf = leaves.pop(dotted(path))  # so that a file's array is freed when it is copied
        kind = jnp.float32 if dotted(path) in FLOAT32 else param_dtype
        filled[path] = variable.replace(_copied(leaf.array(), kind))
    return nnx.merge(graph, nnx.from_flat_state([(path, filled[path]) for path, _ in flat]))


def with_scale(config: CLIPConfig, leaves: dict[str, Leaf], *, linear_scale: bool) -> CLIPConfig:
    """The config with a limit that the stored scale does not pass.

    The scale of 2021's hybrid-clip is linear, and a twentieth of the one that it used.
    """
    if "logit_scale" not in leaves or leaves["logit_scale"].array().size != 1:
        return config  # `fill` reports it
    name, array = leaves["logit_scale"]
    value = array().reshape(())
    if linear_scale:
        value = np.log(20 * np.asarray(value, np.float64)).astype(np.float32)
        config = dataclasses.replace(config, logit_scale=float(value))
    leaves["logit_scale"] = Leaf(name, lambda: value)
    above = float(value) > config.max_logit_scale + 1e-6  # ln 100 itself may be rounded up
    return dataclasses.replace(config, max_logit_scale=float(value)) if above else config
