"""Pictures and texts encoded per second, in turns with the same two towers of transformers on torch.

Both sides: unit vectors of one batch in float32, no gradients, the same shapes; a quarter of the texts is half padding.
Ours is `encode_image` and `encode_text` of `clipid_utils` as `model/embed.py` compiles them; theirs
`VisionTextDualEncoderModel` with its default (sdpa) attention, in eval mode under `torch.inference_mode`. The sides
alternate in rounds, as turns.py has it.

    python benchmarks/bench_encode.py [--rounds 5] [--sizes mini_pictures …] [--out build/bench/encode.json]
"""

import turns

BATCH = 32
SIZES = {  # examples, timed batches a round
    "vit_b32_pictures": (BATCH, 3),
    "bert_base_texts": (BATCH, 3),
    "mini_pictures": (BATCH, 40),
    "mini_texts": (BATCH, 40),
}


def parts(size: str) -> tuple[str, str]:
    """The size as bench_step.py names it, and what is encoded."""
    model, what = size.rsplit("_", 1)
    return ("mini" if model == "mini" else "vit_b32_bert_base"), what


def inputs(size: str, image_size: int, vocabulary: int):
    import numpy as np

    tokens = 24 if parts(size)[0] == "mini" else 32
    rng = np.random.default_rng(0)
    mask = np.ones((BATCH, tokens), np.int32)
    mask[: BATCH // 4, tokens // 2 :] = 0
    pixels = rng.standard_normal((BATCH, image_size, image_size, 3), dtype=np.float32)
    return pixels, rng.integers(1, vocabulary, (BATCH, tokens)), mask


def ours(size: str):
    """A function that encodes one batch, and waits for it."""
    from bench_step import our_config
    from flax import nnx

    from clipid_utils import HybridCLIP
    from clipid_utils.model import embed

    model_size, what = parts(size)
    config = our_config(model_size)
    model = HybridCLIP(config, rngs=nnx.Rngs(0))
    pixels, ids, mask = inputs(size, config.vision.image_size, config.text.vocab_size)
    if what == "pictures":
        encode = embed.encoder(model, "encode_image")
        return lambda: encode(pixels)
    encode = embed.encoder(model, "encode_text")
    return lambda: encode(ids, mask)


def theirs(size: str):
    """The same on torch."""
    import torch
    from bench_step import their_config
    from transformers import VisionTextDualEncoderModel

    model_size, what = parts(size)
    config = their_config(model_size)
    model = VisionTextDualEncoderModel(config).eval()
    pixels, ids, mask = inputs(size, config.vision_config.image_size, config.text_config.vocab_size)
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)

    def run():
        with torch.inference_mode():
            if what == "pictures":
                features = model.get_image_features(pixel_values=pixels)
            else:
                features = model.get_text_features(input_ids=ids, attention_mask=mask)
            features = getattr(features, "pooler_output", features)
            return torch.nn.functional.normalize(features, dim=-1).numpy()

    return run


if __name__ == "__main__":
    turns.main(__file__, __doc__, SIZES, {"ours": ours, "torch": theirs}, "build/bench/encode.json")
