"""How the shipped checkpoint is made: one function, run by `make train-mini`.

The choices are explained, with what else was tried, in data/checkpoints/README.md.
"""

import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
from datasets import Dataset
from flax import nnx

from clipid_utils.data.batches.loader import PicturePairs, load_pairs
from clipid_utils.data.captions import TEMPLATES
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
    """What the tokenizer learns its pieces from: every name, alone and in one of the templates, and every list of
    keywords."""
    yield from pairs.names
    yield from (", ".join(keywords) for keywords in pairs.keywords if keywords)
    named = zip(itertools.cycle(TEMPLATES), pairs.names, pairs.groups)  # noqa: B905
    yield from (fill(template, name, group) for template, name, group in named)


def new_mini(train: PicturePairs, *, seed: int, dtype=jnp.float32) -> tuple[HybridCLIP, CLIPProcessor]:
    """A mini model with random weights, and its processor with a tokenizer learned from the training captions."""
    config = PRESETS["mini"]
    tokenizer = train_wordpiece(tokenizer_corpus(train), config.text.vocab_size)
    text = dataclasses.replace(config.text, vocab_size=tokenizer.get_vocab_size())
    # Longer texts are cut, and counted, in use as in training, which never sees the positions beyond
    processor = CLIPProcessor(tokenizer, config.vision.image_size, MINI.caption_tokens)
    return HybridCLIP(dataclasses.replace(config, text=text), dtype=dtype, rngs=nnx.Rngs(seed)), processor


def pairs_checksum(pairs: PicturePairs) -> str:
    """SHA-256 over pixels, names and keywords, in their order."""
    digest = hashlib.sha256(pairs.images.tobytes())
    digest.update(json.dumps([pairs.names, pairs.keywords], ensure_ascii=False).encode())
    return digest.hexdigest()


def train_mini(
    dictionary: Mapping[str, Dataset], out: Path, *, seed: int = 0, config: FitConfig = MINI,
    on_log: Callable[[list[dict]], None] | None = None,
) -> FitResult:
    """Trains the mini checkpoint into `out`: weights, tokenizer, `fit.json`, `metrics.jsonl` and `recipe.json`.

    An older checkpoint in `out` is replaced at the end of a whole run and not before: the run itself, and what Ctrl-C
    leaves of it, stands in the folder `<out>.training` beside it. An old `metrics.json` goes with the weights it
    measured.
    """
    out, started = Path(out), time.time()
    work = out.with_name(out.name + ".training")
    train = load_pairs(dictionary["train"], SOURCE_SIZE)
    validation = load_pairs(dictionary["validation"], PRESETS["mini"].vision.image_size)
    model, processor = new_mini(train, seed=seed)
    result = fit(model, processor, train, validation, config, seed=seed, out=work, optimizer=muon, on_log=on_log)
    if result.interrupted:
        return result
    save_clip(result.model, processor, work)
    recipe = {"recipe": "mini", "seed": seed, "minutes": round((time.time() - started) / 60, 1), "pictures": len(train),
              "train_sha256": pairs_checksum(train), "validation_sha256": pairs_checksum(validation)}
    (work / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").unlink(missing_ok=True)
    for path in work.iterdir():
        if path.is_file():
            path.replace(out / path.name)
    shutil.rmtree(work)
    return result
