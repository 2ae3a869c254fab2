"""Records the references that `test_clip.py` compares with: tiny random towers of `transformers` on PyTorch.

    python tests/golden/record.py    # where torch and transformers 5 are installed; the tests need neither

Each file holds the weights under their Hugging Face names, the inputs, and what leaves every stage. Weights are drawn
wider than at a usual start, and biases and norms too, so that a swapped or forgotten one shows.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            draw = torch.randn(weight.shape, generator=generator)
            is_norm = weight.ndim == 1 and name.endswith("weight")
            weight.copy_(1 + 0.2 * draw if is_norm else 0.3 * draw if weight.ndim == 1 else 0.15 * draw)
    return model.eval()


def save(name: str, model: torch.nn.Module, **arrays: torch.Tensor) -> None:
    weights = {f"weight:{key}": value for key, value in model.named_parameters()}
    everything = {key: value.detach().numpy() for key, value in (weights | arrays).items()}
    np.savez_compressed(HERE / f"{name}.npz", **everything)
    print(f"{name}.npz: {len(weights)} weights, {(HERE / f'{name}.npz').stat().st_size / 1e3:.0f} kB")


def tokens(lengths: list[int], vocab_size: int, pad: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    ids = torch.randint(2, vocab_size, mask.shape, generator=generator)
    return torch.where(mask == 1, ids, pad), mask


@torch.no_grad()
def record_vision() -> None:
    config = transformers.CLIPVisionConfig(**SMALL, image_size=24, patch_size=8, projection_dim=16)
    model = randomise(transformers.CLIPVisionModelWithProjection(config), seed=0)
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    tower = model.vision_model
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    out = model(pixels, output_hidden_states=True)
    stages = {f"stage:hidden_{i}": hidden for i, hidden in enumerate(out.hidden_states)}  # 0 leaves pre_layrnorm
    pooled = tower.post_layernorm(out.last_hidden_state[:, 0])
    save("vision", model, pixel_values=pixels, **stages, **{
        "stage:patches": patches, "stage:pooled": pooled, "stage:image_embeds": out.image_embeds,
    })


@torch.no_grad()
def record_text(name: str, model: torch.nn.Module, pad: int) -> None:
    randomise(model, seed=2)
    input_ids, attention_mask = tokens([7, 3, 5], model.config.vocab_size, pad, seed=3)
    out = model(input_ids, attention_mask, output_hidden_states=True)
    stages = {f"stage:hidden_{i}": hidden for i, hidden in enumerate(out.hidden_states)}  # 0 leaves the embeddings
    projection = torch.nn.Linear(SMALL["hidden_size"], 16, bias=False)
    model.text_projection = randomise(projection, seed=4)  # as VisionTextDualEncoderModel's
    save(name, model, input_ids=input_ids, attention_mask=attention_mask, **stages, **{
        "stage:pooled": out.pooler_output, "stage:text_embeds": model.text_projection(out.pooler_output),
    })


if __name__ == "__main__":
    record_vision()
    text = {**SMALL, "vocab_size": 50}
    bert = transformers.BertConfig(**text, max_position_embeddings=10)
    record_text("bert", transformers.BertModel(bert), pad=0)
    roberta = transformers.RobertaConfig(
        **text, max_position_embeddings=12, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5
    )
    record_text("roberta", transformers.RobertaModel(roberta), pad=1)
