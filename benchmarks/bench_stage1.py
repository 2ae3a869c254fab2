"""Stage 1 on this machine: ViT-B/32's and BERT-base's features of the picture dictionary, and the projections on them.

The towers have random weights, which take as long as trained ones. It measures the seconds for the features of the
first ROWS pictures and of the captions that are drawn for them, and the examples per second of the projections. From
these it computes the minutes for all training pictures of the dictionary; the real time is shorter, because artists
share captions.

    python benchmarks/bench_stage1.py [--out build/bench/stage1.json]
"""

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

ROWS = 256


def measure() -> dict:
    import jax
    import numpy as np
    from bench_step import our_config
    from flax import nnx

    from clipid_utils import HybridCLIP
    from clipid_utils.data.batches.loader import load_pairs
    from clipid_utils.data.dictionary.build import load_picture_dictionary
    from clipid_utils.model.processor import CLIPProcessor, train_wordpiece
    from clipid_utils.training.features import cache_features
    from clipid_utils.training.heads import ProjectionConfig, train_projections
    from clipid_utils.training.recipes import tokenizer_corpus

    rows = load_picture_dictionary()["train"]
    config = our_config("vit_b32_bert_base")
    pairs = load_pairs(rows.select(range(ROWS)), config.vision.image_size)
    processor = CLIPProcessor(train_wordpiece(tokenizer_corpus(pairs), 2000), config.vision.image_size, 32)
    model = HybridCLIP(config, rngs=nnx.Rngs(0))
    for _ in range(2):  # the first compiles
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            features = cache_features(model, processor, pairs, folder, progress=False)
            seconds = time.perf_counter() - start
            made = dataclasses.replace(features, images=np.array(features.images), texts=np.array(features.texts))
    ends = []
    settings = ProjectionConfig(epochs=40, batch_size=ROWS, log_every=10)
    train_projections(model, made, settings, seed=0, progress=False,
                      on_log=lambda history: ends.append((history[-1]["step"], time.perf_counter())))
    (first, start), (last, end) = ends[0], ends[-1]
    examples = ROWS * (last - first) / (end - start)
    default = ProjectionConfig()
    minutes = {"features": seconds / ROWS * len(rows) / 60,
               f"{default.epochs} epochs of the projections": default.epochs * len(rows) / examples / 60}
    return {"device": jax.devices()[0].device_kind, "pictures": ROWS, "different captions": len(made.texts),
            "seconds for the features": round(seconds, 1),
            "examples a second of the projections": round(examples),
            f"minutes for the {len(rows)} pictures": {name: round(value, 1) for name, value in minutes.items()}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench/stage1.json"))
    options = parser.parse_args()
    report = measure()
    print(json.dumps(report, indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
