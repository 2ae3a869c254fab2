"""Parameters on their way from files into a model: each one is used, is new, or is named in an error.

    Source: a folder's weights under the names of `families.key_table`
    Leaf: one array for one parameter; made when it is needed, so that only one is in memory twice
    fill: a model of the config with all its leaves
"""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub.errors import StrictDataclassError

from clipid_utils.model.config import CLIPConfig
from clipid_utils.model.layers import linear
from clipid_utils.model.pretrained import families
from clipid_utils.model.pretrained.families import TRANSFORMS, Key, key_table
from clipid_utils.model.pretrained.hub import fetch_checkpoint
from clipid_utils.model.pretrained.processor_files import read_json
from clipid_utils.model.pretrained.weights import read_weights

SCALE = ":scale"  # after the name of an int8 array: the name of the factors for its numbers
FLOAT32 = ("logit_scale", "logit_bias")  # whatever param_dtype is: bfloat16 would round a scale of 27.23 to 27


def dotted(path: Iterable) -> str:
    return ".".join(map(str, path))


def flatten_params(state: nnx.State) -> dict[str, jax.Array]:
    """Parameters by dotted nnx path, e.g. `vision.blocks.0.attn.q_proj.kernel`."""
    return {dotted(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


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
            known_as, flax = families.canonical(name, sides) if sides else (name, False)
            if known_as in self.names:
                raise ValueError(f"{folder} has {known_as!r} twice, as {self.names[known_as][0]!r} and {name!r}")
            self.names[known_as] = (name, flax)

    def take(self, table: Iterable[Key]) -> dict[str, Leaf]:
        """The table's weights that are here, by nnx path. They are not here any more then."""
        return {key.nnx_path: self._leaf(key) for key in table if key.hf_name in self.names}

    def _leaf(self, key: Key) -> Leaf:
        name, flax = self.names.pop(key.hf_name)
        make, transform = self._dequantized(name), TRANSFORMS[key.transform]
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
                if not families.unused(known_as, config, self.sides)]


def read_config(folder: Path) -> dict:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: name a folder written by save_clip, or by transformers' "
                                "save_pretrained")
    return read_json(file)


@contextlib.contextmanager
def naming(folder: Path) -> Iterator[None]:
    """Adds the config's file to errors about its values."""
    try:
        yield
    except families.ConfigError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    except (TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read ({error}): fetch or save the checkpoint again"
                         ) from error


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
    filled = []
    for path, variable in flat:
        leaf = leaves.pop(dotted(path))  # so that a file's array is freed when it is copied
        kind = jnp.float32 if dotted(path) in FLOAT32 else param_dtype
        filled.append((path, variable.replace(jnp.array(leaf.array(), kind))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def join_towers(
    model_class: type, vision: str | os.PathLike, text: str | os.PathLike, *, embed_dim: int | None = None,
    pooling: str = "pooler", dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs | None = None,
):
    """A model of two pretrained towers; `load.load_towers` describes the options."""
    folders = {"vision": fetch_checkpoint(vision), "text": fetch_checkpoint(text)}
    sources = {side: Source(folder, side) for side, folder in folders.items()}
    with naming(folders["vision"]):
        has_pooler = "vision_model.pooler.dense.weight" in sources["vision"].names
        vision_tower = families.vision_config(read_config(folders["vision"]), has_pooler)
    with naming(folders["text"]):
        text_tower = dataclasses.replace(families.text_config(read_config(folders["text"])), pooling=pooling)
    leaves = sources["vision"].take([Key("visual_projection.weight", "vision.projection.kernel", "transpose")])
    own_dim = next((leaf.array().shape[1] for leaf in leaves.values()), None)
    config = CLIPConfig(vision=vision_tower, text=text_tower, embed_dim=embed_dim or own_dim or CLIPConfig.embed_dim)
    if own_dim != config.embed_dim:
        leaves.clear()
    for side, source in sources.items():
        leaves |= source.take(key for key in key_table(config) if key.hf_name.startswith(f"{side}_model."))
    unknown = [name for source in sources.values() for name in source.unknown(config)]
    new_pooler = pooling == "pooler" and not leaves.keys() & {"text.pooler.kernel", "text.pooler.bias"}
    if new_pooler:
        warnings.warn(f"{folders['text']} has no pooler, like every masked language model. A new one is initialised "
                      "and must be trained; or use pooling='mean'", stacklevel=3)
    leaves = _new_leaves(config, nnx.Rngs(0) if rngs is None else rngs, new_pooler) | leaves
    return fill(model_class, config, leaves, unknown, " or ".join(map(str, folders.values())), dtype, param_dtype)


def _new_leaves(config: CLIPConfig, rngs: nnx.Rngs, pooler: bool) -> dict[str, Leaf]:
    """Initial values of what two towers lack: projections, a pooler and the scale."""
    layers = {"text.projection": linear(config.text.width, config.embed_dim, dtype=None, rngs=rngs, bias=False),
              "vision.projection": linear(config.vision.width, config.embed_dim, dtype=None, rngs=rngs, bias=False)}
    if pooler:
        layers["text.pooler"] = linear(config.text.width, config.text.width, dtype=None, rngs=rngs)
    arrays = {f"{name}.{part}": np.asarray(value) for name, layer in layers.items()
              for part, value in flatten_params(nnx.state(layer)).items()}
    arrays["logit_scale"] = np.float32(config.logit_scale)
    return {path: Leaf(path, lambda array=array: array) for path, array in arrays.items()}
