"""The names of weights, there and here: in transformers, in open_clip and in Flax, and as nnx paths.

`ROWS` has every weight of a tower of each family. `key_table` has every weight of a model, with its name in the files,
its nnx path here, and how one array becomes the other. Files name the same tower in several ways: alone or in a whole
model, with a head, of an older version or of Flax; `canonical` brings all of them to the names of the table.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clipid_utils.model.config import CLIPConfig, TextConfig, VisionConfig

Array = np.ndarray


class Key(NamedTuple):
    """A weight: its name in the file, its path in HybridCLIP, the name of its transform."""

    hf_name: str
    nnx_path: str
    transform: str


class Transform(NamedTuple):
    """From torch's array and from Flax's to ours, and from ours to torch's; `vision` has the size of a patch."""

    from_torch: Callable[[Array], Array]
    from_flax: Callable[[Array], Array]
    to_torch: Callable[[Array, VisionConfig], Array]


def _same(array: Array, vision: VisionConfig | None = None) -> Array:
    return array


def _to_convolution(kernel: Array, vision: VisionConfig) -> Array:
    side = vision.patch_size
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _third(number: int) -> Transform:
    """The queries', the keys' or the values' part of one array for all three; `to_torch` makes that part again."""
    return Transform(lambda x: x[number * len(x) // 3 : (number + 1) * len(x) // 3].T, _same, lambda x, vision: x.T)


TRANSFORMS = {
    "same": Transform(_same, _same, _same),
    "transpose": Transform(lambda x: x.T, _same, lambda x, vision: x.T),  # torch's linear layers are [out, in]
    # the convolution over patches, torch's [D, 3, rows, columns], is a linear layer over (row, column, channel)
    "patches": Transform(lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
                         lambda x: x.reshape(-1, x.shape[-1]), _to_convolution),
    # ViT keeps axes for the batch: [1, 1, D] and [1, 1 + P, D]
    "batch axes": Transform(np.squeeze, np.squeeze, lambda x, vision: x.reshape(1, -1, x.shape[-1])),
    "scalar": Transform(lambda x: x.reshape(()), lambda x: x.reshape(()), lambda x, vision: x.reshape(1)),
    "query": _third(0), "key": _third(1), "value": _third(2),
}
_PACKED = {"q": "query", "k": "key", "v": "value"}
# The arrays of a part: suffix in torch, suffix here, transform
_PARTS = {
    "linear": ((".weight", ".kernel", "transpose"), (".bias", ".bias", "same")),
    "matrix": ((".weight", ".kernel", "transpose"),),
    "norm": ((".weight", ".scale", "same"), (".bias", ".bias", "same")),
    "scale": ((".weight", ".scale", "same"),),
    "table": ((".weight", "", "same"),),
    "array": (("", "", "same"),),
    "batched": (("", "", "batch axes"),),
    "patches": ((".weight", ".kernel", "patches"),),
    "patches+": ((".weight", ".kernel", "patches"), (".bias", ".bias", "same")),
    "packed": tuple(("_weight", f".{part}_proj.kernel", kind) for part, kind in _PACKED.items())
              + tuple(("_bias", f".{part}_proj.bias", kind) for part, kind in _PACKED.items()),
    "packed matrix": tuple((".weight", f".{part}_proj.kernel", kind) for part, kind in _PACKED.items()),
}
_CLIP_LAYER = """
    encoder.layers.#.self_attn.q_proj    blocks.#.attn.q_proj    linear
    encoder.layers.#.self_attn.k_proj    blocks.#.attn.k_proj    linear
    encoder.layers.#.self_attn.v_proj    blocks.#.attn.v_proj    linear
    encoder.layers.#.self_attn.out_proj  blocks.#.attn.out_proj  linear
    encoder.layers.#.layer_norm1         blocks.#.ln_1           norm
    encoder.layers.#.mlp.fc1             blocks.#.mlp.fc1        linear
    encoder.layers.#.mlp.fc2             blocks.#.mlp.fc2        linear
    encoder.layers.#.layer_norm2         blocks.#.ln_2           norm
"""
_OPEN_CLIP_LAYER = """
    transformer.resblocks.#.ln_1           blocks.#.ln_1           norm
    transformer.resblocks.#.attn.in_proj   blocks.#.attn           packed
    transformer.resblocks.#.attn.out_proj  blocks.#.attn.out_proj  linear
    transformer.resblocks.#.ln_2           blocks.#.ln_2           norm
    transformer.resblocks.#.mlp.c_fc       blocks.#.mlp.fc1        linear
    transformer.resblocks.#.mlp.c_proj     blocks.#.mlp.fc2        linear
"""
_VIT_LAYER = """
    encoder.layer.#.attention.attention.query  blocks.#.attn.q_proj    linear
    encoder.layer.#.attention.attention.key    blocks.#.attn.k_proj    linear
    encoder.layer.#.attention.attention.value  blocks.#.attn.v_proj    linear
    encoder.layer.#.attention.output.dense     blocks.#.attn.out_proj  linear
"""
_VIT_EMBEDDINGS = """
    embeddings.cls_token                    class_embedding     batched
    embeddings.position_embeddings          position_embedding  batched
    embeddings.patch_embeddings.projection  patch_embedding     patches+
"""
# Each weight of a tower: the family's name of a part, our name, and its arrays in _PARTS. # is the number of a layer.
ROWS = {
    "vision": {
        "clip": f"""
    embeddings.class_embedding     class_embedding     array
    embeddings.position_embedding  position_embedding  table
    embeddings.patch_embedding     patch_embedding     patches
    pre_layrnorm                   ln_pre              norm
    {_CLIP_LAYER}
    post_layernorm                 ln_post             norm
""",
        "siglip": f"""
    embeddings.position_embedding  position_embedding  table
    embeddings.patch_embedding     patch_embedding     patches+
    {_CLIP_LAYER}
    post_layernorm                 ln_post             norm
    head.probe                     head.probe          batched
    head.attention.in_proj         head.attn           packed
    head.attention.out_proj        head.attn.out_proj  linear
    head.layernorm                 head.ln             norm
    head.mlp.fc1                   head.mlp.fc1        linear
    head.mlp.fc2                   head.mlp.fc2        linear
""",
        "vit": f"""
    {_VIT_EMBEDDINGS} {_VIT_LAYER}
    encoder.layer.#.layernorm_before    blocks.#.ln_1     norm
    encoder.layer.#.intermediate.dense  blocks.#.mlp.fc1  linear
    encoder.layer.#.output.dense        blocks.#.mlp.fc2  linear
    encoder.layer.#.layernorm_after     blocks.#.ln_2     norm
    layernorm                           ln_post           norm
    pooler.dense                        pooler            linear
""",
        "dinov2": f"""
    {_VIT_EMBEDDINGS} {_VIT_LAYER}
    encoder.layer.#.norm1                blocks.#.ln_1     norm
    encoder.layer.#.layer_scale1.lambda1  blocks.#.scale_1  array
    encoder.layer.#.norm2                blocks.#.ln_2     norm
    encoder.layer.#.mlp.fc1              blocks.#.mlp.fc1  linear
    encoder.layer.#.mlp.fc2              blocks.#.mlp.fc2  linear
    encoder.layer.#.layer_scale2.lambda1  blocks.#.scale_2  array
    layernorm                            ln_post           norm
""",
        "open_clip": f"""
    class_embedding       class_embedding     array
    positional_embedding  position_embedding  array
    conv1                 patch_embedding     patches
    ln_pre                ln_pre              norm
    {_OPEN_CLIP_LAYER}
    ln_post               ln_post             norm
    proj                  projection.kernel   array
""",
    },
    "text": {
        "bert": """
    embeddings.word_embeddings             word_embedding          table
    embeddings.position_embeddings         position_embedding      table
    embeddings.token_type_embeddings       token_type_embedding    table
    embeddings.LayerNorm                   ln                      norm
    encoder.layer.#.attention.self.query   blocks.#.attn.q_proj    linear
    encoder.layer.#.attention.self.key     blocks.#.attn.k_proj    linear
    encoder.layer.#.attention.self.value   blocks.#.attn.v_proj    linear
    encoder.layer.#.attention.output.dense      blocks.#.attn.out_proj  linear
    encoder.layer.#.attention.output.LayerNorm  blocks.#.ln_1           norm
    encoder.layer.#.intermediate.dense     blocks.#.mlp.fc1        linear
    encoder.layer.#.output.dense           blocks.#.mlp.fc2        linear
    encoder.layer.#.output.LayerNorm       blocks.#.ln_2           norm
    pooler.dense                           pooler                  linear
""",
        "distilbert": """
    embeddings.word_embeddings              word_embedding          table
    embeddings.position_embeddings          position_embedding      table
    embeddings.LayerNorm                    ln                      norm
    transformer.layer.#.attention.q_lin     blocks.#.attn.q_proj    linear
    transformer.layer.#.attention.k_lin     blocks.#.attn.k_proj    linear
    transformer.layer.#.attention.v_lin     blocks.#.attn.v_proj    linear
    transformer.layer.#.attention.out_lin   blocks.#.attn.out_proj  linear
    transformer.layer.#.sa_layer_norm       blocks.#.ln_1           norm
    transformer.layer.#.ffn.lin1            blocks.#.mlp.fc1        linear
    transformer.layer.#.ffn.lin2            blocks.#.mlp.fc2        linear
    transformer.layer.#.output_layer_norm   blocks.#.ln_2           norm
""",
        "modernbert": """
    embeddings.tok_embeddings  word_embedding          table
    embeddings.norm            ln                      scale
    layers.#.attn_norm         blocks.#.ln_1           scale
    layers.#.attn.Wqkv         blocks.#.attn           packed matrix
    layers.#.attn.Wo           blocks.#.attn.out_proj  matrix
    layers.#.mlp_norm          blocks.#.ln_2           scale
    layers.#.mlp.Wi            blocks.#.fc1            matrix
    layers.#.mlp.Wo            blocks.#.fc2            matrix
    final_norm                 ln_final                scale
""",
        "clip": f"""
    embeddings.token_embedding     word_embedding      table
    embeddings.position_embedding  position_embedding  table
    {_CLIP_LAYER}
    final_layer_norm               ln_final            norm
""",
        "siglip": f"""
    embeddings.token_embedding     word_embedding      table
    embeddings.position_embedding  position_embedding  table
    {_CLIP_LAYER}
    final_layer_norm               ln_final            norm
    head                           projection          linear
""",
        "open_clip": f"""
    token_embedding       word_embedding      table
    positional_embedding  position_embedding  array
    {_OPEN_CLIP_LAYER}
    ln_final              ln_final            norm
    text_projection       projection.kernel   array
""",
    },
}
# Source keys that no model here uses
_UNUSED = (
    (r".*\.position_ids|text_model\.embeddings\.token_type_ids", "a buffer that counts 0, 1, 2, …"),
    (r"(text_model\.)?attn_mask", "a buffer with the causal mask"),
    (r"(text_model\.)?(cls|lm_head|classifier|decoder|qa_outputs|vocab_\w+|head\.(dense|norm))\..*",
     "the head of a different task"),
    (r"vision_model\.embeddings\.mask_token", "for masked pictures only"),
)
_FOREIGN = {  # in a whole model, when only one tower is used
    "vision": (r"(text_model|text_projection)\..*|logit_(scale|bias)", "of the text tower, which is not used"),
    "text": (r"(vision_model|visual_projection)\..*|logit_(scale|bias)", "of the image tower, which is not used"),
}
# The beginning of a name in files, and its form in the table; the first that fits
_PREFIXES = {
    "vision": {"vision_model.vision_model.": "vision_model.", "vision_model.": "vision_model.", "vit.": "vision_model.",
               "visual.": "vision_model."},
    "text": {"text_model.text_model.": "text_model.", "text_model.": "text_model.", "bert.": "text_model.",
             "roberta.": "text_model.", "distilbert.": "text_model.", "model.": "text_model.",
             "transformer.embeddings.": "text_model.embeddings.", "transformer.encoder.": "text_model.encoder.",
             "transformer.pooler.": "text_model.pooler.",  # M-CLIP
             "LinearTransformation.": "text_projection.", "text.proj.": "text_projection.",
             "text.transformer.resblocks.": "text_model.transformer.resblocks.", "text.transformer.": "text_model.",
             "text.": "text_model."},
}
# The first part of the names of a tower alone, without a prefix
_ALONE = (r"(embeddings|encoder|pooler|layernorm|pre_layrnorm|post_layernorm|head|layers|final_norm|final_layer_norm|"
          r"transformer|token_embedding|positional_embedding|ln_final|text_projection)(\.|$)")
_SUFFIXES = {".gamma": ".weight", ".beta": ".bias"}  # of the first BERTs, converted from TensorFlow
_FLAX_SUFFIXES = {".kernel": ".weight", ".scale": ".weight", ".embedding": ".weight"}


def family_of(config: VisionConfig | TextConfig) -> str:
    """The family whose names a tower has in transformers."""
    if isinstance(config, VisionConfig):
        if not config.class_token:
            return "siglip"
        return "clip" if config.ln_pre else "dinov2" if config.layer_scale else "vit"
    if config.rotary is not None:
        return "modernbert"
    if config.pre_norm:
        return "siglip" if config.mask == "none" else "clip"
    return "bert" if config.token_types else "distilbert"


def key_table(config: CLIPConfig, vision: str | None = None, text: str | None = None) -> list[Key]:
    """Every weight of a model, in the order of the forward pass. `vision` and `text` are the families of the files, by
    default those of transformers."""
    keys = [*tower_table("vision", vision or family_of(config.vision), config.vision),
            *tower_table("text", text or family_of(config.text), config.text)]
    scalar = "scalar" if not config.vision.class_token else "same"  # SigLIP's have an axis
    keys.append(Key("logit_scale", "logit_scale", scalar))
    return keys if config.logit_bias is None else [*keys, Key("logit_bias", "logit_bias", scalar)]


def tower_table(side: str, family: str, config: VisionConfig | TextConfig) -> list[Key]:
    """Every weight of a tower with its projection, as `family` names them."""
    keys, name = _tower(side, family, config), {"vision": "visual_projection", "text": "text_projection"}[side]
    if any(key.nnx_path == f"{side}.projection.kernel" for key in keys):
        return keys
    parts = {"linear": [("", "", "matrix")], "affine": [("", "", "linear")], "none": [],
             "mlp": [(".0", ".fc1", "matrix"), (".2", ".fc2", "matrix")]}[config.projection]
    return keys + _expanded([(f"{name}{theirs}", f"{side}.projection{ours}", kind) for theirs, ours, kind in parts])


def _tower(side: str, family: str, config: VisionConfig | TextConfig) -> list[Key]:
    rows = [line.split(maxsplit=2) for line in ROWS[side][family].strip().splitlines() if line.strip()]
    if config.pooling != "pooler":
        rows = [row for row in rows if row[1] != "pooler"]
    layer = [row for row in rows if "#" in row[1]]
    inner = [[part.replace("#", str(number)) for part in row] for number in range(config.layers) for row in layer]
    first = rows.index(layer[0]) if layer else len(rows)
    rows = [*rows[:first], *inner, *(row for row in rows[first:] if row not in layer)]
    if family == "modernbert":
        rows = [row for row in rows if row[1] != "blocks.0.ln_1"]
    return _expanded([(f"{side}_model.{theirs}", f"{side}.{ours}", kind.strip()) for theirs, ours, kind in rows])


def _expanded(rows: list[tuple[str, str, str]]) -> list[Key]:
    return [Key(theirs + hf_suffix, ours + suffix, transform)
            for theirs, ours, kind in rows for hf_suffix, suffix, transform in _PARTS[kind]]


def canonical(name: str, sides: tuple[str, ...] = ("vision", "text")) -> tuple[str, bool]:
    """A source key under its name in `key_table`, and whether its array has Flax's layout.

    `sides` are the towers that the source may have. The keys of a single tower have its own prefix or none.
    """
    flax = False
    for old, new in (_SUFFIXES | _FLAX_SUFFIXES).items():
        if name.endswith(old):
            name, flax = name.removesuffix(old) + new, old in _FLAX_SUFFIXES
    for side in sides:
        for prefix, known in _PREFIXES[side].items():
            if name.startswith(prefix):
                return known + name.removeprefix(prefix), flax
    # open_clip has its own text tower beside `visual.` without a prefix
    side = sides[0] if len(sides) == 1 else "text"
    alone = re.match(_ALONE, name) and not name.startswith("text_projection.")
    return (f"{side}_model.{name}" if alone else name), flax


def unused(name: str, config: CLIPConfig, sides: tuple[str, ...] = ("vision", "text")) -> str | None:
    """Why a source key, named as in the table, is known to be unused; None if it is not known."""
    reasons = [*_UNUSED, *(_FOREIGN[side] for side in sides if len(sides) == 1)]
    if config.text.pooling != "pooler":
        reasons.append((r"text_model\.pooler\..*", "only the pooling 'pooler' needs it"))
    return next((reason for pattern, reason in reasons if re.fullmatch(pattern, name)), None)
