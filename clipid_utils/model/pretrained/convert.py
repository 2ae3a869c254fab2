"""The way in and out of the model: `load_clip`, `save_clip`, and the two towers of `HybridCLIP.from_towers`.

A checkpoint folder of this project holds `config.json`, `model.safetensors` (float32, one key a parameter, named by its
nnx path with dots), the tokenizer and the image processor's config. What transformers and this project's ancestor wrote
is read through the table of `towers.py`.
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
from safetensors import SafetensorError
from safetensors.numpy import save_file

from clipid_utils.model.clip import HybridCLIP, linear
from clipid_utils.model.config import CLIPConfig
from clipid_utils.model.pretrained.families import (
    TRANSFORMS,
    ConfigError,
    Key,
    canonical,
    clip_config,
    key_table,
    resize_positions,
    text_config,
    to_hf_config,
    unused,
    vision_config,
)
from clipid_utils.model.pretrained.hub import fetch_checkpoint
from clipid_utils.model.pretrained.processor_files import MODEL_TYPE, read_json, write_json
from clipid_utils.model.pretrained.weights import read_weights
from clipid_utils.model.processor import CLIPProcessor

WHOLE_MODELS = ("vision-text-dual-encoder", "hybrid-clip")


def flatten_params(state: nnx.State) -> dict[str, jax.Array]:
    """Parameters by dotted nnx path, e.g. `vision.blocks.0.attn.q_proj.kernel`."""
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


# --- Out --------------------------------------------------------------------------------------------------------------


def save_clip(model: HybridCLIP, processor: CLIPProcessor, path: str | os.PathLike, format: str = "native") -> None:
    """Writes a checkpoint folder; each file replaces an older one only once it is whole on disk.

    `format` is "native", or "vision-text-dual-encoder" for transformers' VisionTextDualEncoderModel and -Processor,
    whose config.json, weights and processor files are then written instead. ValueError for another format and for a
    model that VisionTextDualEncoderModel cannot hold, before anything is written; OSError where the disk takes no more.
    """
    params = flatten_params(nnx.state(model, nnx.Param))
    if format == "native":
        config = {"model_type": MODEL_TYPE, **model.config.to_dict()}
        tensors = {key: np.asarray(value, np.float32) for key, value in params.items()}
    elif format == "vision-text-dual-encoder":
        config = to_hf_config(model.config)
        tensors = _to_torch(params, model.config)
    else:
        raise ValueError(f"format {format!r} is not known: there are 'native' and 'vision-text-dual-encoder'")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.safetensors.partial"
    partial.touch()
    mode = partial.stat().st_mode
    try:
        save_file(tensors, partial, metadata={"format": "flax" if format == "native" else "pt"})
    except SafetensorError as error:
        partial.unlink()
        raise OSError(f"{folder}: the weights were not written ({error}); what was there is as it was. Make room on "
                      "the disk and the folder writable, and save again") from error
    partial.chmod(mode)  # safetensors writes for the owner alone
    partial.replace(folder / "model.safetensors")
    write_json(folder / "config.json", config)
    processor.save(folder)


def _to_torch(params: dict[str, jax.Array], config: CLIPConfig) -> dict[str, np.ndarray]:
    """The parameters as VisionTextDualEncoderModel names and lays them; it has no limit for logit_scale.

    CLIP's image tower has its name twice, as transformers 4 wants it and transformers 5 takes it.
    """
    limited = params | {"logit_scale": jnp.minimum(params["logit_scale"], config.max_logit_scale)}
    arrays = {key: TRANSFORMS[key.transform].to_torch(np.asarray(limited[key.nnx_path]), config.vision)
              for key in key_table(config)}
    start = "vision_model.vision_model." if config.vision.ln_pre else "vision_model."
    return {key.hf_name.replace("vision_model.", start): np.asarray(array, np.float32, order="C")
            for key, array in arrays.items()}


# --- In ---------------------------------------------------------------------------------------------------------------


def load_clip(
    path: str | os.PathLike, *, revision: str | None = None, tokenizer: str | os.PathLike | None = None,
    dtype=jnp.float32, param_dtype=jnp.float32,
) -> tuple[HybridCLIP, CLIPProcessor]:
    """The model and processor of a checkpoint: a folder or an id on the Hugging Face hub, there of a `revision`.

    Read are this project's own checkpoints, transformers' VisionTextDualEncoderModel of the towers that `from_towers`
    names, and the ancestor's hybrid-clip (2021). `tokenizer` is the folder or id to take the tokenizer from where the
    checkpoint has none, as the ancestor's. `dtype` is what the model computes in, `param_dtype` what its weights are
    kept in: float32, or bfloat16 for half the memory.

    Raises FileNotFoundError for what is not a checkpoint and ValueError for one whose config cannot be followed or
    whose keys or shapes do not fit it, with their names.
    """
    folder = fetch_checkpoint(path, revision=revision)
    values = _read_config(folder)
    kind = values.pop("model_type", None)
    with _naming(folder):
        if kind == MODEL_TYPE:
            source, config = _Source(folder), CLIPConfig.from_dict(values)
            leaves = source.leaves(Key(name, name, "same") for name in _shapes(config))
        elif kind in WHOLE_MODELS:
            source = _Source(folder, "vision", "text")
            config = clip_config(values, source.names.keys(), own_positions=kind != "hybrid-clip")
            leaves = source.leaves(key_table(config))
            config = _with_scale(config, leaves, linear_scale=kind == "hybrid-clip")
        else:
            raise ConfigError(f"model_type is not {MODEL_TYPE!r} or one of {', '.join(WHOLE_MODELS)}, but {kind!r}; "
                              "one tower alone is for HybridCLIP.from_towers")
    model = _filled(config, leaves, source.unknown(leaves, config), folder, dtype, param_dtype)
    text_folder = None if tokenizer is None else fetch_checkpoint(tokenizer, weights=False)
    # what `save_clip` wrote without a tokenizer has neither of its files; one of the two alone is damage
    needed = tokenizer is not None or kind == MODEL_TYPE and (folder / "tokenizer_config.json").is_file()
    processor = CLIPProcessor.load(folder, text_folder, needs_tokenizer=needed)
    processor.max_length = min(processor.max_length, model.config.text.max_length)  # another's tokenizer may hold more
    if processor.tokenizer and processor.tokenizer.get_vocab_size() > model.config.text.vocab_size:
        message = (f"the tokenizer in {text_folder or folder} has {processor.tokenizer.get_vocab_size()} tokens, and "
                   f"the text tower {model.config.text.vocab_size}: name its own, load_clip(…, tokenizer=…)")
        if text_folder is not None:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    return model, processor


def join_towers(
    vision: str | os.PathLike, text: str | os.PathLike, *, embed_dim: int | None, pooling: str,
    image_size: int | None, vision_revision: str | None, text_revision: str | None, dtype, param_dtype, rngs: nnx.Rngs,
) -> HybridCLIP:
    """What `HybridCLIP.from_towers` does."""
    folders = [fetch_checkpoint(vision, revision=vision_revision), fetch_checkpoint(text, revision=text_revision)]
    sources = [_Source(folder, side) for folder, side in zip(folders, ("vision", "text"), strict=True)]
    with _naming(folders[0]):
        vision_tower = vision_config(_read_config(folders[0]), "vision_model.pooler.dense.weight" in sources[0].names)
    with _naming(folders[1]):
        text_tower = dataclasses.replace(text_config(_read_config(folders[1])), pooling=pooling)
    learned = sources[0].leaves([Key("visual_projection.weight", "vision.projection.kernel", "transpose")])
    own_dim = next((leaf.array().shape[1] for leaf in learned.values()), None)
    config = CLIPConfig(vision=vision_tower, text=text_tower, embed_dim=embed_dim or own_dim or CLIPConfig.embed_dim)
    table = [key for key in key_table(config) if key.hf_name.startswith(("vision_model.", "text_model."))]
    leaves = {path: leaf for source in sources for path, leaf in source.leaves(table).items()}
    leaves |= learned
    unknown = [name for source in sources for name in source.unknown(leaves, config)]
    if own_dim != config.embed_dim:
        leaves.pop("vision.projection.kernel", None)
    if image_size is not None and "vision.position_embedding" in leaves:
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=image_size))
        name, file, array = leaves["vision.position_embedding"]
        resized = resize_positions(array(), config.vision.grid)
        leaves["vision.position_embedding"] = _Leaf(name, file, lambda: resized)
    new = _new_leaves(config, rngs)
    if pooling == "pooler" and leaves.keys() & {"text.pooler.kernel", "text.pooler.bias"}:
        new = {path: leaf for path, leaf in new.items() if "pooler" not in path}  # half of one is an error, not new
    elif pooling == "pooler":
        warnings.warn(f"{folders[1]} has no pooler, as masked language models do not: it is newly initialised, to be "
                      "trained; or take pooling='mean'", stacklevel=3)
    return _filled(config, new | leaves, unknown, f"{folders[0]} or {folders[1]}", dtype, param_dtype)


class _Leaf(NamedTuple):
    """An array on its way into the model; it is made when it is asked for, so that one at a time is held twice."""

    name: str  # what its file calls it
    file: Path | None
    array: Callable[[], np.ndarray]


class _Source:
    """A folder's weights under the names of `key_table`; with no `sides`, under their own."""

    def __init__(self, folder: Path, *sides: str):
        self.folder, self.sides, self.weights = folder, sides, read_weights(folder)
        self.names: dict[str, tuple[str, bool]] = {}  # by the table's name: the file's, and whether Flax wrote it
        for name in self.weights:
            known_as, flax = canonical(name, sides) if sides else (name, False)
            if known_as in self.names:
                raise ValueError(f"{folder} holds {known_as!r} twice, as {self.names[known_as][0]!r} and {name!r}")
            self.names[known_as] = (name, flax)

    def leaves(self, table: Iterable[Key]) -> dict[str, _Leaf]:
        """The table's weights that are here, by nnx path."""
        return {key.nnx_path: self._leaf(key) for key in table if key.hf_name in self.names}

    def _leaf(self, key: Key) -> _Leaf:
        name, flax = self.names[key.hf_name]
        change = TRANSFORMS[key.transform].from_flax if flax else TRANSFORMS[key.transform].from_torch

        def array() -> np.ndarray:
            try:
                return change(self.weights[name])
            except (IndexError, ValueError):  # it has another rank, which `_filled` finds
                return self.weights[name]

        return _Leaf(name, self.folder, array)

    def unknown(self, leaves: dict[str, _Leaf], config: CLIPConfig) -> list[str]:
        """The file's keys that are neither in a leaf nor knowingly unused."""
        used = {leaf.name for leaf in leaves.values() if leaf.file == self.folder}
        return [name for known_as, (name, _) in self.names.items()
                if name not in used and not (self.sides and unused(known_as, config, self.sides))]


def _read_config(folder: Path) -> dict:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: give load_clip a folder written by save_clip, or by transformers' "
                                "save_pretrained")
    values = read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file} cannot be read (it holds no object): fetch or save the checkpoint again")
    return values


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Names config.json in what is wrong with it."""
    try:
        yield
    except ConfigError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read ({error}): fetch or save the checkpoint again"
                         ) from error


def _with_scale(config: CLIPConfig, leaves: dict[str, _Leaf], *, linear_scale: bool) -> CLIPConfig:
    """The config whose limit lets the stored scale be; the ancestor's is linear, a twentieth of what it used."""
    if "logit_scale" not in leaves or leaves["logit_scale"].array().size != 1:
        return config  # `_filled` will say so
    name, file, array = leaves["logit_scale"]
    value = array().reshape(())
    if linear_scale:
        if not value > 0:
            raise ConfigError(f"the weights' logit_scale is {value}, and the ancestor's is linear: it must be above 0")
        value = np.log(20 * np.asarray(value, np.float64)).astype(np.float32)
        config = dataclasses.replace(config, logit_scale=float(value))
    leaves["logit_scale"] = _Leaf(name, file, lambda: value)
    above = float(value) > config.max_logit_scale + 1e-6  # ln 100 itself may be rounded up
    return dataclasses.replace(config, max_logit_scale=float(value)) if above else config


def _new_leaves(config: CLIPConfig, rngs: nnx.Rngs) -> dict[str, _Leaf]:
    """What joins two towers, and a pooler, with initial values."""
    layers = {"text.projection": linear(config.text.width, config.embed_dim, dtype=None, rngs=rngs, bias=False),
              "vision.projection": linear(config.vision.width, config.embed_dim, dtype=None, rngs=rngs, bias=False)}
    if config.text.pooling == "pooler":
        layers["text.pooler"] = linear(config.text.width, config.text.width, dtype=None, rngs=rngs)
    arrays = {f"{name}.{part}": np.asarray(value) for name, layer in layers.items()
              for part, value in flatten_params(nnx.state(layer)).items()}
    arrays["logit_scale"] = np.float32(config.logit_scale)
    return {path: _Leaf(path, None, lambda array=array: array) for path, array in arrays.items()}


def _shapes(config: CLIPConfig) -> dict[str, tuple]:
    """The shape of every parameter by its path; nothing is allocated."""
    model = nnx.eval_shape(lambda: HybridCLIP(config, rngs=nnx.Rngs(0)))
    return {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _filled(
    config: CLIPConfig, leaves: dict[str, _Leaf], unknown: list[str], where: Path | str, dtype, param_dtype
) -> HybridCLIP:
    """A model with these parameters, each used and none left open, or a ValueError that lists the keys."""
    model = nnx.eval_shape(lambda: HybridCLIP(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    wanted = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}
    native = any(path == leaf.name for path, leaf in leaves.items() if leaf.file and path != "logit_scale")
    names = {path: path for path in wanted} if native else {key.nnx_path: key.hf_name for key in key_table(config)}
    missing = sorted(names[path] for path in wanted.keys() - leaves.keys())
    shapes = {path: leaves[path].array().shape for path in sorted(wanted.keys() & leaves.keys())}
    wrong = [f"{leaves[path].name} {shape} instead of {wanted[path]}" for path, shape in shapes.items()
             if shape != wanted[path]]
    if missing or unknown or wrong:
        raise ValueError(f"the weights in {where} do not fit config.json: missing {missing}, unknown "
                         f"{sorted(unknown)}, wrong shape {wrong}")
    filled = [(path, leaf.replace(jnp.array(leaves[".".join(map(str, path))].array(), param_dtype)))
              for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))
