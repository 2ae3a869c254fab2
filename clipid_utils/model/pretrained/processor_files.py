"""Reads how a checkpoint folder, of this project, of transformers or of open_clip, prepares pictures and texts.

The results are CLIPProcessor's arguments. It knows the image processors of CLIP, ViT, DINOv2 and SigLIP, new and old,
the tokenizers that transformers has as one of `tokenizers`, and SigLIP's.
"""

import json
import re
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from clipid_utils import files

# Mean and standard deviation of OpenAI's CLIP (Radford et al. 2021), in RGB
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
MODEL_TYPE = "clip-indonesian"  # in the config.json of this project's own checkpoints
OPEN_CLIP = "open_clip_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model",
                   "tokenizer.model")
NO_SIDES = (0, 0)


class TextRules(NamedTuple):
    """How texts are prepared beside a tokenizer's own files; `folder` is that of the tokenizer."""

    folder: Path | None = None
    prefix: str = ""
    max_length: int | None = None
    lower: bool = False


NO_RULES = TextRules()


def read_preprocessor(folder: Path, image_size: int | None) -> dict:
    """How pictures are resized and normalised. Without preprocessor_config.json, this is as in CLIP, to `image_size`.

    Raises FileNotFoundError if `image_size` is None too, and ValueError for pictures that would not be square.
    """
    path, newest = folder / "preprocessor_config.json", folder / "processor_config.json"
    images = read_json(path)
    if not images and (images := read_json(newest).get("image_processor") or {}):
        path = newest
    if not images and (images := _open_clip_pictures(read_json(folder / OPEN_CLIP), image_size)):
        path = folder / OPEN_CLIP
    if not images and image_size is None:
        raise FileNotFoundError(f"{path} is missing: is {folder} a checkpoint?")
    if not images:
        return {"image_size": image_size}
    # null means not stated, except for do_…, where it means false
    images = {name: value for name, value in images.items() if value is not None or name.startswith("do_")}
    kind = images.get("image_processor_type") or images.get("feature_extractor_type") or ""
    crops = images.get("do_center_crop", "crop_size" in images or "CLIP" in kind or "Bit" in kind)
    like_clip = "CLIP" in kind or "Bit" in kind or (not kind and crops)  # the defaults are CLIP's or ViT's
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
    bicubic = like_clip or "Siglip" in kind
    return {"image_size": made[0], "resize": resize, "resample": images.get("resample", 3 if bicubic else 2),
            "image_mean": means, "image_std": stds}


def _open_clip_pictures(values: dict, image_size: int | None) -> dict:
    """open_clip's preprocess_cfg in the form of CLIPImageProcessor's config; {} if there is none."""
    settings = values.get("preprocess_cfg")
    if settings is None or image_size is None:
        return {}
    size = settings.get("size", image_size)
    side = size if isinstance(size, int) else size[0]
    sides = {"height": side, "width": side}
    modes = {"shortest": {"shortest_edge": side}, "squash": sides}
    resize = modes.get(settings.get("resize_mode", "shortest"))
    if resize is None:
        raise ValueError(f"{OPEN_CLIP}: resize_mode is {settings['resize_mode']!r}, not one of {', '.join(modes)}")
    resample = {"bicubic": 3, "bilinear": 2, "random": 3}[settings.get("interpolation", "bicubic")]
    return {"image_processor_type": "CLIPImageProcessor", "size": resize, "crop_size": sides, "resample": resample,
            "image_mean": settings.get("mean"), "image_std": settings.get("std")}


def _sides(size: dict) -> tuple[int, int]:
    return (size["height"], size["width"]) if {"height", "width"} <= set(size) else NO_SIDES


def read_tokenizer(folder: Path, max_length: int, rules: TextRules = NO_RULES, siglip: bool = False) -> dict:
    """The tokenizer, opened by AutoTokenizer if it is not this project's own, and how many tokens a text may have.

    That number is the file's model_max_length, or `max_length` if it is less. The rules' prefix and lower-casing become
    part of the tokenizer. `siglip` says that it is SigLIP's, for folders that do not say so themselves. SigLIP 2 was
    trained on lower-cased texts, so its tokenizer, Gemma's, lower-cases always; that of the first SigLIP has the key
    do_lower_case. Raises FileNotFoundError for missing files and ValueError for files that cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder / 'tokenizer.json'} is missing: is {folder} a checkpoint?")
    settings, config = read_json(folder / "tokenizer_config.json"), read_json(folder / "config.json")
    if not settings and not config:
        raise FileNotFoundError(f"{folder / 'tokenizer_config.json'} is missing: is {folder} a checkpoint?")
    tokens = {name: token for name, token in settings.items() if name.endswith("_token") and isinstance(token, str)}
    named = str(settings.get("tokenizer_class")).removesuffix("Fast")
    siglip |= str(config.get("model_type")).removesuffix("_text_model") == "siglip" or named == "SiglipTokenizer"
    ours = settings.get("tokenizer_class") == "PreTrainedTokenizerFast" and "pad_token" in tokens
    try:
        if ours and config.get("model_type", MODEL_TYPE) == MODEL_TYPE:  # importing transformers takes seconds
            found = {side: settings[side] for side in ("padding_side", "truncation_side") if side in settings}
            found |= {"tokenizer": Tokenizer.from_file(str(folder / "tokenizer.json")), "special_tokens": tokens}
            stated = settings.get("model_max_length")
        elif siglip and (folder / "spiece.model").is_file():
            found, stated = siglip_tokenizer(folder / "spiece.model", settings), None
        else:
            files.import_transformers()
            from transformers import AutoTokenizer

            # if config.json has two towers, AutoTokenizer must be told the text tower's type
            kind = None if "tokenizer_class" in settings else model_type(part(config, "text") or {})
            named = {} if kind not in ("bert", "roberta", "xlm-roberta") else {"tokenizer_type": kind}
            found = {"tokenizer": AutoTokenizer.from_pretrained(folder, **named)}
            stated = None if siglip else found["tokenizer"].model_max_length
    except Exception as error:  # the two libraries raise anything for a broken file
        raise ValueError(f"{folder}: its tokenizer cannot be read ({error}): fetch the checkpoint again") from error
    backend = getattr(found["tokenizer"], "backend_tokenizer", found["tokenizer"])
    gemma = siglip and isinstance(backend.model, models.BPE)
    _add_rules(backend, rules._replace(lower=rules.lower or gemma))
    return {**found, "max_length": int(min(stated or max_length, max_length))}


def _add_rules(tokenizer: Tokenizer, rules: TextRules) -> None:
    """Puts the rules' prefix and lower-casing before the tokenizer's own normaliser."""
    own = tokenizer.normalizer
    first = [normalizers.Prepend(rules.prefix)] if rules.prefix else []
    first += [normalizers.Lowercase()] if rules.lower and "Lowercase()" not in str(own) else []
    if first:
        tokenizer.normalizer = normalizers.Sequence([*first, *([] if own is None else [own])])


def text_prefix(tokenizer: Tokenizer) -> str:
    """The prefix that a tokenizer's normaliser puts before a text; "" if there is none.

    ▁, which some put there, is the mark of a space and no prefix.
    """
    own = tokenizer.normalizer  # not iterated: in tokenizers 0.21.0 that has no end
    parts = [] if own is None else json.loads(own.__getstate__()).get("normalizers", [])
    prefixes = (part["prepend"] for part in parts if part["type"] == "Prepend")
    return next((prefix for prefix in prefixes if prefix != "▁"), "")


def without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of the tokenizer without its `text_prefix`."""
    values, prefix = json.loads(tokenizer.to_str()), text_prefix(tokenizer)
    parts = values["normalizer"]["normalizers"]
    values["normalizer"]["normalizers"] = [part for part in parts if part.get("prepend") != prefix]
    return Tokenizer.from_str(json.dumps(values))


def siglip_tokenizer(path: Path, settings: dict) -> dict:
    """SigLIP's tokenizer, which transformers has without one of `tokenizers`: texts are lower-cased (unless
    do_lower_case is false) and lose their punctuation, and T5's pieces follow."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, pieces.unk_id(), proto.trainer_spec.byte_fallback))
    chars = proto.normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = normalizers.Sequence([
        *([normalizers.Lowercase()] if settings.get("do_lower_case", True) else []),
        normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(),
        *([normalizers.Precompiled(chars), normalizers.Strip(left=False)] if chars else []),
        normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    end = "</s>"
    tokenizer.add_special_tokens([AddedToken(end, normalized=False, special=True)])
    ends = [(end, pieces.piece_to_id(end))]
    tokenizer.post_processor = processors.TemplateProcessing(f"$A {end}", special_tokens=ends)
    tokens = {"eos_token": end, "unk_token": "<unk>", "pad_token": end}
    tokens |= {name: value for name, value in settings.items() if name in tokens and isinstance(value, str)}
    return {"tokenizer": tokenizer, "special_tokens": tokens}


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
