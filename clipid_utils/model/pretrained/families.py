"""The families of towers: from the configs of transformers and open_clip to ours, and back.

A family is a row of `VISION` or `TEXT`: the sizes under its own names, and its special settings. The names of its
weights are in `keys.py`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from clipid_utils.files import import_transformers
from clipid_utils.model import ops
from clipid_utils.model.config import CLIPConfig, Rotary, TextConfig, VisionConfig
from clipid_utils.model.pretrained.processor_files import model_type, part


class ConfigError(ValueError):
    """A config that the towers do not support; the message begins with the field."""


class Family(NamedTuple):
    """Its table in `keys.ROWS`, its names of sizes where they are not BERT's, and its own settings of ours."""

    table: str
    names: Mapping[str, str] = {}
    settings: Mapping[str, Any] = {}


# Our field: Hugging Face's
_SIZES = {
    "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size", "activation": "hidden_act", "norm_eps": "layer_norm_eps",
}
_VISION = _SIZES | {"image_size": "image_size", "patch_size": "patch_size"}
_TEXT = _SIZES | {"vocab_size": "vocab_size", "token_types": "type_vocab_size", "max_length": "max_position_embeddings"}
_VIT = {"ln_pre": False, "patch_bias": True}
_SIGLIP_VISION = _VIT | {"class_token": False, "pooling": "attention", "projection": "none"}
_CLIP_TEXT = {"pre_norm": True, "mask": "causal", "pooling": "end", "token_types": 0}
_SIGLIP_TEXT = {"pre_norm": True, "mask": "none", "pooling": "last", "projection": "affine", "token_types": 0}
_DISTILBERT = {"width": "dim", "layers": "n_layers", "heads": "n_heads", "mlp_dim": "hidden_dim",
               "activation": "activation"}
_MODERNBERT = {"activation": "hidden_activation", "norm_eps": "norm_eps"}
# By model_type
VISION = {
    "clip_vision_model": Family("clip"),
    "metaclip_2_vision_model": Family("clip"),
    "siglip_vision_model": Family("siglip", settings=_SIGLIP_VISION),
    "vit": Family("vit", settings=_VIT),
    "dinov2": Family("dinov2", {"mlp_dim": "mlp_ratio"}, _VIT | {"layer_scale": True}),
}
TEXT = {
    "bert": Family("bert"),
    "roberta": Family("bert"),
    "xlm-roberta": Family("bert"),
    "distilbert": Family("distilbert", _DISTILBERT, {"norm_eps": 1e-12, "token_types": 0, "pooling": "mean"}),
    "modernbert": Family("modernbert", _MODERNBERT, {"pre_norm": True, "token_types": 0, "pooling": "mean"}),
    "clip_text_model": Family("clip", settings=_CLIP_TEXT),
    "metaclip_2_text_model": Family("clip", settings=_CLIP_TEXT),
    "siglip_text_model": Family("siglip", settings=_SIGLIP_TEXT),
}
# Whole models of transformers with towers of their own kind, and their classes
WHOLE = {"clip": "CLIPModel", "metaclip_2": "MetaClip2Model", "siglip": "SiglipModel"}
DUAL_ENCODER = "vision-text-dual-encoder"
_REFUSED = {
    "siglip2": "SigLIP 2 with NaFlex takes pictures of any shape: use its version of one resolution, such as "
               "google/siglip2-base-patch16-224",
    "dinov2_with_registers": "use the version without registers, such as facebook/dinov2-base",
}


def refuse(values: Mapping[str, Any], kind: str | None) -> None:
    """Raises ConfigError, with a model to use instead, for a kind that is known and does not fit."""
    if values.get("auto_map"):
        raise ConfigError("auto_map names code of the repository, which is not run here: use a model of a family that "
                          "transformers itself has")
    for known, remedy in _REFUSED.items():
        if kind and kind.removesuffix("_vision_model").removesuffix("_text_model") == known:
            raise ConfigError(f"model_type is {kind!r}: {remedy}")
    for field in ("is_decoder", "is_encoder_decoder"):
        if values.get(field):
            raise ConfigError(f"{field} is {values[field]!r}, with model_type {kind!r}: use an encoder, such as one of "
                              "model_type xlm-roberta or bert")


def _read(values: dict, side: str) -> tuple[str, Any, dict[str, Any]]:
    """A tower's model_type, its settings with transformers' defaults, and our fields. Raises ConfigError."""
    values, kind = inner(values, side)
    refuse(values, kind)
    known, names, tower = {"vision": (VISION, _VISION, "image"), "text": (TEXT, _TEXT, "text")}[side]
    if kind not in known:
        raise ConfigError(f"model_type of the {tower} tower is {kind!r}; supported are {', '.join(known)}")
    family = known[kind]
    names = names | family.names
    settings = _settings(values, kind, {*names.values()})
    found = {ours: getattr(settings, theirs) for ours, theirs in names.items() if ours not in family.settings}
    same = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}  # the same approximation
    found["activation"] = same.get(found["activation"], found["activation"])
    if found["activation"] not in ops.ACTIVATIONS:
        raise ConfigError(f"{names['activation']} is {found['activation']!r}, not one of {', '.join(ops.ACTIVATIONS)}")
    return kind, settings, found | dict(family.settings)


def _settings(values: dict, kind: str, sizes: set[str]) -> Any:
    """The fields that the towers have, with transformers' defaults for those that the file does not have."""
    import_transformers()
    from transformers import AutoConfig

    fields = sizes | {"pad_token_id", "eos_token_id", "projection_size", "layer_types", "rope_parameters",
                      "global_attn_every_n_layers", "local_attention", "global_rope_theta", "local_rope_theta"}
    settings = AutoConfig.for_model(kind, **{key: values[key] for key in fields if values.get(key) is not None})
    for field, wanted in {"num_channels": 3, "qkv_bias": True, "pooler_act": "tanh", "vision_use_head": True,
                          "use_swiglu_ffn": False, "position_embedding_type": "absolute", "norm_bias": False,
                          "mlp_bias": False, "attention_bias": False,
                          "pooler_output_size": settings.hidden_size}.items():
        if values.get(field) not in (wanted, None):
            raise ConfigError(f"{field} is {values[field]!r}, and the towers here support {wanted!r} only")
    if settings.hidden_size % settings.num_attention_heads:
        raise ConfigError(f"hidden_size {settings.hidden_size} is not a multiple of num_attention_heads "
                          f"{settings.num_attention_heads}")
    return settings


def inner(values: dict, side: str) -> tuple[dict, str | None]:
    """A tower's own values and its model_type, from its config or from that of a whole model."""
    kind = model_type(values)
    while own := part(values, side):
        values, kind = own, model_type(own) or f"{kind if kind in WHOLE else 'clip'}_{side}_model"
    return values, f"{kind}_{side}_model" if kind in WHOLE else kind


def vision_config(values: dict, pooler: bool) -> VisionConfig:
    """An image tower's config from that of its family; `pooler` says whether a ViT's weights have one.

    A whole model's config is accepted in place of its vision part. Raises ConfigError.
    """
    kind, settings, found = _read(values, "vision")
    if not isinstance(settings.image_size, int) or not isinstance(settings.patch_size, int):
        raise ConfigError(f"image_size {settings.image_size}, patch_size {settings.patch_size}: use a square")
    if kind == "dinov2":
        found["mlp_dim"] = int(found["width"] * settings.mlp_ratio)
    if kind == "vit" and pooler:
        found["pooling"] = "pooler"
    return VisionConfig(**found)


def text_config(values: dict, *, own_positions: bool = True) -> TextConfig:
    """A text tower's config from that of its family. Raises ConfigError.

    RoBERTa counts positions from its padding's id + 1; a model trained with positions 0, 1, 2, … has
    `own_positions=False`.
    """
    kind, settings, found = _read(values, "text")
    if kind in ("roberta", "xlm-roberta") and own_positions:
        found["position_offset"] = settings.pad_token_id + 1
        found["max_length"] -= settings.pad_token_id + 1
    if found.get("pooling") == "end" and not (kind == "clip_text_model" and settings.eos_token_id == 2):
        found["end_id"] = settings.eos_token_id  # CLIPs of before 2023 say 2 and pool the largest id
    if kind == "modernbert":
        found["rotary"] = _rotary(settings)
    return TextConfig(**found)


def _rotary(settings: Any) -> Rotary:
    bases = settings.rope_parameters
    for name, values in bases.items():
        if values.get("rope_type", "default") != "default":
            raise ConfigError(f"rope_parameters of {name} have rope_type {values['rope_type']!r}: only 'default' is "
                              "supported")
    kinds = {"full_attention": "global", "sliding_attention": "local"}
    return Rotary(layers=tuple(kinds[kind] for kind in settings.layer_types), window=settings.local_attention // 2,
                  global_theta=float(bases["full_attention"]["rope_theta"]),
                  local_theta=float(bases["sliding_attention"]["rope_theta"]))


def clip_config(values: dict, keys: Collection[str], kind: str, *, own_positions: bool = True) -> CLIPConfig:
    """A whole model's config from VisionTextDualEncoder's, a hybrid-clip's of 2021, CLIP's, Meta CLIP 2's or SigLIP's;
    `kind` is its model_type and `keys` are its weights' names.

    `own_positions` is as in `text_config`: 2021's hybrid-clip gave RoBERTa the positions 0, 1, 2, …
    """
    refuse(values, kind)
    sides = {side: ({"model_type": f"{kind}_{side}_model"} if kind in WHOLE else {}) | (part(values, side) or {})
             for side in ("vision", "text")}
    vision = vision_config(sides["vision"], "vision_model.pooler.dense.weight" in keys)
    text = text_config(sides["text"], own_positions=own_positions)
    if kind == "siglip":  # the bias at the start of its training; the file has the learned one
        return CLIPConfig(vision=vision, text=text, embed_dim=vision.width, logit_bias=-10.0)
    return CLIPConfig(vision=vision, text=text, embed_dim=values.get("projection_dim") or 512,
                      logit_scale=values.get("logit_scale_init_value", 2.6592))


# open_clip

_POOLERS = {"mean_pooler": "mean", "cls_pooler": "pooler", "cls_last_hidden_state_pooler": "first"}
_OPEN_CLIP_VISION = {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size"}
_OPEN_CLIP_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "hf_tokenizer_name",
                   "tokenizer_kwargs", "no_causal_mask"}
_HARMLESS = {  # settings for which only these values are supported
    "ls_init_value": None, "attentional_pool": False, "attn_pooler_queries": 256, "attn_pooler_heads": 8,
    "patch_dropout": 0.0, "no_ln_pre": False, "pos_embed_type": "learnable", "final_ln_after_pool": False,
    "pool_type": ("tok", "argmax"), "output_tokens": False, "act_kwargs": None, "norm_kwargs": None, "embed_cls": False,
    "pad_id": 0, "proj_bias": False, "proj_type": "linear", "no_causal_mask": False, "correct_cls_mask": False,
    "hf_model_pretrained": (True, False), "timm_model_pretrained": (True, False), "timm_drop_path": None,
    "global_average_pool": False, "input_patchnorm": False,
}


def open_clip_config(model: dict, hf_text: dict | None) -> CLIPConfig:
    """From the `model_cfg` of open_clip_config.json; `hf_text` is the config of its text tower of transformers, if it
    has one. Raises ConfigError."""
    vision, text = dict(model.get("vision_cfg") or {}), dict(model.get("text_cfg") or {})
    if "timm_model_name" in vision or not isinstance(vision.get("layers"), int):
        raise ConfigError("vision_cfg is not open_clip's own vision transformer: use one with layers and a patch_size, "
                          "or the same model in transformers' format (SigLIP: google/siglip-base-patch16-224)")
    hf_fields = {"hf_model_name", "hf_pooler_type", "pooler_type", "proj", "hf_proj_type"} if hf_text else set()
    for name, values, known in (("vision_cfg", vision, _OPEN_CLIP_VISION),
                                ("text_cfg", text, _OPEN_CLIP_TEXT | hf_fields)):
        for field, value in values.items():
            fits = _HARMLESS.get(field, ())
            if field not in known and not (value == fits or isinstance(fits, tuple) and value in fits):
                raise ConfigError(f"{name} has {field} = {value!r}, which the towers here do not support: use a model "
                                  "of a different architecture, or the same one in transformers' format")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width, embed_dim = vision.get("width", 768), model["embed_dim"]
    vision_tower = VisionConfig(
        image_size=vision.get("image_size", 224), patch_size=vision.get("patch_size", 16), width=width,
        layers=vision["layers"], heads=width // vision.get("head_width", 64),
        mlp_dim=int(width * vision.get("mlp_ratio", 4.0)), activation=activation)
    if hf_text:
        pooler = text.get("hf_pooler_type") or text.get("pooler_type") or "mean_pooler"
        if pooler not in _POOLERS:
            raise ConfigError(f"text_cfg has hf_pooler_type = {pooler!r}; supported are {', '.join(_POOLERS)}")
        projection = text.get("hf_proj_type") or text.get("proj")
        tower = dataclasses.replace(text_config(hf_text), pooling=_POOLERS[pooler], projection=projection or "none")
    else:
        width = text.get("width", 512)
        tower = TextConfig(vocab_size=text.get("vocab_size", 49408), max_length=text.get("context_length", 77),
                           width=width, layers=text.get("layers", 12), heads=text.get("heads", 8),
                           mlp_dim=int(width * text.get("mlp_ratio", 4.0)), activation=activation, norm_eps=1e-5,
                           **_CLIP_TEXT)
    bias = model.get("init_logit_bias")
    return CLIPConfig(vision=vision_tower, text=tower, embed_dim=embed_dim, logit_bias=bias,
                      logit_scale=model.get("init_logit_scale") or CLIPConfig.logit_scale)


# The way back

def to_hf_config(config: CLIPConfig) -> dict:
    """The config.json of the class of transformers that fits: VisionTextDualEncoderModel, CLIPModel, MetaClip2Model or
    SiglipModel. Raises ValueError for a model that none of them can represent."""
    vision, text = config.vision, config.text
    if not isinstance(vision, VisionConfig) or text.normalize_pooled or text.classes:
        raise ValueError("no class of transformers has an EfficientNet here, or more than a matrix after the text "
                         "tower's pooling: save this model as format='native'")
    kinds = image_kind, text_kind = _kind(vision, VISION), _kind(text, TEXT)
    fits_dual = image_kind == "clip_vision_model" or image_kind == "vit" and vision.pooling == "pooler"
    if kinds == ("clip_vision_model", "clip_text_model") and config.logit_bias is None:
        whole = "metaclip_2" if text.end_id == 2 else "clip"
    elif kinds == ("siglip_vision_model", "siglip_text_model") and config.logit_bias is not None:
        whole = "siglip"
    elif fits_dual and text_kind in ("bert", "roberta") and config.logit_bias is None:
        whole = DUAL_ENCODER
    else:
        towers = f"{image_kind or 'a different image tower'}, {text_kind or 'a different text tower'}"
        raise ValueError("VisionTextDualEncoderModel has CLIP's image tower or ViT's, BERT or RoBERTa with a pooler, "
                         "and no logit_bias; CLIPModel, MetaClip2Model and SiglipModel have their own towers. This "
                         f"model has {towers}, pooling={text.pooling!r}, logit_bias={config.logit_bias}: save it as "
                         "format='native'")
    if whole == "metaclip_2":
        image_kind, text_kind = (kind.replace("clip", whole) for kind in kinds)
    size = {"projection_dim": config.embed_dim}
    hf_vision = {"model_type": image_kind, **{theirs: getattr(vision, ours) for ours, theirs in _VISION.items()},
                 **(size if vision.ln_pre else {})}
    hf_text = {"model_type": text_kind, **{theirs: getattr(text, ours) for ours, theirs in _TEXT.items()},
               "max_position_embeddings": text.max_length + text.position_offset}
    if text.position_offset:
        hf_text["pad_token_id"] = text.position_offset - 1
    if text.pooling == "end":
        hf_text |= {"eos_token_id": 2 if text.end_id is None else text.end_id, **size}
    if whole == "siglip":
        hf_text["projection_size"] = config.embed_dim
    if whole != DUAL_ENCODER:
        del hf_text["type_vocab_size"]
    sizes = {} if whole == "siglip" else {**size, "logit_scale_init_value": config.logit_scale}
    return {"architectures": [WHOLE.get(whole, "VisionTextDualEncoderModel")], "model_type": whole, **sizes,
            "dtype": "float32", "vision_config": hf_vision, "text_config": hf_text}


def _kind(config: VisionConfig | TextConfig, towers: Mapping[str, Family]) -> str | None:
    """The model_type in whose form a tower is, if there is one."""
    if isinstance(config, TextConfig) and config.position_offset:
        return "roberta" if dataclasses.replace(config, position_offset=0) == _formed(config, {}) else None
    for kind, tower in towers.items():
        if config == _formed(config, tower.settings):
            return kind
    return None


def _formed(config: VisionConfig | TextConfig, settings: Mapping[str, Any]):
    """The config with its own sizes and everything else as `settings` and the defaults have it."""
    sizes = set(_VISION if isinstance(config, VisionConfig) else _TEXT) | {"end_id"}
    own = {name: getattr(config, name) for name in sizes if name in type(config).__dataclass_fields__}
    vit = isinstance(config, VisionConfig) and not config.ln_pre and config.pooling == "pooler"
    poolers = {"pooling": "pooler"} if vit else {}
    return type(config)(**{**own, **settings, **poolers})
