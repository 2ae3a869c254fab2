"""Reads how a checkpoint folder, of this project or of transformers, prepares pictures and texts.

The results are CLIPProcessor's arguments. Known are CLIP's and ViT's preprocessor_config.json, new and old, and the
tokenizers of BERT, RoBERTa and XLM-RoBERTa.
"""

import re
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from clipid_utils import files

# Mean and standard deviation of OpenAI's CLIP (Radford et al. 2021), in RGB
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MODEL_TYPE = "clip-indonesian"  # in the config.json of this project's own checkpoints
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")
NO_SIDES = (0, 0)


def read_preprocessor(folder: Path, image_size: int | None) -> dict:
    """How pictures are resized and normalised; without preprocessor_config.json like CLIP's, to `image_size`.

    Raises FileNotFoundError if that is None too, and ValueError for pictures that would not be square.
    """
    path, newest = folder / "preprocessor_config.json", folder / "processor_config.json"
    images = read_json(path)
    if not images and (images := read_json(newest).get("image_processor") or {}):
        path = newest
    if not images and image_size is None:
        raise FileNotFoundError(f"{path} is missing: is {folder} a checkpoint?")
    if not images:
        return {"image_size": image_size}
    # null means not stated, except for do_…, where it means false
    images = {name: value for name, value in images.items() if value is not None or name.startswith("do_")}
    kind = images.get("image_processor_type") or images.get("feature_extractor_type") or ""
    crops = images.get("do_center_crop", "crop_size" in images or "CLIP" in kind)
    like_clip = "CLIP" in kind or (not kind and crops)  # the defaults are CLIP's or ViT's
    resize, crop = images.get("size", 224), images.get("crop_size", 224)
    if isinstance(resize, int) and not like_clip:
        resize = (resize, resize)
    elif isinstance(resize, dict):
        resize = resize["shortest_edge"] if set(resize) == {"shortest_edge"} else _sides(resize)
    elif isinstance(resize, list):
        resize = tuple(resize)
    made = ((crop, crop) if isinstance(crop, int) else _sides(crop)) if crops else resize
    known = images.get("do_resize", True) and resize != NO_SIDES and isinstance(made, tuple) and made != NO_SIDES
    if not known or made[0] != made[1]:
        raise ValueError(f"{path}: size {images.get('size')}, crop_size {images.get('crop_size')}, do_center_crop "
                         f"{crops}, do_resize {images.get('do_resize', True)} make no squares, which the model needs")
    means = images.get("image_mean", IMAGE_MEAN if like_clip else 0.5)
    stds = images.get("image_std", IMAGE_STD if like_clip else 0.5)
    if not images.get("do_normalize", True):
        means, stds = 0.0, 1.0
    # CLIPProcessor divides by 255; a different factor in the file goes into the mean and the deviation
    scale = 255 * (images.get("rescale_factor", 1 / 255) if images.get("do_rescale", True) else 1)
    means, stds = (tuple(float(value) / scale for value in np.broadcast_to(values, 3)) for values in (means, stds))
    return {"image_size": made[0], "resize": resize, "resample": images.get("resample", 3 if like_clip else 2),
            "image_mean": means, "image_std": stds}


def _sides(size: dict) -> tuple[int, int]:
    return (size["height"], size["width"]) if {"height", "width"} <= set(size) else NO_SIDES


def read_tokenizer(folder: Path, max_length: int) -> dict:
    """The tokenizer, opened by AutoTokenizer if it is not this project's own, and how many tokens a text may have.

    That number is the file's model_max_length, or `max_length` if it is less. Raises FileNotFoundError for missing
    files and ValueError for files that cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder / 'tokenizer.json'} is missing: is {folder} a checkpoint?")
    settings, config = read_json(folder / "tokenizer_config.json"), read_json(folder / "config.json")
    if not settings and not config:
        raise FileNotFoundError(f"{folder / 'tokenizer_config.json'} is missing: is {folder} a checkpoint?")
    tokens = {name: token for name, token in settings.items() if name.endswith("_token") and isinstance(token, str)}
    ours = settings.get("tokenizer_class") == "PreTrainedTokenizerFast" and "pad_token" in tokens
    try:
        if ours and config.get("model_type", MODEL_TYPE) == MODEL_TYPE:  # importing transformers takes seconds
            found = {side: settings[side] for side in ("padding_side", "truncation_side") if side in settings}
            found |= {"tokenizer": Tokenizer.from_file(str(folder / "tokenizer.json")), "special_tokens": tokens}
            stated = settings.get("model_max_length")
        else:
            files.import_transformers()
            from transformers import AutoTokenizer

            # if config.json has two towers, AutoTokenizer must be told the text tower's type
            kind = None if "tokenizer_class" in settings else model_type(part(config, "text") or {})
            named = {} if kind is None else {"tokenizer_type": kind}
            found = {"tokenizer": AutoTokenizer.from_pretrained(folder, **named)}
            stated = found["tokenizer"].model_max_length
    except Exception as error:  # the two libraries raise anything for a broken file
        raise ValueError(f"{folder}: its tokenizer cannot be read ({error}): fetch the checkpoint again") from error
    return {**found, "max_length": int(min(stated or max_length, max_length))}


def model_type(config: dict) -> str | None:
    """A config's model_type; some configs of 2020 have none, then the type of their `architectures`."""
    names = config.get("architectures") or [""]
    known = {"Bert": "bert", "Roberta": "roberta", "XLMRoberta": "xlm-roberta", "ViT": "vit"}
    return config.get("model_type") or known.get(re.match("(XLMRoberta|Roberta|Bert|ViT|)", str(names[0]))[1])


def part(config: dict, side: str) -> dict | None:
    """The "vision" or "text" part of a CLIP's config; an old `…_config_dict` replaces `…_config` as in transformers."""
    old = config.get(f"{side}_config_dict")
    return config.get(f"{side}_config") if old is None else old


def read_json(path: Path) -> dict:
    """The file's object, {} if there is no file. Raises ValueError that names the file if it is not an object."""
    if not path.is_file():
        return {}
    values = files.read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} cannot be read (it is not an object): fetch or save the checkpoint again")
    return values
