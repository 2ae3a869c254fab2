"""The smallest whole CLIP, with a tokenizer and pictures of its own, for the tests of model and training."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from flax import nnx

from clipid_utils.data.batches.loader import PicturePairs, dictionary_feed
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import CLIPConfig, TextConfig, VisionConfig
from clipid_utils.model.processor import CLIPProcessor, train_wordpiece

SIZE = 16
NAMES = ["kucing tidur", "anjing laut", "kupu-kupu biru", "mobil merah", "rumah besar", "ikan kecil", "panah kiri",
         "bunga mawar", "sepeda tua", "perahu layar", "gunung berapi", "buah semangka"]
KEYWORDS = [[*name.split(), "gambar"] for name in NAMES]
CONFIG = CLIPConfig(
    vision=VisionConfig(image_size=SIZE, patch_size=8, width=16, layers=2, heads=2, mlp_dim=32),
    text=TextConfig(vocab_size=300, max_length=16, width=16, layers=2, heads=2, mlp_dim=32),
    embed_dim=8,
)


def tiny_processor() -> CLIPProcessor:
    tokenizer = train_wordpiece(NAMES + ["foto ilustrasi sebuah ikon lukisan kartun ini di atas latar putih"], 300)
    return CLIPProcessor(tokenizer, SIZE, CONFIG.text.max_length)


def tiny_clip(seed: int = 0, *, dtype=np.float32, **changes) -> tuple[HybridCLIP, CLIPProcessor]:
    """A model with random weights and its processor; `changes` are fields of the config."""
    return HybridCLIP(dataclasses.replace(CONFIG, **changes), dtype=dtype, rngs=nnx.Rngs(seed)), tiny_processor()


def short_clip(seed: int = 0, **changes) -> tuple[HybridCLIP, CLIPProcessor]:
    """`tiny_clip` with one layer in each tower, which compiles in half the time."""
    one = {side: dataclasses.replace(getattr(CONFIG, side), layers=1) for side in ("vision", "text")}
    return tiny_clip(seed, **{**one, **changes})


def tiny_pairs(count: int = 12, size: int = SIZE, seed: int = 0) -> PicturePairs:
    """One random picture a name; more pictures than names are second pictures of the first ones."""
    rng = np.random.default_rng(seed)
    concepts = np.arange(count, dtype=np.int32) % len(NAMES)
    blocks = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return PicturePairs(
        images=np.kron(blocks, np.ones((1, size // 4, size // 4, 1), np.uint8)),
        concepts=concepts,
        names=[NAMES[i] for i in concepts],
        keywords=[KEYWORDS[i] for i in concepts],
        groups=["animals" if NAMES[i].split()[0] in ("kucing", "anjing", "ikan") else "objects" for i in concepts],
        may_flip=np.array(["kiri" not in NAMES[i] for i in concepts]),
    )


def batches(pairs: PicturePairs, tokenize, batch_size: int, *, epoch: int, **options) -> Iterator[dict]:
    """One epoch of `dictionary_feed`."""
    feed = dictionary_feed(pairs, tokenize, batch_size, **options)
    steps = feed.steps_per_epoch
    yield from map(feed.dataset.make, range(epoch * steps, (epoch + 1) * steps))


def tiny_batch(processor: CLIPProcessor, count: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as `dictionary_feed` yields it, with the names for captions."""
    pairs = tiny_pairs(count, seed=seed)
    return {"images": pairs.images, "concepts": pairs.concepts, "may_flip": pairs.may_flip,
            **processor.tokenize(pairs.names, 12)}
