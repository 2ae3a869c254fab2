"""Examples per second of a whole training step, in each of its forms, in turns with the same of transformers on torch.

All sides: forward, symmetric contrastive loss over the batch, backward, AdamW, no dropout, the same shapes. Ours is
`training.step.make_update` as `fit` runs it, from uint8 pictures and with its averaged weights and metrics, under jit,
shard_map and pmap; theirs `VisionTextDualEncoderModel` with its default (sdpa) attention, from float pictures, without
these. The sides alternate in rounds, as turns.py has it.

With `--gpu` the size is ViT-B/32 with BERT-base in bfloat16, batch 1,024, theirs under autocast with fused AdamW and
torch.compile. There a run is ten steps, and the host waits only for the last one, as `fit` lets it run ahead of the
device. Memory is then the GPU's, at its peak, and not the host's; for a GPU in PEAK the model FLOP utilisation is
printed.

    python benchmarks/bench_step.py [--gpu] [--rounds 3] [--sizes mini vit_b32_bert_base] [--sides jit]
"""

import functools

import turns
from run import gpu

BATCH = {"mini": 256, "vit_b32_bert_base": 16, "vit_b32_bert_base_bf16": 1024}
STEPS = {"vit_b32_bert_base_bf16": 10}  # a run; 1 elsewhere
SIZES = {"mini": (256, 8), "vit_b32_bert_base": (16, 3)}  # examples a run, timed runs a round
ON_GPU = {"vit_b32_bert_base_bf16": (10 * 1024, 3)}
PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # TFLOP/s, dense bfloat16, of NVIDIA's data sheets (SXM cards)
SHAPES = {"mini": (24, 4000)}  # tokens, vocabulary
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


def inputs(size: str, image_size: int):
    import numpy as np

    batch, (tokens, vocabulary) = BATCH[size], SHAPES.get(size, (32, 30522))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, image_size, image_size, 3), np.uint8)
    return images, rng.integers(0, vocabulary, (batch, tokens), np.int32), np.ones((batch, tokens), np.int32)


def our_config(size: str):
    import dataclasses

    from clipid_utils import PRESETS

    config = PRESETS["mini" if size == "mini" else "vit_b32_indobert_base"]
    vocabulary = SHAPES.get(size, (32, 30522))[1]
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocabulary))


def their_config(size: str):
    """The same sizes, without dropout."""
    from transformers import BertConfig, CLIPVisionConfig, VisionTextDualEncoderConfig

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vocabulary = SHAPES.get(size, (32, 30522))[1]
    if size == "mini":
        small = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
        vision = CLIPVisionConfig(image_size=48, patch_size=8, num_hidden_layers=4, **small)
        text = BertConfig(vocab_size=vocabulary, max_position_embeddings=64, num_hidden_layers=2, **small, **no_dropout)
    else:
        vision, text = CLIPVisionConfig(), BertConfig(vocab_size=vocabulary, **no_dropout)
    return VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=128 if size == "mini" else 512
    )


def ours(form: str, size: str):
    """One step of `clipid_utils` on all devices, as a function that returns the loss."""
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from clipid_utils import HybridCLIP
    from clipid_utils.training import distributed
    from clipid_utils.training.step import init_state, make_update

    config = our_config(size)
    dtype = jnp.bfloat16 if size.endswith("bf16") else jnp.float32
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    graph, state = init_state(HybridCLIP(config, dtype=dtype, rngs=nnx.Rngs(0)), optimizer, 0)
    images, ids, mask = inputs(size, config.vision.image_size)
    update = functools.partial(make_update, graph, optimizer, image_mean=(0.5,) * 3, image_std=(0.25,) * 3,
                               augmentation=None)
    placed = getattr(distributed, form)(update, distributed.make_mesh())
    states = [placed.place(state)]
    del state
    rows = len(images)
    batch = placed.feed({"images": images, "input_ids": ids, "attention_mask": mask,
                         "concepts": np.arange(rows, dtype=np.int32), "may_flip": np.zeros(rows, bool)})

    def run() -> float:
        for _ in range(STEPS.get(size, 1)):
            states[0], values = placed.step(states[0], batch)
        return float(values["loss"])

    return run


def theirs(size: str):
    """The same on torch."""
    import torch
    from transformers import VisionTextDualEncoderModel

    half = size.endswith("bf16")
    device = "cuda" if half else "cpu"
    config = their_config(size)
    model = VisionTextDualEncoderModel(config).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=half or None)
    images, ids, mask = (torch.from_numpy(x).to(device) for x in inputs(size, config.vision_config.image_size))
    pixels = ((images / 255 - 0.5) / 0.25).permute(0, 3, 1, 2).contiguous()
    forward = torch.compile(model) if half else model

    def run() -> float:
        for _ in range(STEPS.get(size, 1)):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=half):
                loss = forward(input_ids=ids, pixel_values=pixels, attention_mask=mask, return_loss=True).loss
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    return run


def flops(size: str) -> float:
    """Of one example's step: 6 for each weight of a block and token, and attention's (PaLM, Chowdhery et al. 2022)."""
    config = our_config(size)
    total = 0.0
    for tower, tokens in ((config.vision, (config.vision.image_size // config.vision.patch_size) ** 2 + 1),
                          (config.text, SHAPES.get(size, (32, 30522))[0])):
        weights = 4 * tower.width**2 + 2 * tower.width * tower.mlp_dim
        total += 6 * tower.layers * tokens * (weights + 2 * tokens * tower.width)
    return total


def peak(side: str, size: str) -> int:
    """The largest number of bytes in use: in the GPU's memory if it computes there, else in the host's."""
    if size not in ON_GPU:
        return turns.resident()
    if side == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]


def add_utilisation(report: dict) -> None:
    """The share of the GPU's peak that each side's model FLOPs come to."""
    teraflops = next((peak for name, peak in PEAK.items() if name in (gpu() or "")), None)
    for size in ON_GPU.keys() & report.keys() if teraflops else ():
        shares = {side: round(rate * flops(size) / teraflops / 1e12, 4)
                  for pair in report[size].values() for side, rate in pair["median"].items()}
        print(f"{size}: model FLOP utilisation " + ", ".join(f"{side} {share:.1%}" for side, share in shares.items()))
        report[size]["utilisation"] = {"of_teraflops": teraflops, **shares}


SIDES = {form: functools.partial(ours, f"{form}_form") for form in ("jit", "shard_map", "pmap")} | {"torch": theirs}

if __name__ == "__main__":
    turns.main(__file__, __doc__, SIZES, SIDES, "build/bench/step.json", on_gpu=ON_GPU, peak=peak,
               finish=add_utilisation)
