"""Examples per second of a whole training step, in turns with the same step of transformers on torch.

Both sides: forward, symmetric contrastive loss over the batch, backward, AdamW, float32, no dropout, the same shapes.
Ours is the model and the loss of `clipid_utils` under `jax.jit`; theirs `VisionTextDualEncoderModel` with its default
(sdpa) attention. The sides alternate in rounds, each in its own process so that neither's threads or memory disturb
the other's, and both processes have the same environment, transparent huge pages for `malloc` included.

    python benchmarks/bench_step.py [--rounds 3] [--sizes mini vit_b32_bert_base] [--out build/bench/step.json]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIZES = {  # batch, tokens, vocabulary, timed steps a round
    "mini": (256, 24, 4000, 8),
    "vit_b32_bert_base": (16, 32, 30522, 3),
}
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


def inputs(size: str, image_size: int):
    import numpy as np

    batch, tokens, vocabulary, _ = SIZES[size]
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((batch, image_size, image_size, 3), dtype=np.float32)
    return pixels, rng.integers(0, vocabulary, (batch, tokens)), np.ones((batch, tokens), np.int32)


def ours(size: str):
    """A function that does one step, and waits for it."""
    import dataclasses

    import jax
    import optax
    from flax import nnx

    from clipid_utils import PRESETS, HybridCLIP
    from clipid_utils.training.loss import clip_loss

    config = PRESETS["mini" if size == "mini" else "vit_b32_indobert_base"]
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=SIZES[size][2]))
    graph, params = nnx.split(HybridCLIP(config, rngs=nnx.Rngs(0)), nnx.Param)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    state = [params, optimizer.init(params)]
    batch = inputs(size, config.vision.image_size)

    def objective(params, pixels, ids, mask):
        model = nnx.merge(graph, params)
        return clip_loss(model.encode_image(pixels), model.encode_text(ids, mask), model.scale())

    def step(params, opt_state, *batch):
        loss, gradients = jax.value_and_grad(objective)(params, *batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    compiled = jax.jit(step, donate_argnums=(0, 1))

    def run() -> float:
        state[0], state[1], loss = compiled(*state, *batch)
        return float(loss)

    return run


def theirs(size: str):
    """The same on torch."""
    import torch
    from transformers import BertConfig, CLIPVisionConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vocabulary = SIZES[size][2]
    if size == "mini":
        small = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
        vision = CLIPVisionConfig(image_size=48, patch_size=8, num_hidden_layers=4, **small)
        text = BertConfig(vocab_size=vocabulary, max_position_embeddings=64, num_hidden_layers=2, **small, **no_dropout)
    else:
        vision, text = CLIPVisionConfig(), BertConfig(vocab_size=vocabulary, **no_dropout)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=128 if size == "mini" else 512
    )
    model = VisionTextDualEncoderModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    pixels, ids, mask = inputs(size, vision.image_size)
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)

    def run() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, pixel_values=pixels, attention_mask=mask, return_loss=True).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return run


def worker(side: str, size: str) -> None:
    """Answers each line on standard input with the seconds of a round's steps; the first steps are not timed."""
    run = {"ours": ours, "theirs": theirs}[side](size)
    for _ in range(3):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(SIZES[size][3]):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": statistics.median(times), "peak_mib": round(peak)}), flush=True)


def compare(size: str, rounds: int) -> dict:
    """Runs both sides in turns; examples per second of each round, and the ratio of the medians."""
    # Without huge pages for its one large buffer, XLA spends a quarter of a step in page faults (model/ops.py)
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ, "TOKENIZERS_PARALLELISM": "false"}
    sides = {
        side: subprocess.Popen(
            [sys.executable, __file__, "--worker", side, size], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment,
        )
        for side in ("ours", "theirs")
    }
    result = {side: {"examples_per_second": [], "peak_mib": 0} for side in sides}
    try:
        for side, process in sides.items():
            if process.stdout.readline().strip() != "ready":
                raise SystemExit(f"bench_step: the side {side!r} did not start; try --worker {side} {size} to see why")
        for _ in range(rounds):
            for side, process in sides.items():
                process.stdin.write("\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                result[side]["examples_per_second"].append(round(SIZES[size][0] / answer["seconds"], 2))
                result[side]["peak_mib"] = answer["peak_mib"]
    finally:
        for process in sides.values():
            process.kill()
    medians = {side: statistics.median(values["examples_per_second"]) for side, values in result.items()}
    return {**result, "ratio": round(medians["ours"] / medians["theirs"], 3), "median": medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "SIZE"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path, default=Path("build/bench/step.json"))
    options = parser.parse_args()
    if options.worker:
        return worker(*options.worker)
    report = {}
    print(f"{'size':20} {'batch':>6} {'ours/s':>9} {'torch/s':>9} {'ratio':>7} {'MiB ours':>9} {'MiB torch':>10}")
    for size in options.sizes:
        report[size] = found = compare(size, options.rounds)
        print(f"{size:20} {SIZES[size][0]:6} {found['median']['ours']:9.2f} {found['median']['theirs']:9.2f} "
              f"{found['ratio']:7.2f} {found['ours']['peak_mib']:9} {found['theirs']['peak_mib']:10}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
