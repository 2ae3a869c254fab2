"""Opens checkpoints: `load_clip` opens a whole one, and `load_towers` joins two towers into a new model."""

import os
from pathlib import Path

import jax.numpy as jnp

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import CLIPConfig
from clipid_utils.model.pretrained import families
from clipid_utils.model.pretrained.hub import fetch_checkpoint
from clipid_utils.model.pretrained.keys import Key, key_table
from clipid_utils.model.pretrained.parameters import SCALE, Source, fill, naming, read_config, with_scale
from clipid_utils.model.pretrained.processor_files import MODEL_TYPE, OPEN_CLIP, TextRules
from clipid_utils.model.pretrained.towers import text_rules
from clipid_utils.model.processor import CLIPProcessor

WHOLE_MODELS = (families.DUAL_ENCODER, "hybrid-clip", *families.WHOLE)


def load_clip(
    path: str | os.PathLike, *, revision: str | None = None, tokenizer: str | os.PathLike | None = None,
    dtype=jnp.float32, param_dtype=jnp.float32,
) -> tuple[HybridCLIP, CLIPProcessor]:
    """The model and the processor of a checkpoint.

    `path` is a folder, a training run's folder, the name of a shipped checkpoint ("mini"), or an id on the Hugging Face
    hub, with a `revision` there. The checkpoint can be:

    - one of this project;
    - transformers' CLIPModel, MetaClip2Model, SiglipModel (SigLIP and SigLIP 2 of one resolution), or its
      VisionTextDualEncoderModel with the towers that `load_towers` takes;
    - open_clip's, with its own text tower or one of transformers, whose config is fetched by its name;
    - a hybrid-clip of 2021.

    `tokenizer` is the folder or id with the tokenizer if the checkpoint has none, as in 2021. The model computes in
    `dtype` and keeps its weights in `param_dtype`: float32, or bfloat16 for half the memory; logit_scale and logit_bias
    are always float32.

    Raises FileNotFoundError if there is no checkpoint. Raises ValueError, with the names, for a config that is not
    supported, for keys or shapes that do not fit it, and for a tokenizer with ids beyond the embedding table.
    """
    folder = fetch_checkpoint(path, revision=revision)
    open_clip = (folder / OPEN_CLIP).is_file()
    values = {} if open_clip and not (folder / "config.json").is_file() else read_config(folder)
    kind, native, max_length = values.pop("model_type", None), False, None
    if open_clip and kind not in (MODEL_TYPE, *WHOLE_MODELS):
        source, config, leaves, max_length = _open_clip(folder)
    else:
        with naming(folder):
            if kind == MODEL_TYPE:
                native, source, config = True, Source(folder), CLIPConfig.from_dict(values)
                leaves = source.take([Key(name, name, "same") for name in source.names if not name.endswith(SCALE)])
            elif kind in WHOLE_MODELS:
                source = Source(folder, "vision", "text")
                config = families.clip_config(values, source.names.keys(), kind, own_positions=kind != "hybrid-clip")
                leaves = source.take(key_table(config))
                config = with_scale(config, leaves, linear_scale=kind == "hybrid-clip")
            else:
                families.refuse(values, kind)
                known = " or ".join(map(repr, (MODEL_TYPE, *WHOLE_MODELS)))
                raise families.ConfigError(f"model_type is not {known}, but {kind!r}: if it is one tower, use "
                                           "load_towers")
    unknown = source.unknown(config)
    model = fill(HybridCLIP, config, leaves, unknown, folder, dtype, param_dtype, native=native)
    text_folder = folder if tokenizer is None else fetch_checkpoint(tokenizer, weights=False)
    # save_clip without a tokenizer writes neither of its files; if only one is there, the folder is damaged
    needed = tokenizer is not None or native and (folder / "tokenizer_config.json").is_file()
    return model, _processor(model.config, folder, text_folder, needed, TextRules(max_length=max_length))


def _open_clip(folder: Path):
    """The source, the config and the parameters of open_clip's folder, and how many tokens its texts have."""
    values = read_config(folder, OPEN_CLIP).get("model_cfg") or {}
    with naming(folder, OPEN_CLIP):
        name = (values.get("text_cfg") or {}).get("hf_model_name")
        hf_text = read_config(fetch_checkpoint(name, weights=False)) if name else None
        config = families.open_clip_config(values, hf_text)
    source = Source(folder, "vision", "text")
    leaves = source.take(key_table(config, "open_clip", None if name else "open_clip"))
    return source, with_scale(config, leaves, linear_scale=False), leaves, values["text_cfg"].get("context_length", 77)


def load_towers(
    vision: str | os.PathLike, text: str | os.PathLike, *, prefix: str | None = None, **options
) -> tuple[HybridCLIP, CLIPProcessor]:
    """A new model of two pretrained towers, and its processor.

    `vision` is the folder or hub id of an image tower of transformers: CLIP's, Meta CLIP 2's, SigLIP's, ViT or DINOv2,
    alone, with a head or in a whole model. `text` is that of a text tower: BERT, RoBERTa, XLM-RoBERTa, DistilBERT,
    ModernBERT, CLIP's, Meta CLIP 2's or SigLIP's, M-CLIP (the config of its base is fetched by its name), or a model of
    sentence-transformers. If both have a projection to the same space, such as CLIP's image tower and M-CLIP, the model
    is ready without training. The options:

    - `embed_dim`: the common space's size; by default that of the projection in `vision`, else in `text`, or 512;
    - `pooling`: "pooler" (BERT's default), "mean" (DistilBERT's and ModernBERT's) or "first", of the text tower; models
      that were trained with their own pooling and projection keep it;
    - `prefix`: put before each text, such as "query: " for e5; by default the prompt that the folder names as such;
    - `dtype`, `param_dtype`: as in `load_clip`;
    - `rngs`: draws the new parameters, by default from seed 0: a projection where a tower has none of size `embed_dim`,
      and a pooler if the text tower has none (with a warning).

    Raises FileNotFoundError if a tower is not there. Raises ValueError, with the names, for towers of a different kind,
    weights that do not fit config.json, and a tokenizer with ids beyond the embedding table.
    """
    model = HybridCLIP.from_towers(vision, text, **options)
    folder, text_folder = fetch_checkpoint(vision, weights=False), fetch_checkpoint(text, weights=False)
    return model, _processor(model.config, folder, text_folder, True, text_rules(text_folder, prefix))


def _processor(
    config: CLIPConfig, folder: Path, text_folder: Path, needs_tokenizer: bool, rules: TextRules
) -> CLIPProcessor:
    """The processor of a model. Raises ValueError if its ids do not fit the text tower."""
    text_folder = rules.folder or text_folder
    limit = min(config.text.max_length, rules.max_length or config.text.max_length)
    processor = CLIPProcessor.load(folder, text_folder, image_size=config.vision.image_size, max_length=limit,
                                   needs_tokenizer=needs_tokenizer, rules=rules,
                                   fixed_length=config.text.mask == "none")
    if processor.tokenizer is not None:
        ids = processor.tokenizer.get_vocab().values()
        if (largest := max(ids, default=0)) >= config.text.vocab_size:
            raise ValueError(f"the tokenizer in {text_folder} has {len(ids)} tokens with ids up to {largest}, and the "
                             f"text tower's embedding table has {config.text.vocab_size} rows: use the tower's own "
                             "tokenizer, load_clip(…, tokenizer=…)")
    return processor
