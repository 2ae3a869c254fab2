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

FLOAT32 = ("logit_scale", "logit_bias")  # whatever param_dtype is: bfloat16 would round a scale of 27.23 to 27


def dotted(path: Iterable) -> str:
    return ".".join(map(str, path))


def flatten_params(state: nnx.State) -> dict[str, jax.Array]:
    """Parameters by dotted nnx path, e.g. `vision.blocks.0.attn.q_proj.kernel`."""
    return {dotted(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


class Leaf(NamedTuple):
    """An array for a parameter, under the name that it has in its file; new arrays have no source."""

    name: str
    array: Callable[[], np.ndarray]
    source: "Source | None" = None


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

    def leaves(self, table: Iterable[Key]) -> dict[str, Leaf]:
        """The table's weights that are here, by nnx path."""
        return {key.nnx_path: self._leaf(key) for key in table if key.hf_name in self.names}

    def _leaf(self, key: Key) -> Leaf:
        name, flax = self.names[key.hf_name]
        change = TRANSFORMS[key.transform].from_flax if flax else TRANSFORMS[key.transform].from_torch

        def array() -> np.ndarray:
            try:
                return change(self.weights[name])
            except (IndexError, ValueError):  # the array has a different rank, which `fill` reports
                return self.weights[name]

        return Leaf(name, array, self)

    def unknown(self, leaves: dict[str, Leaf], config: CLIPConfig) -> list[str]:
        """The file's keys that are neither in a leaf nor listed as unused."""
        used = {leaf.name for leaf in leaves.values() if leaf.source is self}
        return [name for known_as, (name, _) in self.names.items()
                if name not in used and not (self.sides and families.unused(known_as, config, self.sides))]


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
         param_dtype):
    """A model with these parameters. Raises ValueError that lists missing and unknown keys and wrong shapes."""
    graph, state = nnx.split(nnx.eval_shape(lambda: model_class(config, dtype=dtype, rngs=nnx.Rngs(0))))
    flat = nnx.to_flat_state(state)
    wanted = {dotted(path): leaf.shape for path, leaf in flat}
    native = any(path == leaf.name for path, leaf in leaves.items() if leaf.source and path != "logit_scale")
    names = {path: path for path in wanted} if native else {key.nnx_path: key.hf_name for key in key_table(config)}
    missing = sorted(names[path] for path in wanted.keys() - leaves.keys())
    unknown = sorted({*unknown, *(leaves[path].name for path in leaves.keys() - wanted.keys())})
    shapes = {path: leaves[path].array().shape for path in sorted(wanted.keys() & leaves.keys())}
    wrong = [f"{leaves[path].name} {shape} instead of {wanted[path]}" for path, shape in shapes.items()
             if shape != wanted[path]]
    if missing or unknown or wrong:
        raise ValueError(f"the weights in {where} do not fit config.json: missing {missing}, unknown "
                         f"{unknown}, wrong shape {wrong}")
    filled = []
    for path, variable in flat:
        leaf = leaves.pop(dotted(path))
        kind = jnp.float32 if dotted(path) in FLOAT32 else param_dtype
        filled.append((path, variable.replace(jnp.array(leaf.array(), kind))))
        if leaf.source:
            del leaf.source.weights[leaf.name]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def join_towers(
    model_class: type, vision: str | os.PathLike, text: str | os.PathLike, *, embed_dim: int | None = None,
    pooling: str = "pooler", dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs | None = None,
):
    """A model of two pretrained towers; `load.load_towers` describes the options."""
    folders = [fetch_checkpoint(vision), fetch_checkpoint(text)]
    sources = [Source(folder, side) for folder, side in zip(folders, ("vision", "text"), strict=True)]
    with naming(folders[0]):
        has_pooler = "vision_model.pooler.dense.weight" in sources[0].names
        vision_tower = families.vision_config(read_config(folders[0]), has_pooler)
    with naming(folders[1]):
        text_tower = dataclasses.replace(families.text_config(read_config(folders[1])), pooling=pooling)
    learned = sources[0].leaves([Key("visual_projection.weight", "vision.projection.kernel", "transpose")])
    own_dim = next((leaf.array().shape[1] for leaf in learned.values()), None)
    config = CLIPConfig(vision=vision_tower, text=text_tower, embed_dim=embed_dim or own_dim or CLIPConfig.embed_dim)
    table = [key for key in key_table(config) if key.hf_name.startswith(("vision_model.", "text_model."))]
    leaves = {path: leaf for source in sources for path, leaf in source.leaves(table).items()} | learned
    unknown = [name for source in sources for name in source.unknown(leaves, config)]
    if own_dim != config.embed_dim:
        leaves.pop("vision.projection.kernel", None)
    new_pooler = pooling == "pooler" and not leaves.keys() & {"text.pooler.kernel", "text.pooler.bias"}
    new = _new_leaves(config, nnx.Rngs(0) if rngs is None else rngs, new_pooler)
    if new_pooler:
        warnings.warn(f"{folders[1]} has no pooler, like every masked language model. A new one is initialised and "
                      "must be trained; or use pooling='mean'", stacklevel=3)
    return fill(model_class, config, new | leaves, unknown, f"{folders[0]} or {folders[1]}", dtype, param_dtype)


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
