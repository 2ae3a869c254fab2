"""Examples per second of a whole training step, in turns with the same step of transformers on torch.

Both sides: forward, symmetric contrastive loss over the batch, backward, AdamW, float32, no dropout, the same shapes.
Ours is the model and the loss of `clipid_utils` under `jax.jit`; theirs `VisionTextDualEncoderModel` with its default
(sdpa) attention. The sides alternate in rounds, as turns.py has it.

    python benchmarks/bench_step.py [--rounds 3] [--sizes mini vit_b32_bert_base] [--out build/bench/step.json]
"""

import turns

SIZES = {"mini": (256, 8), "vit_b32_bert_base": (16, 3)}  # batch, timed steps a round
SHAPES = {"mini": (24, 4000), "vit_b32_bert_base": (32, 30522)}  # tokens, vocabulary
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.01


def inputs(size: str, image_size: int):
    import numpy as np

    batch, (tokens, vocabulary) = SIZES[size][0], SHAPES[size]
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((batch, image_size, image_size, 3), dtype=np.float32)
    return pixels, rng.integers(0, vocabulary, (batch, tokens)), np.ones((batch, tokens), np.int32)


def our_config(size: str):
    import dataclasses

    from clipid_utils import PRESETS

    config = PRESETS["mini" if size == "mini" else "vit_b32_indobert_base"]
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=SHAPES[size][1]))


def their_config(size: str):
    """The same sizes, without dropout."""
    from transformers import BertConfig, CLIPVisionConfig, VisionTextDualEncoderConfig

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    vocabulary = SHAPES[size][1]
    if size == "mini":
        small = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
        vision = CLIPVisionConfig(image_size=48, patch_size=8, num_hidden_layers=4, **small)
        text = BertConfig(vocab_size=vocabulary, max_position_embeddings=64, num_hidden_layers=2, **small, **no_dropout)
    else:
        vision, text = CLIPVisionConfig(), BertConfig(vocab_size=vocabulary, **no_dropout)
    return VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=128 if size == "mini" else 512
    )


def ours(size: str):
    """A function that does one step, and waits for it."""
    import jax
    import optax
    from flax import nnx

    from clipid_utils import HybridCLIP
    from clipid_utils.training.loss import clip_loss

    config = our_config(size)
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
    from transformers import VisionTextDualEncoderModel

    config = their_config(size)
    model = VisionTextDualEncoderModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    pixels, ids, mask = inputs(size, config.vision_config.image_size)
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)

    def run() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, pixel_values=pixels, attention_mask=mask, return_loss=True).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return run


if __name__ == "__main__":
    turns.main(__file__, __doc__, SIZES, {"ours": ours, "theirs": theirs}, "build/bench/step.json")
