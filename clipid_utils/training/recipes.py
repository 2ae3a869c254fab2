"""The recipe of the shipped checkpoint.

data/checkpoints/README.md explains the choices, and what else was tried.
"""

import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
from datasets import Dataset
from flax import nnx

from clipid_utils.data.batches.loader import PicturePairs, load_pairs
from clipid_utils.data.captions import TEMPLATES
from clipid_utils.files import write_json
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import PRESETS
from clipid_utils.model.pretrained.save import save_clip
from clipid_utils.model.processor import CLIPProcessor, train_wordpiece
from clipid_utils.training.fit import FitConfig, FitResult, fit
from clipid_utils.training.optimizers import muon
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


def train_mini(
    dictionary: Mapping[str, Dataset], out: Path, seed: int = 0, *, config: FitConfig = MINI, resume: bool = False,
    **options,
) -> FitResult:
    """Trains the mini checkpoint into `out`: weights, tokenizer, `fit.json`, `metrics.jsonl` and `recipe.json`.

    An older checkpoint in `out` is replaced only when the whole run is done, and its `metrics.json`, measured on the
    old weights, is deleted. Until then the run is in the folder `<out>.training`; `resume` continues there if `config`
    keeps checkpoints. `options` are those of `fit`, such as `on_log`.
    """
    out, started = Path(out), time.time()
    work = out.with_name(out.name + ".training")
    train = load_pairs(dictionary["train"], SOURCE_SIZE)
    validation = load_pairs(dictionary["validation"], PRESETS["mini"].vision.image_size)
    model, processor = new_mini(train, seed=seed)
    result = fit(model, processor, train, validation, config, seed=seed, out=work, optimizer=muon, resume=resume,
                 overwrite=not resume, **options)
    if result.interrupted:
        return result
    save_clip(result.model, processor, work)
    write_json(work / "recipe.json", {
        "recipe": "mini", "seed": seed, "minutes": round((time.time() - started) / 60, 1), "pictures": len(train),
        "train_sha256": pairs_checksum(train), "validation_sha256": pairs_checksum(validation)})
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").unlink(missing_ok=True)
    for path in work.iterdir():
        if path.is_file():
            path.replace(out / path.name)
    shutil.rmtree(work)
    return result
