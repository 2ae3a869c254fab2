"""A stand-in for HybridCLIP with known answers: it measures red, green and blue, and knows their Indonesian names.

Embeddings are [red, green, blue, blank], unit length; white and grey have no colour and count as blank.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import CLIPConfig, VisionConfig
from clipid_utils.model.processor import SPECIAL_TOKENS, CLIPProcessor

SIZE, PATCH = 32, 8
WORDS = {"merah": 0, "hijau": 1, "biru": 2}
COLOURS = {"merah": (220, 20, 20), "hijau": (20, 200, 20), "biru": (20, 20, 220)}


class ColourModel(HybridCLIP):
    def __init__(self, processor: CLIPProcessor):
        table = np.full((processor.tokenizer.get_vocab_size(), 4), [0, 0, 0, 1e-3], np.float32)
        for word, place in WORDS.items():
            table[processor.tokenizer.token_to_id(word), place] = 1.0
        self.table = nnx.Param(jnp.asarray(table))
        self.logit_scale = nnx.Param(jnp.log(20.0))
        self.config = CLIPConfig(vision=VisionConfig(image_size=SIZE, patch_size=PATCH), embed_dim=4)

    def encode_image(self, pixel_values):
        return self._unit(self._ink(pixel_values).mean(axis=(1, 2)))

    def encode_patches(self, pixel_values):
        batch, grid = len(pixel_values), SIZE // PATCH
        patches = self._ink(pixel_values).reshape(batch, grid, PATCH, grid, PATCH, 4)
        return self._unit(patches.mean(axis=(2, 4)).reshape(batch, grid * grid, 4))

    def encode_text(self, input_ids, attention_mask):
        vectors = self.table[...][input_ids] * attention_mask[..., None]
        return self._unit(vectors.sum(axis=1))

    def _ink(self, pixels):
        others = (pixels.sum(axis=-1, keepdims=True) - pixels) / 2
        ink = jnp.maximum(pixels - others, 0)
        return jnp.concatenate([ink, jnp.full_like(ink[..., :1], 0.05)], axis=-1)

    def _unit(self, features):
        return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def colour_clip() -> tuple[ColourModel, CLIPProcessor]:
    words = [*SPECIAL_TOKENS, *WORDS]
    words += "ikan hewan buah foto gambar kartun ilustrasi ini lukisan selembar berlatar".split()
    tokenizer = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    processor = CLIPProcessor(tokenizer, SIZE, 16, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    return ColourModel(processor), processor


def spot(colour: str, box: tuple[int, int, int, int] = (8, 8, 24, 24), shade: int = 0) -> Image.Image:
    """A white picture with one coloured rectangle; `shade` makes otherwise equal pictures differ."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    image.paste(tuple(min(255, value + shade) for value in COLOURS[colour]), box)
    return image


def picture_folder(root: Path) -> Path:
    """Nine good pictures in two folders, and files that real folders have besides."""
    (root / "dalam").mkdir(parents=True)
    for shade, colour in enumerate(list(COLOURS) * 3):
        spot(colour, shade=shade).save(root / ("dalam" if shade > 4 else "") / f"{shade}-{colour}.PNG")
    (root / "catatan.txt").write_text("bukan gambar")
    (root / "logo.svg").write_text("<svg/>")
    (root / ".tersembunyi.png").write_bytes(b"")
    (root / "rusak.jpg").write_bytes(b"\xff\xd8\xff bukan JPEG")
    whole = (root / "0-merah.PNG").read_bytes()
    (root / "terpotong.png").write_bytes(whole[: len(whole) // 2])
    return root
