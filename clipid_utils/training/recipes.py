"""The recipe of the shipped checkpoint.

data/checkpoints/README.md explains the choices, and describes the alternatives that were tried.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx

from clipid_utils.data.batches.loader import PicturePairs
from clipid_utils.data.captions import TEMPLATES
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import PRESETS
from clipid_utils.model.processor import CLIPProcessor, train_wordpiece
from clipid_utils.training.fit import FitConfig
from clipid_utils.wording import fill

SOURCE_SIZE = 64  # pixels in memory, from which the augmentation samples the model's 48
MINI = FitConfig(
    epochs=250, batch_size=256, learning_rate=1e-3, weight_decay=0.01, caption_tokens=20, keep_patches=24,
    image_image=0.5, group_concepts=True, evaluate_every=20, log_every=20,
)


def tokenizer_corpus(pairs: PicturePairs) -> Iterator[str]:
    """The texts from which the tokenizer learns: each name, alone and in a template, and each list of keywords."""
    yield from pairs.names
    yield from (", ".join(keywords) for keywords in pairs.keywords if keywords)
    named = zip(itertools.cycle(TEMPLATES), pairs.names, pairs.groups)  # noqa: B905
    yield from (fill(template, name, group) for template, name, group in named)


def new_mini(train: PicturePairs, *, seed: int, dtype=jnp.float32) -> tuple[HybridCLIP, CLIPProcessor]:
    """A mini model with random weights, and its processor with a tokenizer learned from the training captions."""
    config = PRESETS["mini"]
    tokenizer = train_wordpiece(tokenizer_corpus(train), config.text.vocab_size)
    text = dataclasses.replace(config.text, vocab_size=tokenizer.get_vocab_size())
    # Not the tower's own length: training never sees the positions after this one
    processor = CLIPProcessor(tokenizer, config.vision.image_size, MINI.caption_tokens)
    return HybridCLIP(dataclasses.replace(config, text=text), dtype=dtype, rngs=nnx.Rngs(seed)), processor


def pairs_checksum(pairs: PicturePairs) -> str:
    """SHA-256 over pixels, names and keywords, in their order."""
    digest = hashlib.sha256(pairs.images.tobytes())
    digest.update(json.dumps([pairs.names, pairs.keywords], ensure_ascii=False).encode())
    return digest.hexdigest()
