"""Records the references that `test_parity_golden.py` compares with: tiny random models of `transformers` on PyTorch.

    python tests/golden/record.py    # where torch and transformers 5 are installed; the tests need neither

Each .npz holds the bytes of the two files that `save_pretrained` wrote, `config.json` and `model.safetensors`, and for
each case its inputs and what leaves every stage (`case/stage`; hidden_0 enters the first layer, hidden_1 leaves it).
Weights are drawn wider than at a usual start, biases and norms too, so that a swapped or forgotten one shows, and in
steps of 1/64, which makes the files a third as large.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
EVEN = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ODD = {"hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 1, "num_attention_heads": 3}
ONE_LAYER = EVEN | {"num_hidden_layers": 1}
PICTURE = {"image_size": 16, "patch_size": 4}
WORDS = {"vocab_size": 40, "max_position_embeddings": 10}
ROBERTA = {"vocab_size": 40, "max_position_embeddings": 12, "pad_token_id": 1, "layer_norm_eps": 1e-5}
Case = dict[str, torch.Tensor]


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            draw = torch.randn(weight.shape, generator=generator)
            if name == "logit_scale":
                draw = 2.5 + 0 * draw
            elif weight.ndim == 1:
                draw = 1 + 0.2 * draw if name.endswith("weight") else 0.3 * draw
            else:
                draw = 0.15 * draw
            weight.copy_(torch.round(draw * 64) / 64)
    return model.eval()


# --- Inputs -----------------------------------------------------------------------------------------------------------


def pictures(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.round(torch.randn(count, 3, size, size, generator=generator) * 16) / 16


def random_texts(
    lengths: list[int], width: int | None = None, *, pad: int = 0, side: str = "right", end: int | None = None,
    ids: tuple[int, int] = (2, WORDS["vocab_size"]), seed: int = 3,
) -> Case:
    """Random ids in a range, `end` at the end of each text, padded on one side to `width` (none: the longest)."""
    places = torch.arange(width or max(lengths))
    places = places if side == "right" else places.flip(0)
    mask = (places < torch.tensor(lengths)[:, None]).long()
    drawn = torch.randint(*ids, mask.shape, generator=torch.Generator().manual_seed(seed))
    drawn = torch.where(mask == 1, drawn, pad)
    for row, length in enumerate(lengths):
        if end is not None:
            drawn[row, length - 1 if side == "right" else -1] = end
    return {"input_ids": drawn, "attention_mask": mask}


def text_cases(pad: int) -> dict[str, Case]:
    return {
        "right": random_texts([7, 3, 5], pad=pad), "left": random_texts([7, 3, 5], pad=pad, side="left"),
        "one_token": random_texts([1], pad=pad), "longest": random_texts([10], pad=pad),
    }


# --- Stages -----------------------------------------------------------------------------------------------------------


def run(tower: torch.nn.Module, **inputs) -> tuple[transformers.utils.ModelOutput, Case]:
    """The output, and what enters the first layer and leaves every one: by hooks, as an output's own hidden_states
    hold other things in other families."""
    hidden, hooks = [], []
    layers = next(part for part in tower.modules() if isinstance(part, torch.nn.ModuleList))
    hooks.append(layers[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0])))
    for layer in layers:
        hooks.append(layer.register_forward_hook(
            lambda _, args, out: hidden.append(out if torch.is_tensor(out) else out[0])))
    out = tower(**inputs)
    for hook in hooks:
        hook.remove()
    return out, {f"hidden_{number}": state for number, state in enumerate(hidden)}


def image_stages(tower: torch.nn.Module, pixels: torch.Tensor) -> Case:
    convolution = next(part for part in tower.modules() if isinstance(part, torch.nn.Conv2d))
    out, hidden = run(tower, pixel_values=pixels)
    pooled = out.get("pooler_output")
    if pooled is None:  # ViT without its pooler
        pooled = out.last_hidden_state[:, 0]
    return {"pixel_values": pixels, "patches": convolution(pixels).flatten(2).transpose(1, 2), **hidden,
            "pooled": pooled}


def text_stages(tower: torch.nn.Module, inputs: Case) -> Case:
    out, hidden = run(tower, **inputs)
    pooled = out.pooler_output
    if pooled is None:  # the mean of what is no padding
        weight = inputs["attention_mask"][..., None].float()
        pooled = (out.last_hidden_state * weight).sum(1) / weight.sum(1)
    return {**inputs, **hidden, "pooled": pooled}


def whole_stages(model: torch.nn.Module, pixels: torch.Tensor, inputs: Case) -> Case:
    images, words = image_stages(model.vision_model, pixels), text_stages(model.text_model, inputs)
    out = model(pixel_values=pixels, **inputs)
    return {"pixel_values": pixels, **inputs, "image_pooled": images["pooled"], "text_pooled": words["pooled"],
            "image_features": model.visual_projection(images["pooled"]),
            "text_features": model.text_projection(words["pooled"]), "image_embeds": out.image_embeds,
            "text_embeds": out.text_embeds, "logits_per_image": out.logits_per_image}


# --- Files ------------------------------------------------------------------------------------------------------------


def save(name: str, model: torch.nn.Module, cases: dict[str, Case]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_folder(name, Path(folder), cases, mark="")


def save_folder(name: str, folder: Path, cases: dict[str, Case], mark: str = "file:") -> None:
    """The folder's files, their names after a mark, and the cases."""
    arrays = {f"{mark}{path.relative_to(folder).as_posix()}": np.fromfile(path, np.uint8)
              for path in sorted(folder.rglob("*")) if path.is_file()}
    for case, values in cases.items():
        for key, value in values.items():
            value = value.detach().numpy()
            arrays[f"{case}/{key}"] = value if value.dtype == np.float32 else value.astype(np.int32)
    np.savez_compressed(HERE / f"{name}.npz", **arrays)
    print(f"{name}.npz: {(HERE / f'{name}.npz').stat().st_size / 1e3:.0f} kB")


def record_image_towers() -> None:
    config = transformers.CLIPVisionConfig(**EVEN, **PICTURE, projection_dim=16)
    model = randomise(transformers.CLIPVisionModelWithProjection(config), seed=0)
    cases = {"as_configured": image_stages(model.vision_model, pictures(2, 16))}
    cases["as_configured"]["features"] = model(cases["as_configured"]["pixel_values"]).image_embeds
    save("clip_vision_projection", model, cases)
    model = randomise(transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**ODD, **PICTURE, hidden_act="gelu")), seed=1)
    save("clip_vision_gelu", model, {"one_picture": image_stages(model, pictures(1, 16))})
    words = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
             "vocab_size": 5, "max_position_embeddings": 4, "bos_token_id": 0, "eos_token_id": 1}
    model = randomise(transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=ODD | PICTURE, text_config=words, projection_dim=16)), seed=2)
    cases = {"as_configured": image_stages(model.vision_model, pictures(2, 16))}
    cases["as_configured"]["features"] = model.get_image_features(pictures(2, 16)).pooler_output
    save("clip", model, cases)
    model = randomise(transformers.ViTModel(transformers.ViTConfig(**EVEN, **PICTURE)), seed=3)
    save("vit", model, {"as_configured": image_stages(model, pictures(2, 16))})
    config = transformers.ViTConfig(**ODD, **PICTURE, hidden_act="quick_gelu")
    model = randomise(transformers.ViTModel(config, add_pooling_layer=False), seed=4)
    save("vit_no_pooler", model, {"one_picture": image_stages(model, pictures(1, 16))})


def record_text_towers() -> None:
    model = randomise(transformers.BertModel(transformers.BertConfig(**EVEN, **WORDS)), seed=5)
    cases = text_cases(pad=0)
    save("bert", model, {case: text_stages(model, inputs) for case, inputs in cases.items()})
    model = randomise(transformers.BertForMaskedLM(
        transformers.BertConfig(**ODD, **WORDS, hidden_act="quick_gelu")), seed=6)
    cases = {case: text_stages(model.bert, inputs) for case, inputs in text_cases(pad=0).items() if case != "longest"}
    save("bert_masked_lm", model, cases)
    families = (
        ("roberta", transformers.RobertaModel, transformers.RobertaConfig(**EVEN, **ROBERTA, type_vocab_size=1), 7),
        ("xlm_roberta", transformers.XLMRobertaModel, transformers.XLMRobertaConfig(**ODD, **ROBERTA), 8),
    )
    for name, family, config, seed in families:
        model = randomise(family(config), seed)
        save(name, model, {case: text_stages(model, inputs) for case, inputs in text_cases(pad=1).items()})


def record_whole_models() -> None:
    pairs = (
        ("dual_clip_bert", transformers.CLIPVisionConfig(**ONE_LAYER, **PICTURE),
         transformers.BertConfig(**ODD, **WORDS), 0),
        ("dual_vit_roberta", transformers.ViTConfig(**ODD, **PICTURE),
         transformers.RobertaConfig(**ONE_LAYER, **ROBERTA), 1),
    )
    for seed, (name, vision, text, pad) in enumerate(pairs, 9):
        config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=16)
        model = randomise(transformers.VisionTextDualEncoderModel(config), seed)
        save(name, model, {side: whole_stages(model, pictures(2, 16), random_texts([7, 3, 5], pad=pad, side=side))
                           for side in ("right", "left")})


if __name__ == "__main__":
    with torch.no_grad():
        record_image_towers()
        record_text_towers()
        record_whole_models()
