"""The way in: `load_clip` opens a whole checkpoint, `load_towers` joins two towers into a new model."""

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import CLIPConfig
from clipid_utils.model.pretrained.families import ConfigError, Key, clip_config, key_table
from clipid_utils.model.pretrained.hub import fetch_checkpoint
from clipid_utils.model.pretrained.parameters import SCALE, Leaf, Source, fill, naming, read_config
from clipid_utils.model.pretrained.processor_files import MODEL_TYPE
from clipid_utils.model.processor import CLIPProcessor

WHOLE_MODELS = ("vision-text-dual-encoder", "hybrid-clip")


def load_clip(
    path: str | os.PathLike, *, revision: str | None = None, tokenizer: str | os.PathLike | None = None,
    dtype=jnp.float32, param_dtype=jnp.float32,
) -> tuple[HybridCLIP, CLIPProcessor]:
    """The model and the processor of a checkpoint.

    `path` is a folder, a training run's folder, the name of a shipped checkpoint ("mini"), or an id on the Hugging Face
    hub, with a `revision` there. It can be a checkpoint of this project, transformers' VisionTextDualEncoderModel with
    the towers that `load_towers` takes, or a hybrid-clip of 2021. `tokenizer` is the folder or id with the tokenizer if
    the checkpoint has none, as in 2021. The model computes in `dtype` and keeps its weights in `param_dtype`: float32,
    or bfloat16 for half the memory; logit_scale and logit_bias are always float32.

    Raises FileNotFoundError if there is no checkpoint. Raises ValueError, with the names, for a config that is not
    supported, for keys or shapes that do not fit it, and for a tokenizer with ids beyond the embedding table.
    """
    folder = fetch_checkpoint(path, revision=revision)
    values = read_config(folder)
    kind = values.pop("model_type", None)
    with naming(folder):
        if kind == MODEL_TYPE:
            source, config = Source(folder), CLIPConfig.from_dict(values)
            leaves = source.take([Key(name, name, "same") for name in source.names if not name.endswith(SCALE)])
        elif kind in WHOLE_MODELS:
            source = Source(folder, "vision", "text")
            config = clip_config(values, source.names.keys(), own_positions=kind != "hybrid-clip")
            leaves = source.take(key_table(config))
            config = _with_scale(config, leaves, linear_scale=kind == "hybrid-clip")
        else:
            raise ConfigError(f"model_type is not {MODEL_TYPE!r} or {' or '.join(map(repr, WHOLE_MODELS))}, but "
                              f"{kind!r}: if it is one tower, use load_towers")
    unknown = source.unknown(config)
    model = fill(HybridCLIP, config, leaves, unknown, folder, dtype, param_dtype, native=kind == MODEL_TYPE)
    text_folder = folder if tokenizer is None else fetch_checkpoint(tokenizer, weights=False)
    # save_clip without a tokenizer writes neither of its files; if only one is there, the folder is damaged
    needed = tokenizer is not None or kind == MODEL_TYPE and (folder / "tokenizer_config.json").is_file()
    return model, _processor(model.config, folder, text_folder, needed)


def load_towers(
    vision: str | os.PathLike, text: str | os.PathLike, **options
) -> tuple[HybridCLIP, CLIPProcessor]:
    """A new model of two pretrained towers, and its processor.

    `vision` is the folder or hub id of transformers' CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection or
    ViTModel, also with a head; `text` that of BERT, RoBERTa or XLM-RoBERTa. The options:

    - `embed_dim`: the common space's size; by default that of the image projection in `vision`, or 512;
    - `pooling`: "pooler" (default) or "mean", of the text tower;
    - `dtype`, `param_dtype`: as in `load_clip`;
    - `rngs`: draws the new parameters, by default from seed 0: the text projection, the image projection if `vision`
      has none of size `embed_dim`, and a pooler if the text tower has none (with a warning).

    Raises FileNotFoundError if a tower is not there. Raises ValueError, with the names, for towers of a different kind,
    weights that do not fit config.json, and a tokenizer with ids beyond the embedding table.
    """
    model = HybridCLIP.from_towers(vision, text, **options)
    folders = fetch_checkpoint(vision, weights=False), fetch_checkpoint(text, weights=False)
    return model, _processor(model.config, *folders, True)


def _processor(config: CLIPConfig, folder: Path, text_folder: Path, needs_tokenizer: bool) -> CLIPProcessor:
    """The processor of a model. Raises ValueError if its ids do not fit the text tower."""
    processor = CLIPProcessor.load(folder, text_folder, image_size=config.vision.image_size,
                                   max_length=config.text.max_length, needs_tokenizer=needs_tokenizer)
    if processor.tokenizer is not None:
        ids = processor.tokenizer.get_vocab().values()
        if (largest := max(ids, default=0)) >= config.text.vocab_size:
            raise ValueError(f"the tokenizer in {text_folder} has {len(ids)} tokens with ids up to {largest}, and the "
                             f"text tower's embedding table has {config.text.vocab_size} rows: use the tower's own "
                             "tokenizer, load_clip(…, tokenizer=…)")
    return processor


def _with_scale(config: CLIPConfig, leaves: dict[str, Leaf], *, linear_scale: bool) -> CLIPConfig:
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
