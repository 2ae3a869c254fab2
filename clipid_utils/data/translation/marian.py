"""A Marian model in Hugging Face's form (opus-mt, what `transformers` trains) as CTranslate2 wants it, without torch.

CTranslate2's own converter builds the model in torch to read its weights. Here they come out of their file as numpy
arrays (model/pretrained/weights.py). A model that `transformers` trained may start from another embedding than zero,
which that converter drops, and with it the first word; this one keeps it. The decoder gets the embeddings of the target
language's pieces alone: the vocabulary has those of both languages, and the other half would cost time for nothing.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import numpy as np
import sentencepiece
from ctranslate2.specs import TransformerSpec
from ctranslate2.specs.common_spec import Activation, LayerNormSpec, LinearSpec
from filelock import FileLock
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from clipid_utils.model.pretrained.weights import read_weights
from clipid_utils.paths import CACHE

PIECES = ("source.spm", "target.spm")  # the two languages' SentencePiece models
FILES = ("config.json", "vocab.json", *PIECES)
CONVERTER = 2  # counts up where another folder comes out of the same model
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ACTIVATIONS = {"relu": Activation.RELU, "swish": Activation.SWISH, "silu": Activation.SWISH, "gelu": Activation.GELU}
_ATTENTION = ("q_proj", "k_proj", "v_proj")


def converted_folder(path_or_id: str | os.PathLike, quantization: str, cache: Path | None = None) -> Path:
    """A folder that CTranslate2 opens, with `source.spm` and `target.spm` beside: converted on the first use.

    `path_or_id` is a folder of CTranslate2's (returned as it is, with what quantization it has), one that
    `save_pretrained` wrote, or a repository on the Hugging Face hub. What is converted is kept in `cache`,
    data/cache/translators by default. Raises FileNotFoundError and ValueError that say what is missing or does not fit.
    """
    folder = Path(path_or_id).expanduser()
    if not folder.is_dir():
        folder = _fetched(os.fspath(path_or_id))
    if (folder / "model.bin").is_file():
        for name in PIECES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: copy it there from the folder that was converted")
        return folder
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no translation model, it has no {name}: name a folder that "
                                    "MarianMTModel's and MarianTokenizer's save_pretrained wrote, or one converted")
    cache = Path(cache or CACHE / "translators")
    out = cache / f"{folder.resolve().name[:40]}-{_fingerprint(folder)}-{quantization}"
    if not out.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{out}.lock"):  # a second process waits and finds it done
            if not out.is_dir():
                convert(folder, out, quantization)
    return out


def convert(folder: Path, out: Path, quantization: str) -> None:
    """Converts a folder of Hugging Face's form into `out`, which appears only when it is whole; raises ValueError for
    a model that is no Marian model or lacks a weight."""
    spec = _spec(folder)
    spec.validate()
    spec.optimize(quantization=quantization)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    spec.save(str(partial))
    for name in PIECES:
        shutil.copyfile(folder / name, partial / name)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)


def _fetched(name: str) -> Path:
    """The hub's repository in its cache: what a conversion needs of it, of the weights one form."""
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*FILES, "model.bin", "*_vocabulary.json",
                                                                              WEIGHTS[0]]))
        if not any((folder / file).is_file() for file in ("model.bin", WEIGHTS[0])):
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[*FILES, WEIGHTS[1]]))
        return folder
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder nor an id on the hub, 'owner/name': correct it"
                                ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        said = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise FileNotFoundError(f"{name!r} is no folder and could not be fetched from the hub ({said}): correct the "
                                "name, call again once the hub is there, or give a folder") from error


def _fingerprint(folder: Path) -> str:
    """Changes with the folder's place and with any of its files."""
    digest = hashlib.sha256(f"{CONVERTER} {folder.resolve()}".encode())
    for name in (*FILES, *WEIGHTS):
        if (folder / name).is_file():
            stat = os.stat(folder / name)
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def _spec(folder: Path) -> TransformerSpec:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "marian":
        raise ValueError(f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}, not 'marian': name a "
                         "Marian model, or convert it with ct2-transformers-converter and name what that wrote")
    if not config.get("share_encoder_decoder_embeddings", True):
        raise ValueError(f"{folder / 'config.json'}: the two languages have embeddings of their own; convert it with "
                         "ct2-transformers-converter and name what that wrote")
    activation = config["activation_function"]
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{folder / 'config.json'}: activation_function {activation!r} is none of "
                         f"{', '.join(_ACTIVATIONS)}")
    weights, tokens = _named_weights(folder), _tokens(folder)
    spec = TransformerSpec.from_config(
        (config["encoder_layers"], config["decoder_layers"]), config["encoder_attention_heads"], pre_norm=False,
        activation=_ACTIVATIONS[activation],
    )
    embedding, bias = weights["model.shared.weight"], weights.get("final_logits_bias")
    if len(embedding) != len(tokens):
        raise ValueError(f"{folder / 'vocab.json'} has {len(tokens)} tokens and the model {len(embedding)} embeddings")
    bias = np.zeros(len(tokens), np.float32) if bias is None else bias.reshape(-1)
    # <pad>, the last token, only starts the decoder. Marian starts from a zero embedding, and so do opus-mt's models;
    # in one that was trained by `transformers` its row has learnt with the others.
    from_zero = not np.any(embedding[-1])
    if from_zero:
        embedding, bias, tokens = embedding[:-1], bias[:-1], tokens[:-1]
    else:
        bias = np.append(bias[:-1], np.float32(-1e9))  # never said
    spec.encoder.embeddings[0].weight = embedding
    scale = float(np.sqrt(config["d_model"])) if config.get("scale_embedding") else 1.0
    for part, name in ((spec.encoder, "encoder"), (spec.decoder, "decoder")):
        part.scale_embeddings = scale
        part.position_encodings.encodings = _positions(config["max_position_embeddings"], config["d_model"])
        for number, layer in enumerate(part.layer):
            _fill_layer(layer, weights, f"model.{name}.layers.{number}.")
    said = _target_tokens(folder, tokens)
    spec.decoder.start_from_zero_embedding = from_zero
    spec.decoder.embeddings.weight = spec.decoder.projection.weight = embedding[said]
    if np.any(bias[said]):
        spec.decoder.projection.bias = bias[said]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary([tokens[i] for i in said])
    start = "</s>" if from_zero else "<pad>"
    for key, token in {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "decoder_start": start}.items():
        setattr(spec.config, f"{key}_token", token)
    return spec


def _named_weights(folder: Path) -> Mapping[str, np.ndarray]:
    stored = read_weights(folder)
    if "model.shared.weight" not in stored:
        raise ValueError(f"{folder}: its weights have no 'model.shared.weight' but {', '.join(list(stored)[:3])} …: "
                         f"put {' or '.join(WEIGHTS)} there, and no other library's file beside")

    class Weights(dict):
        def __missing__(self, key: str):
            raise ValueError(f"{folder}: its weights lack {key!r}, which its config.json asks for")

    return Weights({key: np.array(stored[key], np.float32) for key in stored if stored[key].dtype.kind in "fV"})


def _tokens(folder: Path) -> list[str]:
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    tokens = sorted(vocabulary, key=vocabulary.get)
    if tokens[-1] != "<pad>" or sorted(vocabulary.values()) != list(range(len(tokens))):
        raise ValueError(f"{folder / 'vocab.json'}: the tokens must be numbered from 0 on, with '<pad>' the last")
    return tokens


def _target_tokens(folder: Path, tokens: list[str]) -> list[int]:
    """The numbers of the target language's pieces and of what is no piece of a text."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / PIECES[1]))
    known, special = {pieces.id_to_piece(number) for number in range(len(pieces))}, {"</s>", "<unk>", "<pad>"}
    if not (known - special) & set(tokens):
        raise ValueError(f"{folder / PIECES[1]}: none of its pieces is in vocab.json: take both from one model")
    return [number for number, token in enumerate(tokens) if token in known | special]


def _positions(length: int, width: int) -> np.ndarray:
    """Marian's sinusoids [length, width]: all sines, then all cosines."""
    angles = np.arange(length)[:, None] / np.power(10000, 2 * (np.arange(width) // 2) / width)
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1).astype(np.float32)


def _fill_layer(layer, weights: Mapping[str, np.ndarray], name: str) -> None:
    attentions = [(layer.self_attention, "self_attn", (_ATTENTION,))]
    if hasattr(layer, "attention"):
        attentions.append((layer.attention, "encoder_attn", (_ATTENTION[:1], _ATTENTION[1:])))
    for spec, attention, fused in attentions:
        for linear, parts in zip(spec.linear, (*fused, ("out_proj",)), strict=True):
            _fill_linear(linear, weights, *(f"{name}{attention}.{part}" for part in parts))
        _fill_norm(spec.layer_norm, weights, f"{name}{attention}_layer_norm")
    _fill_linear(layer.ffn.linear_0, weights, f"{name}fc1")
    _fill_linear(layer.ffn.linear_1, weights, f"{name}fc2")
    _fill_norm(layer.ffn.layer_norm, weights, f"{name}final_layer_norm")


def _fill_linear(linear: LinearSpec, weights: Mapping[str, np.ndarray], *names: str) -> None:
    linear.weight = np.concatenate([weights[f"{name}.weight"] for name in names])
    linear.bias = np.concatenate([weights[f"{name}.bias"] for name in names])


def _fill_norm(norm: LayerNormSpec, weights: Mapping[str, np.ndarray], name: str) -> None:
    norm.gamma, norm.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]
