"""The families of Hugging Face models that fit the towers: their configs and their keys, here and there.

One table, `key_table`, has every weight: its name in transformers' VisionTextDualEncoderModel, its nnx path here, and
how one array becomes the other. A tower on its own, with a head, of an older version or of Flax has the same names with
different prefixes and suffixes; `canonical` brings them to those of the table.
"""

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from clipid_utils.files import import_transformers
from clipid_utils.model import ops
from clipid_utils.model.config import CLIPConfig, TextConfig, VisionConfig
from clipid_utils.model.pretrained.processor_files import model_type, part

# Weights

class Key(NamedTuple):
    """A weight: its name in VisionTextDualEncoderModel, its path in HybridCLIP, the name of its transform."""

    hf_name: str
    nnx_path: str
    transform: str


class Transform(NamedTuple):
    """From torch's array and from Flax's to ours, and from ours to torch's; `vision` has the size of a patch."""

    from_torch: Callable[[np.ndarray], np.ndarray]
    from_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray, VisionConfig], np.ndarray]


def _same(array: np.ndarray, vision: VisionConfig | None = None) -> np.ndarray:
    return array


def _to_convolution(kernel: np.ndarray, vision: VisionConfig) -> np.ndarray:
    side = vision.patch_size
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


TRANSFORMS = {
    "same": Transform(_same, _same, _same),
    "transpose": Transform(lambda x: x.T, _same, lambda x, vision: x.T),  # torch's linear layers are [out, in]
    # the convolution over patches, torch's [D, 3, rows, columns], is a linear layer over (row, column, channel)
    "patches": Transform(lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
                         lambda x: x.reshape(-1, x.shape[-1]), _to_convolution),
    # ViT keeps axes for the batch: [1, 1, D] and [1, 1 + P, D]
    "batch axes": Transform(np.squeeze, np.squeeze, lambda x, vision: x.reshape(1, -1, x.shape[-1])),
}
# The arrays of a part: suffix in torch, suffix here, transform
_PARTS = {
    "linear": ((".weight", ".kernel", "transpose"), (".bias", ".bias", "same")),
    "norm": ((".weight", ".scale", "same"), (".bias", ".bias", "same")),
    "table": ((".weight", "", "same"),),
    "array": (("", "", "same"),),
    "batched": (("", "", "batch axes"),),
    "patches": ((".weight", ".kernel", "patches"),),
    "patches+": ((".weight", ".kernel", "patches"), (".bias", ".bias", "same")),
}
# Outside the layers, whose place is #: the family, transformers' name of a part, our name, and its arrays in _PARTS
_OUTER = """
    clip  embeddings.class_embedding              class_embedding       array
    clip  embeddings.position_embedding           position_embedding    table
    clip  embeddings.patch_embedding              patch_embedding       patches
    clip  pre_layrnorm                            ln_pre                norm
    clip  #                                       #                     #
    clip  post_layernorm                          ln_post               norm
    vit   embeddings.cls_token                    class_embedding       batched
    vit   embeddings.position_embeddings          position_embedding    batched
    vit   embeddings.patch_embeddings.projection  patch_embedding       patches+
    vit   #                                       #                     #
    vit   layernorm                               ln_post               norm
    vit   pooler.dense                            pooler                linear
    bert  embeddings.word_embeddings              word_embedding        table
    bert  embeddings.position_embeddings          position_embedding    table
    bert  embeddings.token_type_embeddings        token_type_embedding  table
    bert  embeddings.LayerNorm                    ln                    norm
    bert  #                                       #                     #
    bert  pooler.dense                            pooler                linear
"""
# In each layer: our name of a part, its arrays, and transformers' name in CLIP, ViT and BERT
_LAYER = """
    attn.q_proj    linear  self_attn.q_proj    attention.attention.query  attention.self.query
    attn.k_proj    linear  self_attn.k_proj    attention.attention.key    attention.self.key
    attn.v_proj    linear  self_attn.v_proj    attention.attention.value  attention.self.value
    attn.out_proj  linear  self_attn.out_proj  attention.output.dense     attention.output.dense
    ln_1           norm    layer_norm1         layernorm_before           attention.output.LayerNorm
    mlp.fc1        linear  mlp.fc1             intermediate.dense         intermediate.dense
    mlp.fc2        linear  mlp.fc2             output.dense               output.dense
    ln_2           norm    layer_norm2         layernorm_after            output.LayerNorm
"""
# Source keys that no model here uses
_UNUSED = (
    (r".*\.position_ids|text_model\.embeddings\.token_type_ids", "a buffer that counts 0, 1, 2, …"),
    (r"cls\..*|lm_head\..*|classifier\..*|decoder\..*|qa_outputs\..*", "the head of a different task"),
    (r"vision_model\.embeddings\.mask_token", "for masked pictures only"),
)
_FOREIGN = {  # in a whole model, when only one tower is used
    "vision": (r"(text_model|text_projection)\..*|logit_scale", "of the text tower, which is not used"),
    "text": (r"(vision_model|visual_projection)\..*|logit_scale", "of the image tower, which is not used"),
}
_PREFIXES = {"vision": ("vision_model.vision_model.", "vision_model.", "vit."),
             "text": ("text_model.", "bert.", "roberta.")}
_SUFFIXES = {".gamma": ".weight", ".beta": ".bias"}  # of the first BERTs, converted from TensorFlow
_FLAX_SUFFIXES = {".kernel": ".weight", ".scale": ".weight", ".embedding": ".weight"}


def key_table(config: CLIPConfig) -> list[Key]:
    """Every weight of a model, in the order of the forward pass."""
    vit = not config.vision.ln_pre
    keys = [
        *_tower("vision", "vit" if vit else "clip", config.vision.layers, config.vision.pooling == "pooler"),
        Key("visual_projection.weight", "vision.projection.kernel", "transpose"),
        *_tower("text", "bert", config.text.layers, config.text.pooling == "pooler"),
        Key("text_projection.weight", "text.projection.kernel", "transpose"),
        Key("logit_scale", "logit_scale", "same"),
    ]
    return keys if config.logit_bias is None else [*keys, Key("logit_bias", "logit_bias", "same")]


def _tower(side: str, family: str, layers: int, pooler: bool) -> list[Key]:
    column, stack = ("clip", "vit", "bert").index(family) + 2, "layers" if family == "clip" else "layer"
    layer = [line.split() for line in _LAYER.strip().splitlines()]
    inner = [(f"encoder.{stack}.{number}.{row[column]}", f"blocks.{number}.{row[0]}", row[1])
             for number in range(layers) for row in layer]
    outer = [line.split()[1:] for line in _OUTER.strip().splitlines() if line.split()[0] == family]
    rows = [row for part in outer for row in (inner if part[0] == "#" else [part]) if pooler or row[1] != "pooler"]
    return [Key(f"{side}_model.{theirs}{hf_suffix}", f"{side}.{ours}{suffix}", transform)
            for theirs, ours, part in rows for hf_suffix, suffix, transform in _PARTS[part]]


def canonical(name: str, sides: tuple[str, ...] = ("vision", "text")) -> tuple[str, bool]:
    """A source key under its name in `key_table`, and whether its array has Flax's layout.

    `sides` are the towers that the source may have. The keys of a single tower have its own prefix or none.
    """
    flax = False
    for old, new in (_SUFFIXES | _FLAX_SUFFIXES).items():
        if name.endswith(old):
            name, flax = name.removesuffix(old) + new, old in _FLAX_SUFFIXES
    for side in sides:
        for prefix in _PREFIXES[side]:
            if name.startswith(prefix):
                return f"{side}_model.{name.removeprefix(prefix)}", flax
    bare = len(sides) == 1 and re.match(r"(embeddings|encoder|pooler|layernorm|pre_layrnorm|post_layernorm)\.", name)
    return (f"{sides[0]}_model.{name}" if bare else name), flax


def unused(name: str, config: CLIPConfig, sides: tuple[str, ...] = ("vision", "text")) -> str | None:
    """Why a source key, named as in the table, is known to be unused; None if it is not known."""
    reasons = [*_UNUSED, *(_FOREIGN[side] for side in sides if len(sides) == 1)]
    if config.text.pooling == "mean":
        reasons.append((r"text_model\.pooler\..*", "pooling by the mean needs no pooler"))
    return next((reason for pattern, reason in reasons if re.fullmatch(pattern, name)), None)


# Configs

class ConfigError(ValueError):
    """A config that the towers do not support; the message begins with the field."""


# Our field: Hugging Face's
_SIZES = {
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size", "activation": "hidden_act", "norm_eps": "layer_norm_eps",
}
_VISION = _SIZES | {"image_size": "image_size", "patch_size": "patch_size"}
_TEXT = _SIZES | {"vocab_size": "vocab_size", "token_types": "type_vocab_size"}


def _settings(values: dict, kind: str) -> Any:
    """The fields that the towers have, with transformers' defaults for those that the file does not have."""
    import_transformers()
    from transformers import AutoConfig

    fields = (*_VISION.values(), *_TEXT.values(), "max_position_embeddings", "pad_token_id")
    settings = AutoConfig.for_model(kind, **{key: values[key] for key in fields if values.get(key) is not None})
    for field, wanted in {"num_channels": 3, "qkv_bias": True, "pooler_act": "tanh", "is_decoder": False,
                          "position_embedding_type": "absolute", "pooler_output_size": settings.hidden_size}.items():
        if values.get(field) not in (wanted, None):
            raise ConfigError(f"{field} is {values[field]!r}, and the towers here support {wanted!r} only")
    if settings.hidden_size % settings.num_attention_heads:
        raise ConfigError(f"hidden_size {settings.hidden_size} is not a multiple of num_attention_heads "
                          f"{settings.num_attention_heads}")
    if settings.hidden_act not in ops.ACTIVATIONS:
        raise ConfigError(f"hidden_act is {settings.hidden_act!r}, not one of {', '.join(ops.ACTIVATIONS)}")
    return settings


def vision_config(values: dict, pooler: bool) -> VisionConfig:
    """An image tower's config from CLIP's, CLIP vision model's or ViT's; `pooler` says whether the weights have one.

    A whole CLIP's config is accepted in place of its vision part. Raises ConfigError.
    """
    kind = model_type(values)
    while inner := part(values, "vision"):
        values, kind = inner, model_type(inner) or "clip_vision_model"
    if kind not in ("clip", "clip_vision_model", "vit"):
        raise ConfigError(f"model_type of the image tower is {kind!r}; supported are clip, clip_vision_model and vit")
    vit = kind == "vit"
    settings = _settings(values, "vit" if vit else "clip_vision_model")
    if not isinstance(settings.image_size, int) or not isinstance(settings.patch_size, int):
        raise ConfigError(f"image_size {settings.image_size}, patch_size {settings.patch_size}: use a square")
    return VisionConfig(**{ours: getattr(settings, theirs) for ours, theirs in _VISION.items()},
                        ln_pre=not vit, patch_bias=vit, pooling="pooler" if vit and pooler else "class")


def text_config(values: dict, *, own_positions: bool = True) -> TextConfig:
    """A text tower's config from BERT's, RoBERTa's or XLM-RoBERTa's. Raises ConfigError.

    RoBERTa counts positions from its padding's id + 1; a model trained with positions 0, 1, 2, … has
    `own_positions=False`.
    """
    kind = model_type(values)
    if kind not in ("bert", "roberta", "xlm-roberta"):
        raise ConfigError(f"model_type of the text tower is {kind!r}; supported are bert, roberta and xlm-roberta")
    settings = _settings(values, kind)
    offset = settings.pad_token_id + 1 if own_positions and kind != "bert" else 0
    return TextConfig(**{ours: getattr(settings, theirs) for ours, theirs in _TEXT.items()},
                      max_length=settings.max_position_embeddings - offset, position_offset=offset)


def clip_config(values: dict, keys: Collection[str], *, own_positions: bool = True) -> CLIPConfig:
    """A whole model's config from VisionTextDualEncoder's or a hybrid-clip's of 2021; `keys` are its weights' names.

    `own_positions` is as in `text_config`: 2021's hybrid-clip gave RoBERTa the positions 0, 1, 2, …
    """
    return CLIPConfig(
        vision=vision_config(values.get("vision_config") or {}, "vision_model.pooler.dense.weight" in keys),
        text=text_config(values.get("text_config") or {}, own_positions=own_positions),
        embed_dim=values.get("projection_dim") or 512,
        logit_scale=values.get("logit_scale_init_value", 2.6592),
    )


def to_hf_config(config: CLIPConfig) -> dict:
    """The config.json of a VisionTextDualEncoderModel; raises ValueError for a model that it cannot represent."""
    vision, text = config.vision, config.text
    if not isinstance(vision, VisionConfig) or text.normalize_pooled or text.classes:
        raise ValueError("VisionTextDualEncoderModel has no EfficientNet and only a matrix after the text tower's "
                         "pooler: save this model as format='native'")
    if text.pooling != "pooler" or config.logit_bias is not None:
        raise ValueError("VisionTextDualEncoderModel has a pooler and no logit_bias; this model has "
                         f"pooling={text.pooling!r} and logit_bias={config.logit_bias}: save it as format='native'")
    clip, vit = (True, False, "class"), (False, True, "pooler")
    form = (vision.ln_pre, vision.patch_bias, vision.pooling)
    if form not in (clip, vit):
        raise ValueError(f"VisionTextDualEncoderModel supports CLIP's image tower and ViT's; this one has ln_pre, "
                         f"patch_bias, pooling = {form}: save it as format='native'")
    hf_vision = {"model_type": "vit", **{theirs: getattr(vision, ours) for ours, theirs in _VISION.items()}}
    if form == clip:
        hf_vision |= {"model_type": "clip_vision_model", "projection_dim": config.embed_dim}
    hf_text = {"model_type": "bert", **{theirs: getattr(text, ours) for ours, theirs in _TEXT.items()},
               "max_position_embeddings": text.max_length + text.position_offset}
    if text.position_offset:
        hf_text |= {"model_type": "roberta", "pad_token_id": text.position_offset - 1}
    return {"architectures": ["VisionTextDualEncoderModel"], "model_type": "vision-text-dual-encoder",
            "projection_dim": config.embed_dim, "logit_scale_init_value": config.logit_scale, "dtype": "float32",
            "vision_config": hf_vision, "text_config": hf_text}
