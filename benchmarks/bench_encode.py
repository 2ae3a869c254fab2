"""Pictures and texts encoded per second, in turns with the same two towers of transformers on torch.

Both sides: unit vectors of one batch in float32, no gradients, the same shapes; a quarter of the texts is half padding.
Ours is `encode_image` and `encode_text` of `clipid_utils` as `model/embed.py` compiles them; theirs
`VisionTextDualEncoderModel`, or for SigLIP 2 B/16 at 224 pixels `SiglipModel`, with its default (sdpa) attention, in
eval mode under `torch.inference_mode`. The sides alternate in rounds, as turns.py has it.

    python benchmarks/bench_encode.py [--rounds 5] [--sizes mini_pictures …] [--out build/bench/encode.json]
"""

import turns

BATCH = 32
SIZES = {  # examples, timed batches a round
    "vit_b32_pictures": (BATCH, 3),
    "bert_base_texts": (BATCH, 3),
    "mini_pictures": (BATCH, 40),
    "mini_texts": (BATCH, 40),
    "siglip2_b16_pictures": (BATCH, 1),
    "siglip2_b16_texts": (BATCH, 2),
}
SIGLIP2 = {"vision_config": {"model_type": "siglip_vision_model"},
           "text_config": {"model_type": "siglip_text_model", "vocab_size": 256000}}


def parts(size: str) -> tuple[str, str]:
    """The size as bench_step.py names it, and what is encoded."""
    model, what = size.rsplit("_", 1)
    return {"vit_b32": "vit_b32_bert_base", "bert_base": "vit_b32_bert_base"}.get(model, model), what


def inputs(size: str, image_size: int, vocabulary: int):
    import numpy as np

    tokens = {"mini": 24, "siglip2_b16": 64}.get(parts(size)[0], 32)
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
    from clipid_utils.model.pretrained.families import clip_config

    model_size, what = parts(size)
    config = clip_config(SIGLIP2, (), "siglip") if model_size == "siglip2_b16" else our_config(model_size)
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
    from transformers import SiglipConfig, SiglipModel, VisionTextDualEncoderModel

    model_size, what = parts(size)
    siglip = model_size == "siglip2_b16"
    config = SiglipConfig(**SIGLIP2) if siglip else their_config(model_size)
    model = (SiglipModel if siglip else VisionTextDualEncoderModel)(config).eval()
    pixels, ids, mask = inputs(size, config.vision_config.image_size, config.text_config.vocab_size)
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)

    def run():
        with torch.inference_mode():
            if what == "pictures":
                features = model.get_image_features(pixel_values=pixels)
            else:
                features = model.get_text_features(input_ids=ids, attention_mask=None if siglip else mask)
            features = getattr(features, "pooler_output", features)
            return torch.nn.functional.normalize(features, dim=-1).numpy()

    return run


if __name__ == "__main__":
    turns.main(__file__, __doc__, SIZES, {"ours": ours, "torch": theirs}, "build/bench/encode.json")
