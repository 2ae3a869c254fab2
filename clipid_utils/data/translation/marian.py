"""A Marian model of Hugging Face's form (opus-mt, or one that `transformers` trained) for CTranslate2, without torch.

CTranslate2's own converter builds the model in torch to read its weights. Here the weights come out of their file as
NumPy arrays. Two things differ. A model that `transformers` trained may start from an embedding other than zero; that
converter drops it and so loses the first word; this one keeps it. The decoder gets only the embeddings of the target
language's pieces: the vocabulary has the pieces of both languages, and the other half would cost time.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from clipid_utils.data.prepared import prepare_once
from clipid_utils.files import file_identity, need, read_json, whole_folder
from clipid_utils.model.pretrained.hub import snapshot
from clipid_utils.paths import CACHE

ctranslate2, sentencepiece = (need(name, "translate") for name in ("ctranslate2", "sentencepiece"))

SENTENCE_PIECES = ("source.spm", "target.spm")  # the SentencePiece models of the two languages
FILES = ("config.json", "vocab.json", *SENTENCE_PIECES)
CONVERTER = 2  # to be increased when the same model converts to a different folder
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ACTIVATIONS = {"relu": "RELU", "swish": "SWISH", "silu": "SWISH", "gelu": "GELU"}
_ATTENTION = ("q_proj", "k_proj", "v_proj")


def model_folder(path_or_id: str | os.PathLike) -> Path:
    """The folder of a model: of CTranslate2's form, or of Hugging Face's, which `save_pretrained` writes.

    A repository on the Hugging Face hub is fetched, with one form of weights, or found in the hub's cache. Raises
    FileNotFoundError if there is no such folder or repository, or a file of it is missing, and ConnectionError if the
    hub cannot be reached.
    """
    folder = Path(path_or_id).expanduser()
    if not folder.is_dir():
        folder = snapshot(os.fspath(path_or_id), None, [*FILES, "model.bin", "*_vocabulary.json", WEIGHTS[0]])
        if not any((folder / file).is_file() for file in ("model.bin", WEIGHTS[0])):
            folder = snapshot(os.fspath(path_or_id), None, [*FILES, WEIGHTS[1]])
    for name in SENTENCE_PIECES if (folder / "model.bin").is_file() else FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}: name a folder that save_pretrained of MarianMTModel and "
                                    f"MarianTokenizer wrote, or a converted one with {' and '.join(SENTENCE_PIECES)}")
    return folder


def converted_folder(folder: Path, quantization: str) -> Path:
    """A folder that CTranslate2 opens, with source.spm and target.spm; the model is converted at its first use.

    `folder` is one of `model_folder`. One of CTranslate2's is returned as it is, with the quantization that it has.
    Conversions are kept in data/cache/translators. Raises ValueError if something does not fit.
    """
    if (folder / "model.bin").is_file():
        return folder
    files = [file_identity(folder / name) for name in (*FILES, *WEIGHTS) if (folder / name).is_file()]
    fingerprint = hashlib.sha256(repr((CONVERTER, files)).encode()).hexdigest()[:12]
    out = CACHE / "translators" / f"{folder.resolve().name[:40]}-{fingerprint}-{quantization}"
    return prepare_once(out, lambda partial: convert(folder, partial, quantization))


def convert(folder: Path, out: Path, quantization: str) -> None:
    """Converts a folder of Hugging Face's form into `out`, whole or not at all.

    Raises ValueError if it is not a Marian model or lacks a weight.
    """
    try:
        spec = _spec(folder)
    except KeyError as error:
        raise ValueError(f"{folder}: its weights or its config.json lack {error}: put the {' or '.join(WEIGHTS)} and "
                         "the config.json of one Marian model there, and no file of a different library") from error
    spec.validate()
    spec.optimize(quantization=quantization)
    with whole_folder(out) as partial:
        spec.save(str(partial))
        for name in SENTENCE_PIECES:
            shutil.copyfile(folder / name, partial / name)


def _spec(folder: Path) -> "ctranslate2.specs.TransformerSpec":
    """The model as CTranslate2 describes it, with its weights."""
    from clipid_utils.model.pretrained.weights import read_weights  # here, since only a conversion needs it and JAX

    config = _checked_config(folder)
    stored, tokens = read_weights(folder), _tokens(folder)
    weights = {key: np.array(stored[key], np.float32) for key in stored if stored[key].dtype.kind in "fV"}
    spec = ctranslate2.specs.TransformerSpec.from_config(
        (config["encoder_layers"], config["decoder_layers"]), config["encoder_attention_heads"], pre_norm=False,
        activation=ctranslate2.specs.common_spec.Activation[_ACTIVATIONS[config["activation_function"]]])
    embedding, bias = weights["model.shared.weight"], weights.get("final_logits_bias")
    if len(embedding) != len(tokens):
        raise ValueError(f"{folder / 'vocab.json'} has {len(tokens)} tokens and the model {len(embedding)} embeddings: "
                         "take both from one model")
    bias = np.zeros(len(tokens), np.float32) if bias is None else bias.reshape(-1)
    # <pad>, the last token, only starts the decoder. Marian starts from a zero embedding, and so do opus-mt's models;
    # in a model that `transformers` trained, its row has learnt with the others.
    from_zero = not np.any(embedding[-1])
    if from_zero:
        embedding, bias, tokens = embedding[:-1], bias[:-1], tokens[:-1]
    else:
        bias = np.append(bias[:-1], np.float32(-1e9))  # so that the model never produces it
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
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "<s>", "</s>", "<unk>"
    spec.config.decoder_start_token = "</s>" if from_zero else "<pad>"
    return spec


def _checked_config(folder: Path) -> dict:
    config = {"share_encoder_decoder_embeddings": True, **read_json(folder / "config.json")}
    for key, values in (("model_type", ["marian"]), ("share_encoder_decoder_embeddings", [True]),
                        ("activation_function", list(_ACTIVATIONS))):
        if config[key] not in values:
            raise ValueError(f"{folder / 'config.json'}: {key} is {config[key]!r}, not one of {values}: name a "
                             "different model, or the folder that ct2-transformers-converter makes of this one")
    return config


def _tokens(folder: Path) -> list[str]:
    vocabulary = read_json(folder / "vocab.json")
    tokens = sorted(vocabulary, key=vocabulary.get)
    if tokens[-1] != "<pad>" or sorted(vocabulary.values()) != list(range(len(tokens))):
        raise ValueError(f"{folder / 'vocab.json'}: the tokens must have the numbers from 0 on, and '<pad>' the last")
    return tokens


def _target_tokens(folder: Path, tokens: list[str]) -> list[int]:
    """The numbers of the target language's pieces, and of the special tokens."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "target.spm"))
    known, special = {pieces.id_to_piece(number) for number in range(len(pieces))}, {"</s>", "<unk>", "<pad>"}
    if not (known - special) & set(tokens):
        raise ValueError(f"{folder / 'target.spm'}: none of its pieces is in vocab.json: take both from one model")
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


def _fill_linear(linear, weights: Mapping[str, np.ndarray], *names: str) -> None:
    linear.weight = np.concatenate([weights[f"{name}.weight"] for name in names])
    linear.bias = np.concatenate([weights[f"{name}.bias"] for name in names])


def _fill_norm(norm, weights: Mapping[str, np.ndarray], name: str) -> None:
    norm.gamma, norm.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]
