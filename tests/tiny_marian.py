"""The smallest complete Marian model of Hugging Face's form, with random weights, written without torch."""

import json
from pathlib import Path

import numpy as np
import sentencepiece
from safetensors.numpy import save_file

ENGLISH = ["a cat", "a dog", "a cat and a dog", "two red cars", "the old house", "a small fish in the sea",
           "a bicycle", "flag of Brazil", "a woman with a green hat", "three birds on a tree", "the moon at night",
           "a loaf of bread"]
INDONESIAN = ["seekor kucing", "seekor anjing", "seekor kucing dan seekor anjing", "dua mobil merah", "rumah tua itu",
              "seekor ikan kecil di laut", "sebuah sepeda", "bendera Brasil", "seorang wanita bertopi hijau",
              "tiga burung di pohon", "bulan di malam hari", "sepotong roti"]
CONFIG = {"model_type": "marian", "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 256,
          "activation_function": "swish", "scale_embedding": True, "share_encoder_decoder_embeddings": True}


def random_weights(config: dict, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A weight for each of MarianMTModel's names. They are large, so that translations depend on their texts."""
    rng, width = np.random.default_rng(seed), config["d_model"]
    weights = {"model.shared.weight": rng.normal(0, 0.5, (tokens, width)),
               "final_logits_bias": rng.normal(0, 0.1, (1, tokens))}
    weights["final_logits_bias"][0, 0] += 3  # </s>: most translations end after a few pieces

    def linear(name: str, out: int, into: int) -> None:
        weights[f"{name}.weight"] = rng.normal(0, 0.5, (out, into))
        weights[f"{name}.bias"] = rng.normal(0, 0.1, out)

    for part, attentions in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "encoder_attn"])):
        for number in range(config[f"{part}_layers"]):
            layer = f"model.{part}.layers.{number}."
            for attention in attentions:
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    linear(f"{layer}{attention}.{projection}", width, width)
            linear(f"{layer}fc1", config[f"{part}_ffn_dim"], width)
            linear(f"{layer}fc2", width, config[f"{part}_ffn_dim"])
            for norm in (*(f"{attention}_layer_norm" for attention in attentions), "final_layer_norm"):
                weights[f"{layer}{norm}.weight"] = rng.normal(1, 0.1, width)
                weights[f"{layer}{norm}.bias"] = rng.normal(0, 0.1, width)
    return {name: value.astype(np.float32) for name, value in weights.items()}


def tiny_marian(folder: Path, seed: int = 0, trained_start: bool = False, **changes) -> Path:
    """Writes the model's folder; `changes` are entries of the config.

    The decoder starts from the embedding of <pad>, which is zero as in opus-mt, or random with `trained_start`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = {}
    for side, texts in (("source", ENGLISH), ("target", INDONESIAN)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts * 3), model_prefix=str(folder / side), vocab_size=60, hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        (folder / f"{side}.vocab").unlink()
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
        pieces |= dict.fromkeys(model.id_to_piece(number) for number in range(3, model.vocab_size()))
    tokens = ["</s>", "<unk>", *pieces, "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    config = {**CONFIG, "vocab_size": len(tokens), "pad_token_id": len(tokens) - 1, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(config, len(tokens), seed)
    if not trained_start:
        weights["model.shared.weight"][-1] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
