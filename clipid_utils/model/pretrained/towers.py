"""One tower's folder: its config, its weights, and its projection if it has one; and two of them joined to a model.

A folder is one of transformers (a tower alone, or a whole CLIP, Meta CLIP 2 or SigLIP), of M-CLIP (Carlsson et al.
2022) or of sentence-transformers (Reimers & Gurevych 2019).
"""

import dataclasses
import os
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from clipid_utils import files
from clipid_utils.model.config import CLIPConfig, TextConfig, VisionConfig
from clipid_utils.model.layers import linear
from clipid_utils.model.pretrained import families, keys
from clipid_utils.model.pretrained.hub import fetch_checkpoint
from clipid_utils.model.pretrained.parameters import Leaf, Source, fill, flatten_params, naming, read_config, with_scale
from clipid_utils.model.pretrained.processor_files import TextRules, read_json, read_preprocessor

M_CLIP = "M-CLIP"


@dataclasses.dataclass
class FoundTower:
    """A folder's tower: its config, its parameters by nnx path, the keys that are not known, a whole model's scale."""

    folder: Path
    config: VisionConfig | TextConfig
    leaves: dict[str, Leaf]
    unknown: Callable[[CLIPConfig], list[str]]
    scale: Leaf | None = None

    @property
    def embed_dim(self) -> int | None:
        """The size of the tower's own projection, None if it has none."""
        if self.config.projection == "none":
            return self.config.width
        kernels = [path for path in self.leaves if path.endswith((".projection.kernel", ".projection.fc2.kernel"))]
        return self.leaves[kernels[0]].array().shape[-1] if kernels else None

    def drop_projection(self) -> None:
        """Drops the tower's own projection, so that it gets a new one."""
        self.leaves = {path: leaf for path, leaf in self.leaves.items() if ".projection." not in path}
        self.config = dataclasses.replace(self.config, projection="linear")


def image_tower(folder: Path) -> FoundTower:
    """The image tower in a folder of transformers. Raises ValueError, with the file, if it does not fit."""
    source, values = Source(folder, "vision"), read_config(folder)
    with naming(folder):
        config = families.vision_config(values, "vision_model.pooler.dense.weight" in source.names)
        family = families.VISION[families.inner(values, "vision")[1]].table
    size = config.image_size
    if family == "dinov2" and (folder / "preprocessor_config.json").is_file():
        size = read_preprocessor(folder, size)["image_size"]  # 224, where the positions are those of 518
    leaves = source.take(keys.tower_table("vision", family, config))
    if size != config.image_size:
        old, new = config.grid, size // config.patch_size
        config = dataclasses.replace(config, image_size=size)
        name, table = leaves["vision.position_embedding"]
        leaves["vision.position_embedding"] = Leaf(name, lambda: resized_positions(table(), old, new))
    scale = source.take([keys.Key("logit_scale", "logit_scale", "scalar")]).get("logit_scale")
    return FoundTower(folder, config, leaves, source.unknown, scale)


def text_tower(folder: Path, pooling: str | None) -> FoundTower:
    """The text tower in a folder; `pooling` overrides that of BERT's family. Raises ValueError if it does not fit."""
    modules = sentence_modules(folder)
    inside = folder / modules[0]["path"] if modules else folder
    source, values = Source(inside, "text"), read_config(inside)
    with naming(inside):
        m_clip = values.get("model_type") == M_CLIP
        hf_values = read_config(fetch_checkpoint(values["modelBase"], weights=False)) if m_clip else values
        config = families.text_config(hf_values)
        family = families.TEXT[families.inner(hf_values, "text")[1]].table
        if m_clip:
            config = dataclasses.replace(config, pooling="mean", projection="affine")
    more, projection = {}, None
    if modules:
        config, more, projection = _with_modules(folder, modules[1:], config)
    if pooling is not None and pooling != config.pooling:
        if config.pre_norm and config.rotary is None or m_clip or projection is not None:
            raise ValueError(f"{folder} has pooling {config.pooling!r}, with which it was trained: leave pooling out")
        config = dataclasses.replace(config, pooling=pooling)
    table = keys.tower_table("text", family, config)
    if more.keys() & {"text.pooler.kernel"}:  # a Dense layer is used in place of BERT's own pooler
        table = [key for key in table if not key.nnx_path.startswith("text.pooler.")]
    leaves = source.take(table) | more
    pooled = more.keys() & {"text.pooler.kernel"}

    def unknown(config: CLIPConfig) -> list[str]:
        if pooled:
            config = dataclasses.replace(config, text=dataclasses.replace(config.text, pooling="first"))
        return source.unknown(config)

    return FoundTower(folder, config, leaves, unknown)


def sentence_modules(folder: Path) -> list[dict]:
    """The modules of a folder of sentence-transformers, [] for a different folder."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    modules = files.read_json(path)
    known = isinstance(modules, list) and all(isinstance(row, dict) and {"type", "path"} <= set(row) for row in modules)
    if not known or not modules or _kind(modules[0]) != "Transformer":
        raise ValueError(f"{path} does not begin with a Transformer: use a text model of sentence-transformers")
    return modules


def _kind(module: dict) -> str:
    return module["type"].rsplit(".", 1)[-1]


def _with_modules(
    folder: Path, modules: list[dict], config: TextConfig
) -> tuple[TextConfig, dict[str, Leaf], int | None]:
    """The config with the parts after the transformer, the parameters of Dense layers, and the size of the last one."""
    leaves, size, pooled = {}, None, False
    for module in modules:
        kind, values = _kind(module), read_json(folder / module["path"] / "config.json")
        where = f"{folder / 'modules.json'}: {kind}"
        if kind == "Pooling":
            modes = sorted(name for name, on in values.items() if name.startswith("pooling_mode") and on is True)
            stated = values.get("pooling_mode") or values.get("embedding_pooling")  # newer files name it
            mode = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean", "cls": "first",
                    "mean": "mean"}.get(modes[0] if len(modes) == 1 else stated)
            if mode is None:
                raise ValueError(f"{where} has the modes {modes or stated}: one of cls and mean tokens is supported")
            config = dataclasses.replace(config, pooling=mode)
        elif kind == "Normalize":
            if size is None:  # after a projection it changes nothing: encode_text gives unit vectors
                config = dataclasses.replace(config, normalize_pooled=True)
        elif kind == "Dense" and size is None:
            linear_leaves = Source(folder / module["path"]).take(
                [keys.Key(f"linear.{part}", ours, transform)
                 for part, ours, transform in (("weight", "kernel", "transpose"), ("bias", "bias", "same"))])
            activation = str(values.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
            if activation == "Identity":
                size = values["out_features"]
                form = "affine" if "bias" in linear_leaves else "linear"
                config = dataclasses.replace(config, projection=form)
                leaves |= {f"text.projection.{part}": leaf for part, leaf in linear_leaves.items()}
            elif activation == "Tanh" and config.pooling == "first" and not pooled and "bias" in linear_leaves:
                config, pooled = dataclasses.replace(config, pooling="pooler"), True
                leaves |= {f"text.pooler.{part}": leaf for part, leaf in linear_leaves.items()}
            else:
                raise ValueError(f"{where} has {activation} after the pooling {config.pooling!r}: use a model with a "
                                 "linear Dense layer, or with Tanh after the first token")
        elif kind != "Dropout":
            raise ValueError(f"{where} is not supported: use a model of Transformer, Pooling, Dense and Normalize")
    return config, leaves, size


def text_rules(folder: Path, prefix: str | None = None) -> TextRules:
    """How the texts of a folder of sentence-transformers are prepared, beside its tokenizer; `prefix` overrides its
    default prompt."""
    modules = sentence_modules(folder)
    if not modules:
        return TextRules(prefix=prefix or "")
    inside = folder / modules[0]["path"]
    settings = read_json(inside / "sentence_bert_config.json")
    more = read_json(folder / "config_sentence_transformers.json")
    prompt = (more.get("prompts") or {}).get(more.get("default_prompt_name") or "", "")
    return TextRules(folder=inside, prefix=prompt if prefix is None else prefix,
                     max_length=settings.get("max_seq_length"), lower=bool(settings.get("do_lower_case")))


def resized_positions(table: np.ndarray, old: int, new: int) -> np.ndarray:
    """The class token's position, and the patches' `old` x `old` ones, brought to `new` x `new` as torch's bicubic."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    whole = np.floor(place).astype(int)
    weights = np.zeros((new, old))
    for step in (-1, 0, 1, 2):
        far = np.abs(place - whole - step)
        near = (1.25 * far - 2.25) * far**2 + 1
        cubic = np.where(far <= 1, near, ((-0.75 * far + 3.75) * far - 6) * far + 3)  # Keys 1981 with a = -0.75
        np.add.at(weights, (np.arange(new), np.clip(whole + step, 0, old - 1)), cubic)
    patches = table[1:].reshape(old, old, -1).astype(np.float64)
    patches = np.einsum("ai,bj,ijd->abd", weights, weights, patches).reshape(new * new, -1)
    return np.concatenate([table[:1], patches.astype(table.dtype)])


def join_towers(
    model_class: type, vision: str | os.PathLike, text: str | os.PathLike, *, embed_dim: int | None = None,
    pooling: str | None = None, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs | None = None,
) -> Any:
    """A model of two pretrained towers; `load.load_towers` describes the options."""
    image, words = image_tower(fetch_checkpoint(vision)), text_tower(fetch_checkpoint(text), pooling)
    sizes, asked = (image.embed_dim, words.embed_dim), embed_dim is not None
    embed_dim = embed_dim or sizes[0] or sizes[1] or CLIPConfig.embed_dim
    for tower, size in zip((image, words), sizes, strict=True):
        if size != embed_dim:
            if size is not None and not asked:
                warnings.warn(f"{tower.folder} has a projection to {size} numbers, and the common space has "
                              f"{embed_dim}: a new one is initialised and must be trained", stacklevel=3)
            tower.drop_projection()
    leaves = image.leaves | words.leaves
    config = CLIPConfig(vision=image.config, text=words.config, embed_dim=embed_dim)
    new_pooler = words.config.pooling == "pooler" and not leaves.keys() & {"text.pooler.kernel", "text.pooler.bias"}
    if new_pooler:
        warnings.warn(f"{words.folder} has no pooler, like every masked language model. A new one is initialised "
                      "and must be trained; or use pooling='mean'", stacklevel=3)
    trained = sizes == (embed_dim, embed_dim)
    if trained and not new_pooler and image.scale is not None:
        leaves["logit_scale"] = image.scale
        config = with_scale(config, leaves, linear_scale=False)
    unknown = [*image.unknown(config), *words.unknown(config)]
    leaves |= _new_leaves(config, nnx.Rngs(0) if rngs is None else rngs, new_pooler, leaves)
    return fill(model_class, config, leaves, unknown, f"{image.folder} or {words.folder}", dtype, param_dtype)


def _new_leaves(config: CLIPConfig, rngs: nnx.Rngs, pooler: bool, known: Collection[str]) -> dict[str, Leaf]:
    """Initial values of the projections, the pooler and the scale that `known` lacks. Only new layers draw numbers."""
    layers = {f"{side}.projection": linear(tower.width, config.embed_dim, dtype=None, rngs=rngs, bias=False)
              for side, tower in (("text", config.text), ("vision", config.vision))
              if tower.projection == "linear" and f"{side}.projection.kernel" not in known}
    if pooler:
        layers["text.pooler"] = linear(config.text.width, config.text.width, dtype=None, rngs=rngs)
    arrays = {f"{name}.{part}": np.asarray(value) for name, layer in layers.items()
              for part, value in flatten_params(nnx.state(layer)).items()}
    if "logit_scale" not in known:
        arrays["logit_scale"] = np.float32(config.logit_scale)
    return {path: Leaf(path, lambda array=array: array) for path, array in arrays.items()}


